"""Tiny real CLIPs of open_clip's classes with random weights, saved as open_clip saves its own."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from demo.clip import new_open_clip, save_open_clip
from demo.tiny import train_text_tokenizer
from tests.helpers.tiny_unified import new_document_tokenizer


def save_clip(folder: Path, tokenizer: PreTrainedTokenizerBase, config: dict, *, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_open_clip(new_open_clip(config=config), config=config, folder=folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_clip(
    folder: Path,
    *,
    seed: int = 0,
    size_px: int = 24,
    patch_px: int = 12,
    layers: int = 2,
    text_length: int = 16,
) -> Path:
    """Towers of width 32 for images and of width 16 for text, with a tokenizer of their own."""
    texts = ["picture number one of a red dog", "a red dog and a blue chair near the house"]
    tokenizer = train_text_tokenizer(texts, vocabulary_size=300)
    vision = {"image_size": size_px, "layers": layers, "width": 32, "patch_size": patch_px, "head_width": 16}
    text = {
        "context_length": text_length,
        "vocab_size": len(tokenizer),
        "width": 16,
        "heads": 2,
        "layers": layers,
    }
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return save_clip(folder, tokenizer, config, seed=seed)


def save_fitting_clip(folder: Path) -> Path:
    """The CLIP that fits `new_model(tokenizer, num_patches=5)` of tiny_unified, with the tokenizer of that."""
    vision = {"image_size": 24, "patch_size": 12, "width": 24, "layers": 2, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 448, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return save_clip(folder, new_document_tokenizer().text_tokenizer, config, seed=1)
