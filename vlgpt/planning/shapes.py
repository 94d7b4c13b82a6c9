"""Configurations of models: of a folder, of the hub, and of published ones by name, so that no network is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlgpt.errors import UserError


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


def _tower(kind: str, width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    """One tower of a CLIP; transformers' classes know the rest."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    return {"model_type": kind, **sizes, "num_attention_heads": heads, **more}


def _clip(vision: dict[str, Any], text: dict[str, Any], projection: int) -> dict[str, Any]:
    return {"model_type": "clip", "vision_config": vision, "text_config": text, "projection_dim": projection}


_VIT_H = _tower("clip_vision_model", 1280, 32, 16, patch_size=14, projection_dim=1024, hidden_act="gelu")
_TEXT_512, _TEXT_768 = (_tower("clip_text_model", width, 12, width // 64) for width in (512, 768))
_TEXT_1024 = _tower("clip_text_model", 1024, 24, 16, hidden_act="gelu")
_TEXT_1280 = _tower("clip_text_model", 1280, 32, 20, projection_dim=1280, hidden_act="gelu")
ENCODERS: dict[str, dict[str, Any]] = {
    "clip-vit-base-patch32": _clip(_tower("clip_vision_model", 768, 12, 12, patch_size=32), _TEXT_512, 512),
    "clip-vit-base-patch16": _clip(_tower("clip_vision_model", 768, 12, 12, patch_size=16), _TEXT_512, 512),
    "clip-vit-large-patch14": _clip(_tower("clip_vision_model", 1024, 24, 16, patch_size=14), _TEXT_768, 768),
    "clip-vit-h-14-laion2b-s32b-b79k": _clip(_VIT_H, _TEXT_1024, 1024),
    "ip-adapter/models/image_encoder": _VIT_H,
    "stable-diffusion-v1-5/text_encoder": _TEXT_768,
    "stable-diffusion-xl-base-1.0/text_encoder": _TEXT_768,
    "stable-diffusion-xl-base-1.0/text_encoder_2": _TEXT_1280,
}


def read_export(path: str) -> dict[str, Any] | None:
    """config.json of an export of vlgpt, or None when the folder is none. (Read here: no torch is needed to look.)"""
    file = Path(path) / "config.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    return record if record.get("model_type") == "vlgpt" else None


def configuration(path: str, subfolder: str = "") -> Any:
    """The transformers configuration of a model: a folder's, a published one's by name, else the hub's or its cache's.

    Raises UserError when there is none, with the way to get it.
    """
    from transformers import AutoConfig

    file = f"{subfolder}/config.json" if subfolder else "config.json"
    is_folder = (Path(path) / file).is_file()
    export = read_export(path)
    values = (
        export["text_config"]
        if export is not None
        else {**LANGUAGE_MODELS, **ENCODERS}.get(_key(path, subfolder))
    )
    try:
        if values is not None and (export is not None or not is_folder):
            return AutoConfig.for_model(**values)
        return AutoConfig.from_pretrained(path, subfolder=subfolder)
    except (OSError, ValueError, KeyError) as error:
        if is_folder:
            raise UserError(f"{path}/{file} cannot be read: {str(error).splitlines()[0]}") from error
        raise UserError(
            f"the shape of {path!r} is unknown: no folder with {file}, no name known here, and the hub gave nothing; "
            f"run `hf download {path} {file} --local-dir DIR` where there is a network, and name DIR in its place"
        ) from error


def is_known(path: str, subfolder: str = "") -> bool:
    """Whether `configuration` needs neither a folder nor the hub."""
    return _key(path, subfolder) in LANGUAGE_MODELS or _key(path, subfolder) in ENCODERS


def _key(path: str, subfolder: str) -> str:
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    if subfolder:
        return f"{name}/{subfolder}"
    return name.removesuffix("-hf").replace("meta-llama", "llama").removesuffix("-instruct")
