"""Command-line flags from types: an option is written once, as a field of a model or as a keyword of a function.

    class IndexOptions(ArrayOptions):
        folders: Annotated[tuple[Path, ...], Argument(is_positional=True, metavar="DIR")]
        tokenizer: str | None = Field(None, description="tokenizer folder or hub name")
        num_workers: int = Field(1, ge=1, description="processes")

    options = parse(IndexOptions, argv, prog="python -m data_prep.index", description=__doc__)

Field types: str, int, float, Path, bool (`--name` and `--no-name`), Literal (choices), tuples of these (several
values) and `X | None`. A field without default is required. Bounds (`ge`, `le`) and validators of the model are
checked after parsing. A command line of several parts (subcommands, or flags that depend on another value) puts
`make_parser`, `add_options`, `read_options` and `chosen` together itself.
"""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticUndefined

from vlgpt.errors import UserError
from vlgpt.processes import Share

Model = TypeVar("Model", bound=BaseModel)
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Argument:
    """How a field is given where its type does not say it: `Annotated[Path, Argument(is_positional=True)]`.

    `is_repeated` collects `--image A --image B` into a tuple; `flag` replaces `--name-with-dashes`, for names that
    Python or pydantic keeps for itself (`--json`).
    """

    is_positional: bool = False
    is_repeated: bool = False
    metavar: str | None = None
    flag: str = ""


@dataclass(frozen=True)
class Option:
    """One flag or positional argument. `name` is the Python name."""

    name: str
    annotation: object
    default: object
    help: str = ""
    argument: Argument = Argument()

    @property
    def flag(self) -> str:
        """As users type it."""
        if self.argument.is_positional:
            return self.argument.metavar or self.name
        return self.argument.flag or f"--{self.name.replace('_', '-')}"


class Options(BaseModel):
    """Base of the options of one command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArrayOptions(Options):
    """Options of a command that several tasks of an array job share.

    Raises UserError for a task that is not one of `num_tasks`.
    """

    task_index: int = Field(0, description="this task, from 0")
    num_tasks: int = Field(1, ge=1, le=100_000, description="tasks that share the work")

    @model_validator(mode="after")
    def _is_one_of_the_tasks(self) -> ArrayOptions:
        _ = self.share
        return self

    @property
    def share(self) -> Share:
        """What this task does."""
        return Share(self.task_index, self.num_tasks)


def parse(
    model: type[Model], argv: Sequence[str] | None = None, *, prog: str, description: str | None = None
) -> Model:
    """The options of a whole command line. Raises SystemExit as argparse does, and UserError for wrong values."""
    parser = make_parser(prog, description)
    add_options(parser, model_options(model))
    return read_options(model, parser.parse_args(argv))


def make_parser(prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """An empty parser: abbreviations are refused, so that a new flag never changes the meaning of a script."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def model_options(model: type[BaseModel]) -> list[Option]:
    """The fields of a pydantic model; descriptions are the help texts."""
    hints = typing.get_type_hints(model)
    options = []
    for name, field in model.model_fields.items():
        argument = next((item for item in field.metadata if isinstance(item, Argument)), Argument())
        default = REQUIRED if field.default is PydanticUndefined else field.default
        options.append(Option(name, hints[name], default, field.description or "", argument))
    return options


def signature_options(function: Callable[..., object]) -> list[Option]:
    """The keyword-only parameters of a function or a class; `Annotated[type, "help"]` carries the help text."""
    annotated = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints = typing.get_type_hints(annotated, include_extras=True)
    options = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotation, text = hints.get(parameter.name, str), ""
            if typing.get_origin(annotation) is Annotated:
                annotation, text = typing.get_args(annotation)[:2]
            options.append(Option(parameter.name, annotation, parameter.default, text))
    return options


def add_options(
    parser: argparse.ArgumentParser, options: Sequence[Option], *, title: str | None = None
) -> None:
    """Add these options, in a group of their own when `title` is given."""
    group = parser if title is None else parser.add_argument_group(title)
    for option in options:
        is_required = option.default is REQUIRED
        shown = (
            "" if is_required or option.default in (None, (), "", False) else f" (default: {option.default})"
        )
        keywords = {"help": f"{option.help}{shown}".replace("%", "%%"), **_parsing(option)}
        if option.argument.metavar is not None:
            keywords["metavar"] = option.argument.metavar
        if not is_required:
            # argparse appends to a copy of the default, which must then be a list
            is_list = option.argument.is_repeated and isinstance(option.default, tuple)
            keywords["default"] = list(option.default) if is_list else option.default  # type: ignore[call-overload]
        if option.argument.is_positional:
            group.add_argument(option.name, **keywords)  # type: ignore[arg-type]
        else:
            group.add_argument(option.flag, dest=option.name, required=is_required, **keywords)  # type: ignore[arg-type]


def chosen(arguments: argparse.Namespace, options: Sequence[Option]) -> dict[str, typing.Any]:
    """The values of these options, by name."""
    values = {option.name: getattr(arguments, option.name) for option in options}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def read_options(model: type[Model], arguments: argparse.Namespace) -> Model:
    """The model from its parsed flags. Raises UserError that names the flag, the value and what is wanted."""
    return validated(model, chosen(arguments, model_options(model)))


def validated(model: type[Model], values: Mapping[str, object]) -> Model:
    """The model from these values. Raises UserError that names the flag, the value and what is wanted."""
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(_message(model, error.errors()[0])) from error


def _message(model: type[BaseModel], error: ErrorDetails) -> str:
    """One line for the first error of a model."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    name, value = str(error["loc"][0]), error["input"]
    flag = next((option.flag for option in model_options(model) if option.name == name), name)
    if error["type"] not in ("greater_than_equal", "less_than_equal"):
        return f"{flag} {value}: {error['msg'].lower()}"
    metadata = model.model_fields[name].metadata
    low, high = (next((getattr(m, key) for m in metadata if hasattr(m, key)), None) for key in ("ge", "le"))
    if low is None:
        wanted = f"at most {high}"
    else:
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
    return f"{flag} must be {wanted}, found {value}"


def _parsing(option: Option) -> dict[str, object]:
    """The argparse keywords for a type. Raises TypeError for a type that has no command-line form."""
    annotation = _without_none(option.annotation)
    is_several = typing.get_origin(annotation) in (tuple, list)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if is_several:
        annotation = _without_none(typing.get_args(annotation)[0])
    keywords: dict[str, object] = {}
    if typing.get_origin(annotation) is Literal:
        keywords["choices"] = typing.get_args(annotation)
    elif annotation in (str, int, float, Path):
        keywords["type"] = annotation
    else:
        raise TypeError(f"no command-line form for options of type {annotation}")
    if option.argument.is_repeated:
        keywords["action"] = "append"
    elif is_several:
        is_optional = option.argument.is_positional and option.default is not REQUIRED
        keywords["nargs"] = "*" if is_optional else "+"
    elif option.argument.is_positional and option.default is not REQUIRED:
        keywords["nargs"] = "?"
    return keywords


def _without_none(annotation: object) -> object:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation
