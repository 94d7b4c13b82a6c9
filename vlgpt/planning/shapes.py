"""Shapes of published models by name, so that a run can be planned without their weights or a network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlgpt.log import UserError


def _llama(
    vocabulary: int, width: int, mlp: int, depth: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": False,
        **more,
    }


_QWEN: dict[str, Any] = {"model_type": "qwen2"}
# Configurations as published with the weights. Keys: the last part of the name, lower case, without "-hf".
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama-7b": _llama(32000, 4096, 11008, 32, 32, 32),
    "llama-13b": _llama(32000, 5120, 13824, 40, 40, 40),
    "llama-30b": _llama(32000, 6656, 17920, 60, 52, 52),
    "llama-65b": _llama(32000, 8192, 22016, 80, 64, 64),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(32000, 5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(32000, 8192, 28672, 80, 64, 8),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8),
    "llama-3.1-8b": _llama(128256, 4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama(128256, 8192, 28672, 80, 64, 8),
    "vicuna-7b-v1.5": _llama(32000, 4096, 11008, 32, 32, 32),
    "vicuna-13b-v1.5": _llama(32000, 5120, 13824, 40, 40, 40),
    "tinyllama-1.1b": _llama(32000, 2048, 5632, 22, 32, 4),
    "mistral-7b-v0.1": _llama(32000, 4096, 14336, 32, 32, 8, model_type="mistral"),
    "mistral-7b-v0.3": _llama(32768, 4096, 14336, 32, 32, 8, model_type="mistral"),
    "qwen2.5-0.5b": _llama(151936, 896, 4864, 24, 14, 2, **_QWEN, tie_word_embeddings=True),
    "qwen2.5-1.5b": _llama(151936, 1536, 8960, 28, 12, 2, **_QWEN, tie_word_embeddings=True),
    "qwen2.5-7b": _llama(152064, 3584, 18944, 28, 28, 4, **_QWEN),
}


@dataclass(frozen=True)
class ImageTower:
    """A ViT: what counts for parameters, FLOPs and bytes."""

    width: int
    mlp: int
    depth: int
    patch_px: int
    image_px: int

    @property
    def num_tokens(self) -> int:
        return (self.image_px // self.patch_px) ** 2 + 1

    @property
    def num_parameters(self) -> int:
        """Patch embedding, class token, positions, two outer norms, blocks; no projection (it is not used)."""
        w, m = self.width, self.mlp
        stem = 3 * self.patch_px**2 * w + w + self.num_tokens * w + 4 * w
        return stem + self.depth * (4 * w * w + 2 * w * m + 9 * w + m)

    def forward_flops(self, num_images: int) -> int:
        """Multiplications and additions of the matrix products for `num_images` pictures."""
        n, w = self.num_tokens, self.width
        block = 2 * n * (4 * w * w + 2 * w * self.mlp) + 4 * n * n * w
        return num_images * (2 * (n - 1) * 3 * self.patch_px**2 * w + self.depth * block)


IMAGE_TOWERS = {
    "vit-b-32": ImageTower(768, 3072, 12, 32, 224),
    "vit-b-16": ImageTower(768, 3072, 12, 16, 224),
    "vit-l-14": ImageTower(1024, 4096, 24, 14, 224),
    "vit-h-14": ImageTower(1280, 5120, 32, 14, 224),
}
_TOWER_NAMES = {
    "clip-vit-base-patch32": "vit-b-32",
    "clip-vit-base-patch16": "vit-b-16",
    "clip-vit-large-patch14": "vit-l-14",
    "clip-vit-h-14-laion2b-s32b-b79k": "vit-h-14",
}


def read_export(path: str) -> dict[str, Any] | None:
    """config.json of an export of vlgpt, or None when the folder is none. (Read here: no torch is needed to plan.)"""
    file = Path(path) / "config.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record if record.get("model_type") == "vlgpt" else None


def language_config(path: str) -> tuple[dict[str, Any], str]:
    """The transformers configuration of a language model, and where it was found: a folder, or the table by name.

    Raises UserError for a name that is neither, listing the known ones.
    """
    if (export := read_export(path)) is not None:
        return dict(export["text_config"]), f"{path} (export of vlgpt)"
    if (Path(path) / "config.json").is_file():
        return json.loads((Path(path) / "config.json").read_text()), f"{path}/config.json"
    key = _key(path).removesuffix("-hf").replace("meta-llama", "llama").removesuffix("-instruct")
    if key not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise UserError(
            f"the shape of language model {path!r} is unknown: it is no local folder with a config.json, and no name "
            f"ends in one of: {known}"
        )
    return dict(LANGUAGE_MODELS[key]), f"built-in table ({key})"


def image_tower(path: str) -> ImageTower:
    """Shape of a CLIP's image tower from its folder or name. Raises UserError when it is unknown."""
    folder = Path(path)
    if (folder / "open_clip_config.json").is_file():
        vision = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
        mlp = int(vision["width"] * vision.get("mlp_ratio", 4.0))
        return ImageTower(vision["width"], mlp, vision["layers"], vision["patch_size"], vision["image_size"])
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        v = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "patch_size": 32,
            "image_size": 224,
            **config.get("vision_config", config),
        }
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "image_size")
        return ImageTower(*(int(v[name]) for name in names))
    key = _key(path)
    key = _TOWER_NAMES.get(key, key)
    if key not in IMAGE_TOWERS:
        known = ", ".join([*IMAGE_TOWERS, *_TOWER_NAMES])
        raise UserError(
            f"the shape of encoder {path!r} is unknown: it is no local folder, and none of: {known}"
        )
    return IMAGE_TOWERS[key]


def _key(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1].lower()
