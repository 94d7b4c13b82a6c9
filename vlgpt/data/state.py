"""The loader's state: a small JSON that says where the trainer stands and in which data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlgpt.data.mixture import SLOTS
from vlgpt.data.sources import OpenSource
from vlgpt.data.stream import Position
from vlgpt.log import UserError, get_logger
from vlgpt.settings import DataSettings

SCHEMA = 1
PLAN_SETTINGS = ("mixing", "temperature", "sequence_length", "packing", "shuffle_shards")
SOURCE_PLAN_SETTINGS = ("weight", "image_first", "max_images", "keep_single_image", "start", "ramp")


def plan_settings(settings: DataSettings, *, kind: str) -> dict[str, Any]:
    """Every setting that decides what stands at a position, as flat JSON."""
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
) -> dict[str, Any]:
    """The state at a position. Without packing the position is one sample count."""
    where: dict[str, int] = {"epoch": epoch, "window": position.window, "row": position.row}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "seed": settings.seed,
        "position": where if kind == "packed" else {"sample": position.window * SLOTS + position.row},
        "total_windows": total_windows,
        "tokenizer": tokenizer,
        "plan": plan_settings(settings, kind=kind),
        "sources": {source.name: source.state() for source in sources},
    }


def check_state(
    state: Any, current: dict[str, Any], sources: Sequence[OpenSource], *, is_change_allowed: bool
) -> None:
    """Compare a saved state with what the loader would save now.

    Raises UserError: not a state of this schema and kind; or, unless allowed, the first thing that changed,
    by name.
    """
    if not isinstance(state, dict) or state.get("schema") != SCHEMA or state.get("kind") != current["kind"]:
        found = (state.get("schema"), state.get("kind")) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"not a loader state of schema {SCHEMA} and kind {current['kind']!r}: found {found}")
    if missing := [key for key in current if key not in state]:
        raise UserError(f"the loader state lacks {', '.join(missing)}: it is damaged")
    if not (change := _difference(state, current, sources)):
        return
    if not is_change_allowed:
        raise UserError(
            f"the data is not what the checkpoint was trained on: {change}. Restore it, or set "
            "data.allow_data_change=true to go on from the same position in the new data (samples may then "
            "come twice "
            "or not at all)"
        )
    get_logger(__name__).warning("going on with changed data: %s", change)


def _difference(state: dict[str, Any], current: dict[str, Any], sources: Sequence[OpenSource]) -> str:
    for key in ("seed", "tokenizer"):
        if state[key] != current[key]:
            return f"{key} was {state[key]!r} and now is {current[key]!r}"
    if list(state["sources"]) != list(current["sources"]):
        return f"sources were {', '.join(state['sources'])} and now are {', '.join(current['sources'])}"
    for key, value in current["plan"].items():
        if state["plan"].get(key) != value:
            return f"data setting {key} was {state['plan'].get(key)!r} and now is {value!r}"
    for source in sources:
        if change := source.difference(state["sources"][source.name]):
            return change
    return ""


def position_of(state: dict[str, Any]) -> Position:
    """Raises UserError when the position is not made of non-negative whole numbers."""
    where = state["position"]
    wanted = ("window", "row") if state["kind"] == "packed" else ("sample",)
    numbers = [where[name] for name in wanted if isinstance(where, dict) and type(where.get(name)) is int]
    if len(numbers) < len(wanted) or min(numbers) < 0:
        raise UserError(
            f"the loader state has the position {where!r}; it needs whole numbers {', '.join(wanted)}"
        )
    return Position(*numbers) if len(numbers) == 2 else Position(*divmod(numbers[0], SLOTS))
