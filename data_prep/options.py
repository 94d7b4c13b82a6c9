"""Command-line flags from type annotations: the options of a source or of a settings class are written down
once.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ValidationError

from vlgpt.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One flag. `name` is the Python name, the flag is `--name-with-dashes`."""

    name: str
    annotation: Any
    default: Any
    help: str = ""


def constructor_options(cls: type) -> list[Option]:
    """The keyword-only parameters of `cls.__init__`; `Annotated[type, "help"]` carries the help text."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    options = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotation, text = hints.get(parameter.name, str), ""
            if typing.get_origin(annotation) is Annotated:
                annotation, text = typing.get_args(annotation)[:2]
            options.append(Option(parameter.name, annotation, parameter.default, text))
    return options


def model_options(model: type[BaseModel]) -> list[Option]:
    """The fields of a pydantic model; descriptions are the help texts."""
    hints = typing.get_type_hints(model)
    return [
        Option(name, hints[name], field.default, field.description or "")
        for name, field in model.model_fields.items()
    ]


def add_options(parser: argparse.ArgumentParser, title: str, options: list[Option]) -> None:
    """Add a titled group of flags."""
    group = parser.add_argument_group(title)
    for option in options:
        shown = "" if option.default in (None, REQUIRED) else f" (default: {option.default})"
        keywords: dict[str, Any] = {"dest": option.name, "help": f"{option.help}{shown}"}
        if option.default is REQUIRED:
            keywords["required"] = True
        else:
            keywords["default"] = option.default
        group.add_argument(f"--{option.name.replace('_', '-')}", **keywords, **_parsing(option.annotation))


def chosen(arguments: argparse.Namespace, options: list[Option]) -> dict[str, Any]:
    """The values of these options, by name."""
    return {option.name: getattr(arguments, option.name) for option in options}


def make_settings(model: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The model from its flags. Raises UserError that names the flag, the value and what is wanted."""
    try:
        return model(**chosen(arguments, model_options(model)))
    except ValidationError as error:
        first = error.errors()[0]
        flag = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise UserError(f"{flag} {first['input']}: {first['msg'].lower()}") from error


def _parsing(annotation: Any) -> dict[str, Any]:
    """The argparse keywords for a type. Raises TypeError for a type that has no command-line form."""
    annotation = _without_none(annotation)
    origin = typing.get_origin(annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal:
        return {"choices": typing.get_args(annotation)}
    if origin in (tuple, list):
        return {"nargs": "+", "type": _converter(_without_none(typing.get_args(annotation)[0]))}
    return {"type": _converter(annotation)}


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _converter(annotation: Any) -> Callable[[str], Any]:
    if annotation in (str, int, float, Path):
        return annotation
    raise TypeError(f"no command-line form for options of type {annotation}")
