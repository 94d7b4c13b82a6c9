"""Fixtures of what is evaluated: an export, and the CLIP that judges it."""

from pathlib import Path

import pytest

from tests.helpers.chat_parts import save_export
from tests.helpers.tiny_clip import save_judging_clip
from tests.helpers.tiny_unified import new_document_tokenizer, new_model


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    return save_judging_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Path:
    """CLIP, tokenizer, language model, detokenizer and image decoder in one folder."""
    model = new_model(new_document_tokenizer(), num_patches=5, image_wish=3.0).eval()
    return save_export(tmp_path_factory.mktemp("export"), model)
