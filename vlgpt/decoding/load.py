"""Loading the parts beside the weights of an export: the image encoder and the image decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.models.component import CONFIG_FILE, Component
from vlgpt.models.conditions import FOR_TARGETS, read_parts
from vlgpt.models.decoders import ImageDecoder
from vlgpt.models.encoders import ClipEncoder, load_clip
from vlgpt.models.unified import UnifiedConfig
from vlgpt.registry import is_dotted, load_class
from vlgpt.tokens import DocumentTokenizer

DIFFUSION_FILE = "diffusion.json"
DIFFUSION_PATHS = ("pipeline", "adapter", "unconditional", "vae")


def located(folder: Path, reference: str) -> str:
    """A path inside the export when there is such a file, else the reference unchanged (a path or hub name)."""
    inside = folder / reference
    return str(inside) if inside.exists() else reference


def load_tokenizer(folder: Path, config: UnifiedConfig) -> DocumentTokenizer:
    """The tokenizer of an export, with the chat template and the rendering that it was trained with."""
    return DocumentTokenizer.load(
        folder,
        num_visual=config.image_tokenizer["num_visual"],
        template=config.template,
        is_boundary_target=config.is_boundary_target,
        rendering=config.rendering,
    )


def load_encoder(folder: Path, record: Mapping[str, Any] | None) -> ClipEncoder | None:
    """The frozen CLIP of an export, None when it names none. Raises UserError when it cannot be loaded."""
    if record is None:
        return None
    options = {name: value for name, value in record.items() if name != "path"}
    return load_clip(located(folder, record["path"]), **options)


def describe_decoder(path: str | Path, *, key: str) -> JsonObject:
    """The record of an image decoder, as `load_decoder` takes it.

    `path` is the folder of a saved one, or a JSON file (or a folder with diffusion.json) with the arguments of
    `DiffusionDecoder.load`. Raises UserError naming `key` when it is neither.
    """
    place = Path(path)
    description = place if place.is_file() else place / DIFFUSION_FILE
    if description.is_file():
        parts = read_parts(description)
        return {"kind": "diffusion", **{name: parts[name] for name in parts if name not in FOR_TARGETS}}
    if (place / CONFIG_FILE).is_file():
        name = json.loads((place / CONFIG_FILE).read_text())["class"]
        return {"kind": "component", "class": name, "path": str(place)}
    raise UserError(f"{key} {path} is neither the folder of a saved decoder nor one with {DIFFUSION_FILE}")


def load_decoder(
    folder: Path, record: Mapping[str, Any] | None, *, dtype: torch.dtype
) -> ImageDecoder | None:
    """The image decoder of an export, None when it names none.

    Raises UserError for an unknown kind or when it cannot be loaded.
    """
    if record is None:
        return None
    if record["kind"] == "component":
        return load_component_decoder(Path(located(folder, record["path"])))
    if record["kind"] == "diffusion":
        from vlgpt.models.diffusion import DiffusionDecoder

        options = {name: value for name, value in record.items() if name not in ("kind", *FOR_TARGETS)}
        paths = {name: located(folder, options[name]) for name in DIFFUSION_PATHS if options.get(name)}
        return DiffusionDecoder.load(**{**options, **paths}, dtype=dtype)
    raise UserError(f"picture decoder kind {record['kind']!r} is unknown; valid: component, diffusion")


def load_component_decoder(folder: Path) -> ImageDecoder:
    """A saved component whose class, named in its config.json, is an image decoder. Raises UserError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}: expected a saved image decoder")
    name = json.loads(path.read_text()).get("class", "")
    if not is_dotted(name):
        raise UserError(
            f"{path}: class {name!r} is no package.module:Class, such as demo.decoder:ConvDecoder"
        )
    found = load_class(name, ImageDecoder, key=f"{path}: class", known={})
    if not issubclass(found, Component):
        raise UserError(f"{path}: class {name!r} is no Component: it cannot be loaded from a folder")
    decoder = found.from_folder(folder).eval()
    # `load_class` sees methods only: a constructor may set attributes.
    if missing := [
        attribute for attribute in ImageDecoder.__annotations__ if not hasattr(decoder, attribute)
    ]:
        raise UserError(
            f"{path}: class {name!r} has no {', '.join(missing)}: set what vlgpt.models.decoders:ImageDecoder lists"
        )
    return decoder


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters to `dtype`; buffers (rotary frequencies, statistics) keep their precision."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
