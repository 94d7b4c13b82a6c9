"""Tiny parts of the same classes as the real ones: a text tokenizer and a random LLaMA, for the demo and for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlgpt.tokens import DocumentTokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def train_text_tokenizer(texts: Iterable[str], *, vocabulary_size: int = 1600) -> PreTrainedTokenizerFast:
    """A byte-level BPE as a transformers tokenizer, trained on the given texts; any text can be written with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def new_language_model(
    *,
    vocabulary_size: int,
    width: int = 128,
    depth: int = 3,
    num_heads: int = 4,
    mlp_width: int = 352,
    max_positions: int = 512,
    embedding_std: float = 1.0,
) -> LlamaForCausalLM:
    """A LlamaForCausalLM with random weights. Embeddings start at std 1: they must match standardised visual inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=embedding_std)
    return model


def save_language_model(folder: Path, tokenizer: object, **shape: Any) -> None:
    """Write a random LLaMA and its tokenizer as a transformers folder, as a user's LLaMA-7B folder would look."""
    document_tokenizer = DocumentTokenizer(tokenizer, num_visual=1, template="short")
    model = new_language_model(vocabulary_size=document_tokenizer.vocabulary_size, **shape)
    model.save_pretrained(folder)
    document_tokenizer.save(folder)
