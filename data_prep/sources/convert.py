"""From a raw record to a `Record` or a counted drop: what the readers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from data_prep.sources import Dropped, ImageOpener, Record
from vlgpt.images import BadImage


class BadRecord(Exception):
    """An input record that gives no document: `reason` is one word to count by."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class HasKey(Protocol):
    """A raw record that can be named to people."""

    @property
    def key(self) -> str: ...


Raw = TypeVar("Raw", bound=HasKey)


def convert(items: Iterable[Raw | Dropped], make: Callable[[Raw], Record]) -> Iterator[Record | Dropped]:
    """One output for every item; BadRecord and BadImage from `make` become drops with their reason."""
    for item in items:
        if isinstance(item, Dropped):
            yield item
            continue
        try:
            yield make(item)
        except (BadRecord, BadImage) as error:
            yield Dropped(error.reason, item.key)


def mapping(value: Any) -> Mapping[str, Any]:
    """The record itself. Raises BadRecord(`bad_row`)."""
    if not isinstance(value, dict):
        raise BadRecord("bad_row")
    return value


def text(value: Mapping[str, Any], *names: str, word: str) -> str:
    """The first of these fields that is there, stripped. Raises BadRecord(`no_`, `bad_` or `empty_` word)."""
    found = next((value[name] for name in names if value.get(name) is not None), None)
    if found is None:
        raise BadRecord(f"no_{word}")
    if not isinstance(found, str):
        raise BadRecord(f"bad_{word}")
    if not found.strip():
        raise BadRecord(f"empty_{word}")
    return found.strip()


def number(value: Mapping[str, Any], *names: str) -> float | int | None:
    """The first of these fields that is a finite number."""
    for name in names:
        found = value.get(name)
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if is_number and abs(found) < float("inf"):  # type: ignore[arg-type]  # false for NaN too
            return found
    return None


def numbers(value: Mapping[str, Any], wanted: Mapping[str, tuple[str, ...]]) -> dict[str, float | int]:
    """Filter values for `Document.info`: name there -> fields accepted for it; only numbers are taken."""
    found = {name: number(value, *fields) for name, fields in wanted.items()}
    return {name: amount for name, amount in found.items() if amount is not None}


def table_image(value: Any) -> ImageOpener:
    """A picture stored in a table: bytes, or `{"bytes": ..., "path": ...}`. Raises BadRecord(`no_image`)."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadRecord("no_image")
    return data
