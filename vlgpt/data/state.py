"""The loader's state: a small JSON that holds the trainer's position and what identifies the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from vlgpt.data.mixture import SLOTS
from vlgpt.data.sources import OpenSource, SourceState
from vlgpt.data.stream import Position
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.log import get_logger
from vlgpt.settings import DataSettings

SCHEMA = 2
# Of states that were saved when a rejected draw still left its slot empty; only packed positions differ.
UNDRAWN_SCHEMA = 1
PLAN_SETTINGS = ("mixing", "temperature", "sequence_length", "packing", "shuffle_shards")
SOURCE_PLAN_SETTINGS = ("weight", "image_first", "max_images", "keep_single_image", "start", "ramp")


class LoaderState(TypedDict):
    """The JSON in a checkpoint."""

    schema: int
    kind: str
    seed: int
    position: JsonObject
    total_windows: int | None
    tokenizer: str
    plan: JsonObject
    sources: dict[str, SourceState]


def plan_settings(settings: DataSettings, *, kind: str) -> JsonObject:
    """Every setting that decides which sample is at a position, as flat JSON."""
    names = PLAN_SETTINGS if kind == "packed" else ("mixing", "temperature", "shuffle_shards")
    source_names = SOURCE_PLAN_SETTINGS if kind == "packed" else ("weight", "ramp")
    plan = {name: getattr(settings, name) for name in names}
    for source in settings.sources:
        for name in source_names:
            value = getattr(source, name)
            plan[f"{source.name}.{name}"] = list(value) if isinstance(value, tuple) else value
    return plan


def make_state(
    settings: DataSettings,
    sources: Sequence[OpenSource],
    *,
    kind: str,
    position: Position,
    epoch: int,
    tokenizer: str,
    total_windows: int | None,
) -> LoaderState:
    """The state at a position. Without packing the position is one sample count."""
    redrawn = {source.name: number for source, number in zip(sources, position.redrawn) if number}
    where: JsonObject = {"sample": position.window * SLOTS + position.row}
    if kind == "packed":
        where = {"epoch": epoch, "window": position.window, "row": position.row, "redrawn": redrawn}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "seed": settings.seed,
        "position": where,
        "total_windows": total_windows,
        "tokenizer": tokenizer,
        "plan": plan_settings(settings, kind=kind),
        "sources": {source.name: source.state() for source in sources},
    }


def check_state(
    state: Any, current: LoaderState, sources: Sequence[OpenSource], *, is_change_allowed: bool
) -> None:
    """Compare a saved state with what the loader would save now.

    Raises UserError: not a state of this schema and kind; or, unless allowed, the first thing that changed, by name.
    """
    is_state = isinstance(state, dict) and state.get("schema") in (UNDRAWN_SCHEMA, SCHEMA)
    if not is_state or state.get("kind") != current["kind"]:
        found = (state.get("schema"), state.get("kind")) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"not a loader state of schema {SCHEMA} and kind {current['kind']!r}: found {found}")
    if missing := [key for key in current if key not in state]:
        raise UserError(f"the loader state lacks {', '.join(missing)}: it is damaged")
    if not (change := _difference(state, current, sources)):
        return
    if not is_change_allowed:
        raise UserError(
            f"the data is not what the checkpoint was trained on: {change}. Restore it, or set "
            "data.allow_data_change=true to go on from the same position in the new data (samples may then come twice "
            "or not at all)"
        )
    get_logger(__name__).warning("going on with changed data: %s", change)


def _difference(state: Mapping[str, Any], current: LoaderState, sources: Sequence[OpenSource]) -> str:
    for key, now in (("seed", current["seed"]), ("tokenizer", current["tokenizer"])):
        if state[key] != now:
            return f"{key} was {state[key]!r} and now is {now!r}"
    if list(state["sources"]) != list(current["sources"]):
        return f"sources were {', '.join(state['sources'])} and now are {', '.join(current['sources'])}"
    for key, value in current["plan"].items():
        if state["plan"].get(key) != value:
            return f"data setting {key} was {state['plan'].get(key)!r} and now is {value!r}"
    for source in sources:
        if change := source.difference(state["sources"][source.name]):
            return change
    return ""


def position_of(state: Mapping[str, Any], sources: Sequence[OpenSource]) -> Position:
    """Raises UserError when the position is not made of non-negative whole numbers."""
    is_packed = state["kind"] == "packed"
    wanted = ("window", "row") if is_packed else ("sample",)
    where: JsonObject = state["position"] if isinstance(state["position"], dict) else {}
    numbers = [where.get(name, -1) for name in wanted]
    redrawn: Any = where.get("redrawn") if is_packed and state["schema"] == SCHEMA else {}
    counts = redrawn.values() if isinstance(redrawn, dict) else [-1]
    if any(type(number) is not int or number < 0 for number in [*numbers, *counts]):
        names = ", ".join([*wanted, "redrawn by source"] if is_packed else wanted)
        raise UserError(
            f"the loader state has the position {state['position']!r}; it needs whole numbers {names}"
        )
    if not is_packed:
        return Position(*divmod(numbers[0], SLOTS))
    by_source = tuple(redrawn.get(source.name, 0) for source in sources)
    return Position(numbers[0], numbers[1], by_source if any(by_source) else ())
