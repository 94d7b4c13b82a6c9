"""Laws of command lines that are made from types."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vlgpt.errors import UserError
from vlgpt.options import Argument, ArrayOptions, Options, chosen, make_parser, parse, signature_options
from vlgpt.options import add_options as add
from vlgpt.processes import Share


class Example(Options):
    folders: Annotated[tuple[Path, ...], Argument(is_positional=True, metavar="DIR")] = Field(
        description="in"
    )
    output: Path = Field(description="100 % of it")
    kind: Literal["a", "b"] = "a"
    limit: int | None = Field(None, ge=1)
    size: int = Field(3, ge=1, le=9)
    is_fast: bool = False
    image: Annotated[tuple[Path, ...], Argument(is_repeated=True)] = ()
    as_json: Annotated[bool, Argument(flag="--json")] = False


def read(*arguments: str) -> Example:
    return parse(Example, ["x", *arguments, "--output", "o"], prog="example")


def test_every_kind_of_field_has_its_flag() -> None:
    assert read() == Example(folders=(Path("x"),), output=Path("o"))
    found = read("y", "--kind", "b", "--limit", "4", "--is-fast", "--image", "p", "--image", "q", "--json")
    assert found.folders == (Path("x"), Path("y")) and found.image == (Path("p"), Path("q"))
    assert (found.kind, found.limit, found.is_fast, found.as_json) == ("b", 4, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "10"), "--size must be between 1 and 9, found 10"),
        (("--limit", "0"), "--limit must be at least 1, found 0"),
    ],
)
def test_a_wrong_value_names_flag_value_and_bounds(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(*arguments)


@pytest.mark.parametrize("arguments", [("--kind", "c"), ("--siz", "3"), ("--help",)])
def test_unknown_choices_and_abbreviations_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        read(*arguments)


def test_keywords_of_a_function_become_flags() -> None:
    def build(
        inputs: list[Path], *, split: Annotated[Literal["train", "all"], "part"] = "train", n: int
    ) -> None: ...

    parser = make_parser("example")
    add(parser, signature_options(build), title="source")
    assert chosen(parser.parse_args(["--n", "2"]), signature_options(build)) == {"split": "train", "n": 2}


def test_a_task_is_one_of_its_array() -> None:
    options = parse(ArrayOptions, ["--task-index", "1", "--num-tasks", "3"], prog="example")
    assert list(options.share.of(8)) == [1, 4, 7]
    assert [list(options.share.split(worker, 2).of(8)) for worker in (0, 1)] == [[1, 7], [4]]
    for index in ("3", "-1"):
        with pytest.raises(UserError, match="--task-index must be between 0 and 2"):
            parse(ArrayOptions, ["--task-index", index, "--num-tasks", "3"], prog="example")
    with pytest.raises(UserError, match="--rank must be between 0 and 1, found 2"):
        Share(2, 2, flag="--rank")
