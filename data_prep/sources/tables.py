"""Rows of Parquet and Arrow files by number, read in small batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources import Dropped
from data_prep.sources.inputs import InputFile, find_files, require_keys, split_range
from vlgpt.errors import UserError

SUFFIXES = (".parquet", ".arrow")
BATCH_ROWS = 32
"""Rows with pictures weigh megabytes each."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as a dictionary."""

    key: str
    value: dict[str, Any]
    file: InputFile


class TableRows:
    """All rows of the files in order. Only the wanted columns are read.

    `wanted` maps what is needed to the column names accepted for it, `optional` are columns taken if there.
    Raises UserError for a file that is no table or lacks a wanted column, naming the columns found.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        wanted: Mapping[str, Sequence[str]],
        *,
        optional: Sequence[str] = (),
        source: str,
        what: str,
    ):
        self.files = find_files(inputs, SUFFIXES, source=source)
        accepted = {name for names in wanted.values() for name in names}.union(optional)
        self._columns: list[list[str]] = []
        self._group_starts: list[list[int]] = []
        totals = []
        for file in self.files:
            columns, group_rows = table_layout(file.path)
            require_keys(columns, wanted, where=file.path, what=what)
            self._columns.append([column for column in columns if column in accepted])
            self._group_starts.append([0, *itertools.accumulate(group_rows)])
            totals.append(sum(group_rows))
        self._file_starts = [0, *itertools.accumulate(totals)]

    def __len__(self) -> int:
        return self._file_starts[-1]

    def read(self, start: int, stop: int) -> Iterator[Row | Dropped]:
        """Rows `start ... stop - 1`; a row with text that is not UTF-8 is dropped."""
        for place, first, end in split_range(self._file_starts, start, stop):
            yield from self._read_file(place, first, end)

    def column(self, name: str) -> list[Any]:
        """One whole column over all files: for columns of small values only."""
        values: list[Any] = []
        for file in self.files:
            for batch in table_batches(file.path, (name,)):
                values += batch[name].to_pylist()
        return values

    def _read_file(self, place: int, start: int, stop: int) -> Iterator[Row | Dropped]:
        file, groups = self.files[place], self._group_starts[place]
        group = bisect.bisect_right(groups, start) - 1
        while start < stop:
            row = groups[group]
            for batch in _batches(file.path, group, self._columns[place], BATCH_ROWS):
                if row + batch.num_rows > start:
                    for number in range(max(start, row), min(stop, row + batch.num_rows)):
                        yield _row(batch, number - row, f"{file.name}:{number}", file)
                    start = min(stop, row + batch.num_rows)
                row += batch.num_rows
                if start >= stop:
                    return
            group += 1


class RowCursor:
    """Rows by number, cheap when they are asked for nearly in order: what lies between is read over."""

    def __init__(self, rows: TableRows):
        self._rows, self._next = rows, 0
        self._stream: Iterator[Row | Dropped] = iter(())
        self._stop = 0

    def row(self, number: int) -> Row | Dropped:
        """One row."""
        if not self._next <= number < min(self._next + BATCH_ROWS, self._stop):
            self._next, self._stop = number, len(self._rows)
            self._stream = self._rows.read(number, self._stop)
        for _ in range(number - self._next):
            next(self._stream)
        self._next = number + 1
        return next(self._stream)


def _row(batch: pa.RecordBatch, place: int, key: str, file: InputFile) -> Row | Dropped:
    try:
        return Row(key, batch.slice(place, 1).to_pylist()[0], file)
    except UnicodeDecodeError:
        return Dropped("text_not_utf8", key)


@lru_cache(maxsize=65_536)
def table_layout(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Column names and rows per row group (or Arrow batch). Raises UserError for a file that is no table."""
    try:
        if path.suffix == ".arrow":
            batches, schema = _arrow_batches(path)
            return tuple(schema.names), tuple(batch.num_rows for batch in batches)
        with pq.ParquetFile(path) as file:
            groups = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            return tuple(file.schema_arrow.names), tuple(groups)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no Parquet or Arrow table, or is cut: {reason}") from error


def _arrow_batches(path: Path) -> tuple[list[pa.RecordBatch], pa.Schema]:
    """Memory-mapped batches of an Arrow file or stream (`datasets` writes streams)."""
    with pa.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(path)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)], reader.schema
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        return list(stream), stream.schema


def table_batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """All rows of these columns, thousands at a time. Raises UserError when the data are damaged."""
    for group in range(len(table_layout(path)[1])):
        yield from _batches(path, group, columns, BATCH_ROWS * 128)


def _batches(path: Path, group: int, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The rows of one row group. Raises UserError when the data are damaged."""
    try:
        if path.suffix == ".arrow":
            batch = _arrow_batches(path)[0][group].select(list(columns))
            yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))
            return
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, row_groups=[group], columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}, row group {group}, is damaged: {reason}; download the file again"
        ) from error
