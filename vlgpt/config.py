"""YAML + `a.b=c` overrides -> settings. Every mistake becomes one line: the key, the value, the valid choices."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vlgpt.errors import UserError
from vlgpt.settings import RunSettings, stage_settings

S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`) and refuses duplicate keys."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"key {sorted(repeated)[0]!r} stands twice, line {node.start_mark.line + 1}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """Safe YAML. Raises UserError with the line of a syntax error."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> Any:
    """A YAML file. Raises UserError that names the file, also where a syntax error is, or FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} does not exist")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run's YAML and apply overrides. Raises UserError (one line) or FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} does not exist")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return validate(RunSettings, values, where=str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` (value read as YAML; list positions are numbers). Raises UserError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.key=value")
    steps = key.split(".")
    target: Any = values
    for step in steps[:-1]:
        if isinstance(target, list):
            target = target[_position(target, step, override)]
        elif isinstance(target, dict):
            target = target.setdefault(step, {})
        else:
            raise UserError(f"override {override!r}: {step!r} lies inside a plain value")
    value = parse_yaml(text)
    if isinstance(target, list):
        target[_position(target, steps[-1], override)] = value
    elif isinstance(target, dict):
        target[steps[-1]] = value
    else:
        raise UserError(f"override {override!r}: {steps[-1]!r} lies inside a plain value")


def _position(items: list[object], step: str, override: str) -> int:
    if not step.isdigit() or int(step) >= len(items):
        raise UserError(f"override {override!r}: {step!r} is no position of a list of {len(items)} items")
    return int(step)


def validate(model: type[S], values: object, *, where: str) -> S:
    """Build settings from plain values. Raises UserError: one line that names key, value and valid choices."""
    try:
        return model.model_validate(_relax(values))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(model, values, error)}") from error


def _relax(values: Any) -> Any:
    """Lists become tuples, so that strict models accept what YAML and JSON can write."""
    if isinstance(values, dict):
        return {key: _relax(value) for key, value in values.items()}
    if isinstance(values, list):
        return tuple(_relax(value) for value in values)
    return values


def _explain(model: type[BaseModel], values: object, error: ValidationError) -> str:
    problem = error.errors()[0]
    location = problem["loc"]
    key = ".".join(str(step) for step in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        names = _field_names(model, values, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), names, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r} (value {problem['input']!r}); {hint}valid keys: {', '.join(names)}{more}"
    if problem["type"] == "missing":
        return f"key {key!r} is required{more}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"key {key!r}: {message}, found {_short(problem['input'])}{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field_names(model: type[BaseModel], values: Any, location: Sequence[int | str]) -> list[str]:
    """Field names of the settings class at a location of pydantic's error."""
    if location and location[0] == "stage" and issubclass(model, RunSettings):
        model, location = stage_settings(values["stage"]["kind"]), location[1:]
    current: Any = model
    for step in location:
        for candidate in _models(current):
            if step in candidate.model_fields:
                current = candidate.model_fields[str(step)].annotation
                break
    return sorted({name for candidate in _models(current) for name in candidate.model_fields})


def _models(annotation: object) -> typing.Iterator[type[BaseModel]]:
    """All settings classes inside an annotation (unions, tuples, Annotated)."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def dump(settings: BaseModel) -> str:
    """YAML text that `load_run` reads back to equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
