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


def save_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """24 px, patches of 12, two layers of width 32 for images and of width 16 for text."""
    tokenizer = train_text_tokenizer(["picture number one of a red dog"], vocabulary_size=300)
    vision = {"image_size": 24, "patch_size": 12, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return save_clip(folder, tokenizer, config, seed=seed)


def save_judging_clip(folder: Path) -> Path:
    """32 px, patches of 8, one layer of width 32 for each; long enough a text for captions."""
    tokenizer = train_text_tokenizer(["a red dog and a blue chair near the house"], vocabulary_size=300)
    vision = {"image_size": 32, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16}
    text = {"context_length": 24, "vocab_size": len(tokenizer), "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return save_clip(folder, tokenizer, config, seed=0)


def save_fitting_clip(folder: Path) -> Path:
    """The CLIP that fits `new_model(tokenizer, num_patches=5)` of tiny_unified, with the tokenizer of that."""
    vision = {"image_size": 24, "patch_size": 12, "width": 24, "layers": 2, "head_width": 12}
    text = {"context_length": 8, "vocab_size": 448, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    return save_clip(folder, new_document_tokenizer().text_tokenizer, config, seed=1)
