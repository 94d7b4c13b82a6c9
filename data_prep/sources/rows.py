"""Tables of any size as numbered rows, from JSON lines or CSV: only the places of the rows are held."""

from __future__ import annotations

import bisect
import csv
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from data_prep.sources import Dropped
from data_prep.sources.json_records import JsonRecord, JsonRecords, has_lines
from vlgpt.errors import UserError

Row = tuple[str, dict[str, Any]]


class Table(Protocol):
    """A numbered list of rows."""

    path: Path

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        """(key, columns) of every row; a row that is no object is Dropped."""
        ...


class JsonTable:
    """One JSON object per line; blank lines do not count."""

    def __init__(self, path: Path):
        self.path = path
        self._records = JsonRecords([path], source="table")

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        for item in self._records.read(start, stop):
            if isinstance(item, JsonRecord):
                is_row = isinstance(item.value, dict)
                yield (item.key, item.value) if is_row else Dropped("bad_row", item.key)
            else:
                yield item


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
    if has_lines(path):
        return JsonTable(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return CsvRows(path)
    raise UserError(f"{path}: tables end in .jsonl, .csv or .tsv, found {path.suffix!r}")
