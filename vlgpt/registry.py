"""Classes by name: a short name for our own, `package.module:Class` for everybody else's.

Adding a source, benchmark, stage, image decoder or regression head therefore takes one new file and no edit here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TypeVar

from vlgpt.errors import UserError

T = TypeVar("T")
DOTTED = re.compile(r"\w+(\.\w+)*:\w+")


def load_class(name: str, base: type[T], *, key: str, known: Mapping[str, str]) -> type[T]:
    """The class behind a short name of `known` (short name -> dotted name) or behind `package.module:Class`.

    `key` says where the user wrote the name: "stage.kind", "--data-set". Raises UserError when nothing has that
    name, the module cannot be imported, or its class lacks what a `base` has.
    """
    if ":" not in name and name not in known:
        valid = ", ".join([*known, "package.module:Class of your own"])
        raise UserError(f"{key} {name!r} is unknown; valid: {valid}")
    found = load_object(known.get(name, name), key=key)
    if not isinstance(found, type) or (missing := missing_methods(found, base)):
        what = f"has no {', '.join(missing)}" if isinstance(found, type) else "is no class"
        raise UserError(f"{key} {name!r} {what}; wanted a class like {base.__module__}:{base.__qualname__}")
    return found


def load_object(name: str, *, key: str) -> object:
    """What `package.module:attribute` names. Raises UserError naming `key` when it cannot be imported."""
    module_name, _, attribute = name.partition(":")
    package = module_name.partition(".")[0]
    # An installed command does not search the working directory; users keep their own files there (as for uvicorn).
    if package and find_spec(package) is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key} {name!r} cannot be imported ({error}); wanted package.module:Class of an installed package or of "
            f"one in {os.getcwd()}: start in the folder that holds it, or add that folder to PYTHONPATH"
        ) from error


def is_dotted(name: str) -> bool:
    """Whether a name reads `package.module:Class` (and is no path, URL or short name)."""
    return DOTTED.fullmatch(name) is not None


def dotted_name(cls: type) -> str:
    """`package.module:Class`, which `load_class` takes."""
    return f"{cls.__module__}:{cls.__qualname__}"


def missing_methods(found: type, base: type) -> list[str]:
    """The methods of a protocol, or the base class, that a class lacks; an empty list when it fits."""
    if not getattr(base, "_is_protocol", False):
        return [] if issubclass(found, base) else [f"base class {base.__name__}"]
    own = [
        name
        for name, method in vars(base).items()
        if inspect.isfunction(method) and method.__module__ == base.__module__
    ]
    return [f"{name}()" for name in own if not callable(getattr(found, name, None))]
