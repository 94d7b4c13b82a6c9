"""Tables of any size as numbered rows: JSON lines and CSV, shared by several sources.

Only the places of the rows are held in memory, so a file of 100 million lines costs 0.8 GB and can be read
from any row.
"""

from __future__ import annotations

import bisect
import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.sources import Dropped
from vlgpt.log import UserError

CHUNK_BYTES = 16 << 20
MAX_ROW_BYTES = 64 << 20
Row = tuple[str, dict[str, Any]]


class Table(Protocol):
    """A numbered list of rows."""

    path: Path

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        """(key, columns) of every row; a row that is no object is Dropped."""
        ...


class JsonLines:
    """One JSON object per line; empty lines do not count."""

    def __init__(self, path: Path):
        self.path = path
        ends = [np.zeros(0, np.int64)]
        with path.open("rb") as file:
            position = 0
            while chunk := file.read(CHUNK_BYTES):
                ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position + 1)
                position += len(chunk)
        stops = np.concatenate(ends)
        if not len(stops) or stops[-1] != position:
            stops = np.append(stops, position)
        starts = np.concatenate([[0], stops[:-1]])
        is_row = stops - starts > 2  # shorter lines hold no object, at most a line end
        self._starts, self._stops = starts[is_row], stops[is_row]

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        with self.path.open("rb") as file:
            for number in range(start, stop):
                key, first, end = (
                    f"{self.path.name}:{number}",
                    int(self._starts[number]),
                    int(self._stops[number]),
                )
                if end - first > MAX_ROW_BYTES:
                    yield Dropped("row_too_long", key)
                    continue
                file.seek(first)
                yield _parse(file.read(end - first), key)


def _parse(line: bytes, key: str) -> Row | Dropped:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Dropped("text_not_utf8", key)
    except (ValueError, RecursionError):
        return Dropped("bad_json", key)
    return (key, row) if isinstance(row, dict) else Dropped("bad_row", key)


class CsvRows:
    """CSV or TSV with a header line. Quoted fields may hold line breaks."""

    def __init__(self, path: Path):
        self.path = path
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = self._scan()
        header, _, _ = next(rows, ([], 0, 0))
        self._columns = [name.strip().removeprefix("\ufeff") for name in header]
        self._places = [(first, end) for row, first, end in rows if row]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        with self.path.open("rb") as file:
            for number in range(start, stop):
                key = f"{self.path.name}:{number}"
                first, end = self._places[number]
                file.seek(first)
                data = file.read(end - first)
                try:
                    lines = io.StringIO(data.decode("utf-8"), newline="")
                    values = next(csv.reader(lines, delimiter=self._delimiter), [])
                except UnicodeDecodeError:
                    yield Dropped("text_not_utf8", key)
                    continue
                except csv.Error:
                    yield Dropped("bad_row", key)
                    continue
                fits = len(values) == len(self._columns)
                yield (key, dict(zip(self._columns, values))) if fits else Dropped("bad_row", key)

    def _scan(self) -> Iterator[tuple[list[str], int, int]]:
        """Every row with the place of its first byte and the one after its last; empty lines are empty
        rows.
        """
        with self.path.open("rb") as file:
            lines = (line.decode("utf-8", "replace") for line in iter(file.readline, b""))
            reader = csv.reader(lines, delimiter=self._delimiter)
            first = 0
            while True:
                try:
                    row = next(reader, None)
                except csv.Error:
                    row = ["damaged"]  # read again, and counted, when its turn comes
                if row is None:
                    return
                yield row, first, file.tell()
                first = file.tell()


class Rows:
    """Several tables, one after the other."""

    def __init__(self, tables: Sequence[Table]):
        self.tables = list(tables)
        self._starts = [0, *itertools.accumulate(len(table) for table in self.tables)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Iterator[tuple[Table, Row | Dropped]]:
        """Every row with the table it stands in."""
        while start < stop:
            number = bisect.bisect_right(self._starts, start) - 1
            end = min(stop, self._starts[number + 1])
            offset = self._starts[number]
            for row in self.tables[number].read(start - offset, end - offset):
                yield self.tables[number], row
            start = end


def open_table(path: Path) -> Table:
    """By suffix. Raises UserError for another one."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return CsvRows(path)
    raise UserError(f"{path}: tables end in .jsonl, .csv or .tsv, found {path.suffix!r}")


def find_files(inputs: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """Files with these suffixes (any case) in the inputs, folders searched in depth, in a fixed order."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            found += sorted(inside, key=lambda file: file.relative_to(path).as_posix())
        else:
            found.append(path)
    return found


def inside(folder: Path, name: str) -> Path | None:
    """`folder/name`, or None when the name leads out of the folder (names come from strangers)."""
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # null bytes, link loops
        return None
    return path if is_inside else None
