"""What every source is made of: the interface, records and counted drops, and the way from raw records to documents."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from vlgpt.document import Document
from vlgpt.images import BadImage
from vlgpt.shards.samples import BadText, clean_text

ImageOpener = bytes | Path | Callable[[], bytes]
Columns = Mapping[str, Any]
"""A raw record: a JSON object or a row of a table, with values of any type."""
MAX_DEPTH = 100
Info = dict[str, Any]
"""`Document.info`, as JSON has it."""


@dataclass(frozen=True)
class Record:
    """One document and its images, still as found: the build opens, decodes and encodes them, not the source.

    `document.info` may carry numbers that filters read under these names: `similarity`, `aesthetic`,
    `watermark`, `nsfw`, `url`, `image_urls` and `similarities` (lists, one entry per image), and anything
    else that is worth keeping. `lost` holds the reasons for images that the source itself had to leave out
    of the document; the build counts them with those that cannot be decoded.
    """

    document: Document
    images: tuple[ImageOpener, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """An input record that gives no document: `reason` is one word with underscores, `key` names the record, `detail`
    tells people more.
    """

    reason: str
    key: str
    detail: str = field(default="", compare=False)


@runtime_checkable
class Source(Protocol):
    """A fixed, ordered list of input records, readable in pieces by any number of tasks."""

    licence: str
    """One line on licence and attribution, stored in the manifest."""

    def __len__(self) -> int:
        """The number of input records: the same at every call, on every machine."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Exactly `stop - start` items, always the same for the same range. Raises UserError for unreadable input."""
        ...


class BadRecord(Exception):
    """An input record that gives no document: `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class HasKey(Protocol):
    """A raw record that can be named to people."""

    @property
    def key(self) -> str: ...


Raw = TypeVar("Raw", bound=HasKey)
RawOut = TypeVar("RawOut", bound=HasKey, covariant=True)
Made = TypeVar("Made")


class Numbered(Protocol[RawOut]):
    """Raw records by number."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[RawOut | Dropped]:
        """Records `start ... stop - 1`."""
        ...


class Listed(Generic[Raw]):
    """Raw records that are held in memory."""

    def __init__(self, items: Sequence[Raw]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, start: int, stop: int) -> Iterator[Raw | Dropped]:
        """Records `start ... stop - 1`."""
        return iter(self.items[start:stop])


class ConvertingSource(ABC, Generic[Raw]):
    """A source that makes one document from each of its raw records. A subclass sets `records` and `make`."""

    records: Numbered[Raw]

    def __len__(self) -> int:
        return len(self.records)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One document each."""
        return convert(self.records.read(start, stop), self.make)

    @abstractmethod
    def make(self, raw: Raw) -> Record:
        """The document of a raw record. Raises BadRecord and BadImage, which become counted drops."""


def convert(items: Iterable[Raw | Dropped], make: Callable[[Raw], Made]) -> Iterator[Made | Dropped]:
    """One output for every item; BadRecord and BadImage from `make` become drops with their reason."""
    for item in items:
        if isinstance(item, Dropped):
            yield item
            continue
        try:
            yield make(item)
        except (BadRecord, BadImage) as error:
            yield Dropped(error.reason, item.key, error.detail)


def mapping(value: object) -> Columns:
    """The record itself. Raises BadRecord(`bad_row`)."""
    if not isinstance(value, dict):
        raise BadRecord("bad_row")
    return value


def text(value: Columns, *names: str, word: str) -> str:
    """The first of these fields that is there, stripped. Raises BadRecord(`no_`, `bad_` or `empty_` word)."""
    found = next((value[name] for name in names if value.get(name) is not None), None)
    if found is None:
        raise BadRecord(f"no_{word}")
    return cleaned(found, word=word)


def cleaned(value: object, *, word: str) -> str:
    """A text by the rules of `clean_text`. Raises BadRecord(`bad_` or `empty_` word), and quotes what it found."""
    try:
        return clean_text(value, word=word)
    except BadText as error:
        found = reprlib.repr(value) if isinstance(value, str) else type(value).__name__
        raise BadRecord(error.reason, f"found {found}") from error


def number(value: Columns, *names: str) -> float | int | None:
    """The first of these fields that is a finite number."""
    for name in names:
        found = value.get(name)
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        # the comparison is false for NaN too
        if is_number and abs(found) < float("inf"):  # type: ignore[arg-type]
            return found
    return None


def numbers(value: Columns, wanted: Mapping[str, tuple[str, ...]]) -> dict[str, float | int]:
    """Filter values for `Document.info`: name there -> fields accepted for it; only numbers are taken."""
    found = {name: number(value, *fields) for name, fields in wanted.items()}
    return {name: amount for name, amount in found.items() if amount is not None}


def storable(value: object, *, depth: int = 0) -> Any:
    """A value of a table as JSON can hold it, for `Document.info`: dates and the like become text, bytes and numbers
    that are not finite become null. Raises BadRecord(`bad_json`) for lists in a hundred lists.
    """
    if depth > MAX_DEPTH:
        raise BadRecord("bad_json")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): storable(item, depth=depth + 1) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item, depth=depth + 1) for item in value]
    return None if isinstance(value, bytes) else str(value)


def table_image(value: object) -> ImageOpener:
    """An image stored in a table: bytes, or `{"bytes": ..., "path": ...}`. Raises BadRecord(`no_image`)."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise BadRecord("no_image")
    return data
