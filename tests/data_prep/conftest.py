"""A small real tokenizer of one token per word."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory) -> Path:
    """Folder of a transformers tokenizer that splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("<unk>", "</s>", "picture", "USER", "ASSISTANT", ":")
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(str(folder))
    return folder
