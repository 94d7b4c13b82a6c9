"""The benchmarks by name, one file each; a file is imported when its benchmark is asked for.

A benchmark of another package is named `package.module:Class` and needs no line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from evaluation.core import Benchmark
from vlgpt.errors import UserError
from vlgpt.registry import dotted_name, load_class

REGISTRY: Mapping[str, str] = {
    "coco_caption": "evaluation.benchmarks.coco_caption:CocoCaption",
    "vqav2": "evaluation.benchmarks.vqa:Vqav2",
    "gqa": "evaluation.benchmarks.gqa:Gqa",
    "okvqa": "evaluation.benchmarks.vqa:Okvqa",
    "vizwiz": "evaluation.benchmarks.vizwiz:VizWiz",
    "visdial": "evaluation.benchmarks.visdial:VisDial",
    "coco_generation": "evaluation.benchmarks.coco_generation:CocoGeneration",
    "coco_reconstruction": "evaluation.benchmarks.reconstruction:CocoReconstruction",
    "flickr30k_reconstruction": "evaluation.benchmarks.reconstruction:Flickr30kReconstruction",
    "magicbrush": "evaluation.benchmarks.magicbrush:MagicBrush",
    "easy_vqa": "evaluation.benchmarks.easy_vqa:EasyVqa",
}

VALID_NAMES = f"{', '.join(REGISTRY)}, or package.module:Class of your own"


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a short name or of `package.module:Class`. Raises UserError for an unknown name."""
    return load_class(name, Benchmark, key="benchmark", known=REGISTRY)


def reference(benchmark: Benchmark) -> str:
    """The name under which `make` finds this benchmark again: short for our own, dotted for others."""
    is_ours = dotted_name(type(benchmark)) == REGISTRY.get(benchmark.name)
    return benchmark.name if is_ours else dotted_name(type(benchmark))


def make(name: str, **options: object) -> Benchmark:
    """A benchmark with options given as values or as text ("true", "300"). Raises UserError naming a bad one."""
    cls = benchmark_class(name)
    types = get_type_hints(cls)
    fields = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    if unknown := sorted(set(options) - set(fields)):
        raise UserError(f"benchmark {name} has no option {', '.join(unknown)}; valid: {', '.join(fields)}")
    values: dict[str, Any] = {
        key: _parse(f"{name}.{key}", value, fields[key]) for key, value in options.items()
    }
    return cls(**values)


def _parse(name: str, value: object, wanted: type) -> object:
    """The value of an option, from text where its type is another one."""
    choices = get_args(wanted)
    if choices and value not in choices:
        raise UserError(f"option {name} is {value!r}; valid: {', '.join(choices)}")
    if not isinstance(value, str) or choices or wanted is str:
        return value
    if wanted is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"option {name} is {value!r}; wanted true or false")
        return value.lower() == "true"
    try:
        return wanted(value)
    except ValueError as error:
        raise UserError(f"option {name} is {value!r}; wanted a number of type {wanted.__name__}") from error
