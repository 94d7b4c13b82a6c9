"""A small real tokenizer of one token per word, and a tiny CLIP."""

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from tests.helpers.small_data import word_level
from tests.helpers.tiny_clip import save_tiny_clip


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory) -> Path:
    """Folder of a transformers tokenizer that splits at spaces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    word_level(["picture", "USER", "ASSISTANT", ":"], pre_tokenizers.Whitespace()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))
