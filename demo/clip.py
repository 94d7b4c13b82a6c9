"""An untrained CLIP of open_clip's classes, and the folder that open_clip reads: the demo trains its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn


def new_open_clip(*, config: dict[str, Any]) -> nn.Module:
    """An untrained CLIP of open_clip's classes from its own config format (`embed_dim`, `vision_cfg`, `text_cfg`)."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=CLIPTextCfg(**config["text_cfg"]),
        nonscalar_logit_scale=config.get("nonscalar_logit_scale", False),
    )


def save_open_clip(model: nn.Module, *, config: dict[str, Any], folder: Path) -> None:
    """Write the folder format of open_clip (`local-dir:`): open_clip_config.json and open_clip_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    half = [0.5, 0.5, 0.5]
    preprocessing = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    record = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(record, indent=1) + "\n")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
