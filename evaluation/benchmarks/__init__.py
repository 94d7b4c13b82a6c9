"""The benchmarks by name, one file each; a file is imported when its benchmark is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from evaluation.core import Benchmark
from vlgpt.errors import UserError

REGISTRY: Mapping[str, str] = {
    "coco_caption": "coco_caption:CocoCaption",
    "vqav2": "vqa:Vqav2",
    "gqa": "gqa:Gqa",
    "okvqa": "vqa:Okvqa",
    "vizwiz": "vizwiz:VizWiz",
    "visdial": "visdial:VisDial",
    "coco_generation": "coco_generation:CocoGeneration",
    "coco_reconstruction": "reconstruction:CocoReconstruction",
    "flickr30k_reconstruction": "reconstruction:Flickr30kReconstruction",
    "magicbrush": "magicbrush:MagicBrush",
    "easy_vqa": "easy_vqa:EasyVqa",
    "emoji_reconstruction": "emoji_pictures:EmojiReconstruction",
    "emoji_caption": "emoji_text:EmojiCaption",
    "emoji_vqa": "emoji_text:EmojiVqa",
    "emoji_draw": "emoji_pictures:EmojiDraw",
    "emoji_edit": "emoji_edit:EmojiEdit",
    "emoji_label_pages": "emoji_text:EmojiLabelPages",
}
SUITES: Mapping[str, str] = {"emoji": "emoji"}
"""Several benchmarks under one command line of their own: a module with main, has_data and part_names."""


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark. Raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(f"benchmark {name!r} is unknown; valid: {', '.join(REGISTRY)}")
    module, class_name = REGISTRY[name].split(":")
    return getattr(importlib.import_module(f"evaluation.benchmarks.{module}"), class_name)


def suite(name: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(f"evaluation.benchmarks.{SUITES[name]}")


def suites_of(data: Path) -> list[str]:
    """The suites whose data lies in a folder."""
    return [name for name in SUITES if suite(name).has_data(data)]


def make(name: str, **options: Any) -> Benchmark:
    """A benchmark with options given as values or as text ("true", "300"). Raises UserError naming a bad
    one."""
    cls = benchmark_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(options) - set(fields)):
        raise UserError(f"benchmark {name} has no option {', '.join(unknown)}; valid: {', '.join(fields)}")
    values = {key: _parse(f"{name}.{key}", value, fields[key].default) for key, value in options.items()}
    return cls(**values)


def _parse(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UserError(f"option {name} is {value!r}; wanted true or false")
        return value.lower() == "true"
    if isinstance(default, int | float):
        try:
            return type(default)(value)
        except ValueError as error:
            raise UserError(f"option {name} is {value!r}; wanted a number like {default}") from error
    return value
