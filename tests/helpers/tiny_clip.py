"""A tiny real CLIP of open_clip's classes with random weights, saved as open_clip saves its own."""

from pathlib import Path

import torch

from demo.clip import new_open_clip, save_open_clip
from demo.tiny import train_text_tokenizer


def save_tiny_clip(folder: Path, *, seed: int = 0) -> Path:
    """24 px, patches of 12, two layers of width 32 for pictures and of width 16 for text."""
    tokenizer = train_text_tokenizer(["picture number one of a red dog"], vocabulary_size=300)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 32, "patch_size": 12, "head_width": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(tokenizer),
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_open_clip(new_open_clip(config=config), config=config, folder=folder)
    tokenizer.save_pretrained(folder)
    return folder
