"""One JSON file names the parts of a diffusion decoder: for drawing, and for the targets that stage 1 learns.

    {"pipeline": "stable-diffusion-v1-5", "adapter": "ip-adapter-plus_sd15.safetensors",
     "image_encoder": "ip-adapter/models/image_encoder", "unconditional": "unconditional.safetensors"}

Paths are relative to the file, or hub names. More keys are arguments of `DiffusionDecoder.load` (vae, scheduler,
reading, num_steps, guidance, image_scale). `DecoderConditioner` reads the file wherever a CLIP is expected
(`library: ip_adapter`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models.component import freeze
from vlgpt.models.conditioners import (
    IpAdapterImageConditioner,
    SdxlTextConditioner,
    TextConditioner,
    unconditional,
)
from vlgpt.models.encoders import ClipEncoder

PATHS = ("pipeline", "adapter", "unconditional", "vae", "image_encoder")
NEEDED = ("pipeline", "adapter", "unconditional")
FOR_TARGETS = ("image_encoder", "image_subfolder")  # not needed for drawing
FOR_DRAWING = ("vae", "scheduler", "reading", "num_steps", "guidance", "image_scale")
# PAPER: guidance, scale and steps are not stated (§3.1). 7.5 and 50 steps are those of IP-Adapter's demos and of
# Emu; IP-Adapter's authors advise scale 1.0 for an image alone and about 0.5 where the text should weigh more.
GUIDANCE, IMAGE_SCALE = 7.5, 1.0


def read_parts(path: str | Path) -> dict[str, Any]:
    """The description, its relative paths resolved, guidance and scale filled in.

    Raises UserError for a missing file, bad JSON, unknown keys, and a guidance or scale that is no number from 0 on.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} is no file: wanted a JSON that names {', '.join(NEEDED)} of a diffusion decoder"
        )
    try:
        parts = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    known = {*PATHS, *FOR_TARGETS, *FOR_DRAWING}
    wrong = [f"lacks {name!r}" for name in NEEDED if name not in parts]
    wrong += [f"has the unknown key {name!r}" for name in parts if name not in known]
    if wrong:
        raise UserError(f"{path} {', '.join(wrong)}; known keys: {', '.join(sorted(known))}")
    parts = {"guidance": GUIDANCE, "image_scale": IMAGE_SCALE, **parts}
    for name in ("guidance", "image_scale"):
        value = parts[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(
                f"{path}: {name} is {value!r}, wanted a number from 0 on (1: no guidance, full scale)"
            )
    for name in PATHS:
        near = path.parent / parts.get(name, "")
        if parts.get(name) and near.exists():
            parts[name] = str(near)
    return parts


def image_encoder_of(parts: Mapping[str, Any], path: str | Path) -> tuple[str, str]:
    """Folder or hub name of the image encoder, and the subfolder. Raises UserError when the description names none."""
    if "image_encoder" not in parts:
        raise UserError(f"{path} lacks 'image_encoder': the OpenCLIP ViT-H/14 that IP-Adapter Plus reads")
    return parts["image_encoder"], parts.get("image_subfolder", "")


def is_sdxl_pipeline(path: str) -> bool:
    """Whether a pipeline, local or on the hub, has a second text encoder."""
    if Path(path).is_dir():
        return (Path(path) / "text_encoder_2").is_dir()
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, subfolder="text_encoder_2")
    except (OSError, ValueError):
        return False
    return True


class DecoderConditioner(ClipEncoder):
    """e_v and e_t of a diffusion decoder, in the place of a CLIP: `patches` gives e_v, `text_states` gives e_t.

    The constants of classifier-free guidance are written to the description's `unconditional` file when it is not there
    yet. Raises UserError when a part is missing or does not fit.
    """

    layer, has_cls = -2, True

    def __init__(self, image: IpAdapterImageConditioner, text: TextConditioner | SdxlTextConditioner):
        super().__init__()
        self.image, self.text = image, text
        self.image_size_px = image.image_size_px
        self.register_buffer("mean", image.mean.clone(), persistent=False)
        self.register_buffer("std", image.std.clone(), persistent=False)
        freeze(self)

    @classmethod
    def load(cls, path: str | Path) -> DecoderConditioner:
        parts = read_parts(path)
        encoder, subfolder = image_encoder_of(parts, path)
        is_features = parts.get("reading", "tokens") == "features"
        image = IpAdapterImageConditioner.load(
            encoder,
            adapter=None if is_features else parts["adapter"],
            subfolder=subfolder,
        )
        kind = SdxlTextConditioner if is_sdxl_pipeline(parts["pipeline"]) else TextConditioner
        text = kind.load(parts["pipeline"])
        constants = Path(path).parent / parts["unconditional"]  # as it stands where it is absolute
        if not constants.exists() and unconditional(image, text).save(constants, is_replaced=False):
            get_logger("decoder").info("wrote the unconditional constants %s", constants)
        return cls(image, text)

    @torch.no_grad()
    def patches(self, pixels: Tensor) -> Tensor:
        """e_v: (B, 3, H, W) -> (B, Kv, Dv)."""
        return self.image.condition(pixels)

    def text_states(self, captions: Sequence[str]) -> Tensor:
        """e_t: B strings -> (B, Kt, Dt)."""
        return self.text.condition(captions)

    def embed_images(self, pixels: Tensor) -> Tensor:
        raise UserError("the conditioner of a diffusion decoder has no projected embeddings: give a CLIP")

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        raise UserError("the conditioner of a diffusion decoder has no projected embeddings: give a CLIP")
