"""A tiny random unified model of the real classes, for tests of decoding and export."""

from __future__ import annotations

import functools
from typing import Any

import torch

from demo.tiny import new_language_model, train_text_tokenizer
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel
from vlgpt.tokens import DocumentTokenizer

NUM_VISUAL, VISUAL_WIDTH, NUM_PATCHES, PATCH_WIDTH = 4, 48, 9, 24
CONDITION_SHAPES = {"image_tokens": 3, "image_width": 16, "text_tokens": 5, "text_width": 12}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is in the picture?",
    "Draw a red circle beside a blue square, please! An image of three elephants.",
    "USER: ASSISTANT: question short answer: yes no one two three \u4f60\u597d na\u00efve caf\u00e9",
]


@functools.cache
def _text_tokenizer_json(vocabulary_size: int) -> str:
    return train_text_tokenizer(TEXTS * 4, vocabulary_size=vocabulary_size).backend_tokenizer.to_str()


def new_document_tokenizer(
    *, template: str = "short", num_visual: int = NUM_VISUAL, vocabulary_size: int = 400
) -> DocumentTokenizer:
    """A fresh byte-level BPE with <s> and </s>. With 382 tokens its vocabulary needs no padding."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_text_tokenizer_json(vocabulary_size)),
        bos_token="<s>",
        eos_token="</s>",
        add_bos_token=True,
    )
    return DocumentTokenizer(text, num_visual=num_visual, template=template)


def new_model(
    tokenizer: DocumentTokenizer,
    *,
    seed: int = 0,
    width: int = 64,
    visual_width: int = VISUAL_WIDTH,
    image_wish: float = 1.0,
    end_wish: float = 1.0,
    num_patches: int = NUM_PATCHES,
    tied: bool = False,
    **language: Any,
) -> UnifiedModel:
    """`image_wish` and `end_wish` scale rows of the LM head: large ones make a random model draw or stop."""
    torch.manual_seed(seed)
    language_model = new_language_model(
        vocabulary_size=tokenizer.vocabulary_size, width=width, depth=2, num_heads=4, mlp_width=96, **language
    )
    if tied:
        language_model.config.tie_word_embeddings = True
        language_model.lm_head.weight = language_model.get_input_embeddings().weight
    with torch.no_grad():
        language_model.get_output_embeddings().weight *= 8
        language_model.get_output_embeddings().weight[tokenizer.begin_image_id] *= image_wish
        language_model.get_output_embeddings().weight[tokenizer.eos_id] *= end_wish
    lm = MultimodalLM(
        language_model,
        num_tokens=tokenizer.num_tokens,
        num_visual=tokenizer.num_visual,
        visual_width=visual_width,
    )
    image_tokenizer = ImageTokenizer(
        num_patches=num_patches,
        patch_width=PATCH_WIDTH,
        num_visual=tokenizer.num_visual,
        visual_width=visual_width,
        width=32,
        depth=2,
        num_heads=4,
        init_std=1.0,
    )
    statistics = image_tokenizer.standardiser
    statistics.mean.normal_()
    statistics.std.uniform_(0.5, 2.0)
    detokenizer = ImageDetokenizer(
        num_visual=tokenizer.num_visual,
        visual_width=visual_width,
        **CONDITION_SHAPES,
        width=32,
        depth=2,
        num_heads=4,
    )
    return UnifiedModel(lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=detokenizer).eval()
