"""Records of files by number: JSON Lines and JSON lists (also .zip and .gz), CSV, TSV, Parquet and Arrow.

A text file is read once to find where its records lie; for JSON these offsets are kept beside it, so that any range is
then read with one seek. Tables are read in small batches of rows.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Generic

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.base import Dropped, Numbered, Raw
from data_prep.sources.inputs import InputFile, find_files, kept_arrays, require_keys, split_range
from vlgpt.errors import UserError

LINES = (".jsonl", ".ndjson")
"""Files with these names hold one value per line, whatever the first line begins with."""
JSON_SUFFIXES = tuple(f"{kind}{packing}" for packing in ("", ".zip", ".gz") for kind in (*LINES, ".json"))
TABLE_SUFFIXES = (".parquet", ".arrow")
FIRST_RECORDS = 100
CHUNK_BYTES = 4 << 20
BLOCK_BYTES = 16 << 20
MAX_RECORD_BYTES = 64 << 20
MAX_VALUE_CHARS = 128 << 20
IN_MEMORY_BYTES = 64 << 20
BATCH_ROWS = 32
"""Of a table: rows with images weigh megabytes each."""
IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as found. `part` counts from 0 where one JSON value holds several records."""

    key: str
    value: Any
    file: InputFile
    part: int = 0


class Concatenation(Generic[Raw]):
    """The records of several files, one after the other."""

    def __init__(self, parts: Sequence[Numbered[Raw]]):
        self.parts = parts
        self._starts = [0, *itertools.accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> Iterator[Raw | Dropped]:
        """Records `start ... stop - 1`."""
        for place, first, end in split_range(self._starts, start, stop):
            yield from self.parts[place].read(first, end)


# --- JSON


class JsonRecords(Concatenation[RawRecord]):
    """All records of JSON files. `count` tells how many records a JSON value holds (its name, `kind`, keeps the stored
    offsets of different sources apart).
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        source: str,
        kind: str = "records",
        count: Callable[[object], int] | None = None,
    ):
        self.files = find_files(inputs, JSON_SUFFIXES, source=source)
        super().__init__([JsonFile(file, kind=kind, count=count) for file in self.files])

    def first(self) -> RawRecord:
        """The first record that is JSON. Raises UserError when there is none among the first hundred."""
        for item in self.read(0, min(FIRST_RECORDS, len(self))):
            if isinstance(item, RawRecord):
                return item
        raise UserError(f"{self.files[0].path} holds no JSON records")


class JsonFile:
    """The records of one JSON file; text that is no JSON is dropped as `bad_json` or `text_not_utf8`."""

    def __init__(
        self, file: InputFile, *, kind: str = "records", count: Callable[[object], int] | None = None
    ):
        self.file = file
        arrays = kept_arrays(
            file.path,
            kind=kind,
            names=("start", "stop", "first_record"),
            make=partial(_index, file.path, count=count),
        )
        # a memory map holds its file open, and there may be thousands of small files; large ones stay mapped
        self._starts, self._stops, self._first_record = (
            array if array.nbytes > IN_MEMORY_BYTES else np.array(array) for array in arrays
        )

    def __len__(self) -> int:
        return int(self._first_record[-1])

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Records `start ... stop - 1`."""
        value_number = int(np.searchsorted(self._first_record, start, side="right")) - 1
        with open_binary(self.file.path) as stream:
            while start < stop:
                first, after = self._first_record[value_number : value_number + 2].tolist()
                value, reason = _read_value(
                    stream, int(self._starts[value_number]), int(self._stops[value_number])
                )
                for number in range(start, min(stop, after)):
                    part = number - first
                    key = f"{self.file.name}:{value_number}" + (f":{part}" if after - first > 1 else "")
                    yield Dropped(reason, key) if reason else RawRecord(key, value, self.file, part)
                start, value_number = min(stop, after), value_number + 1


def _read_value(stream: IO[bytes], start: int, stop: int) -> tuple[object, str]:
    """(value, "") or (None, reason)."""
    if stop - start > MAX_RECORD_BYTES:
        return None, "record_too_long"
    stream.seek(start)
    try:
        return json.loads(stream.read(stop - start).decode("utf-8-sig")), ""
    except UnicodeDecodeError:
        return None, "text_not_utf8"
    except (ValueError, RecursionError):
        return None, "bad_json"


def open_binary(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked if its name ends in .gz or .zip (one file inside). Raises UserError."""
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix != ".zip":
            return path.open("rb")
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if len(names) != 1:
                raise UserError(f"{path} must hold one file, found {len(names)}: {', '.join(names[:5])}")
            return archive.open(names[0])
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no zip file or is cut: {error}; download it again") from error


def _index(path: Path, *, count: Callable[[object], int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte ranges of the JSON values and running number of records: -> (n,), (n,), (n + 1,)."""

    def num_records(value: object) -> int:
        # what is no JSON counts as one record, so that it can be dropped
        return 1 if count is None or value is None else count(value)

    try:
        with open_binary(path) as stream:
            is_list = not has_lines(path) and _first_byte(stream) == b"["
            stream.seek(0)
            if is_list:
                places = [
                    (start, stop, num_records(value)) for start, stop, value in _list_values(stream, path)
                ]
                starts, stops, counts = np.array(places, np.int64).reshape(-1, 3).T
            else:
                starts, stops = _lines(stream)
                counts = np.ones(len(starts), np.int64)
                for number in range(len(starts)) if count is not None else ():
                    value, _ = _read_value(stream, int(starts[number]), int(stops[number]))
                    counts[number] = num_records(value)
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut or damaged: {error}; download it again") from error
    return starts, stops, np.concatenate([[0], np.cumsum(counts)])


def has_lines(path: Path) -> bool:
    """Whether the name says JSON Lines."""
    return path.name.lower().removesuffix(".zip").removesuffix(".gz").endswith(LINES)


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)) and (byte.isspace() or byte in b"\xef\xbb\xbf"):
        continue
    return byte


def _lines(stream: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines lie that are not blank, found by array operations, a chunk at a time. -> (n,), (n,) int64"""
    ends, letters = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    position = num_letters = 0
    while chunk := stream.read(CHUNK_BYTES):
        values = np.frombuffer(chunk, np.uint8)
        running = np.cumsum(~IS_SPACE[values], dtype=np.int32)
        breaks = np.flatnonzero(values == ord("\n"))
        ends.append(breaks + position + 1)
        letters.append(running[breaks].astype(np.int64) + num_letters)
        position, num_letters = position + len(chunk), num_letters + int(running[-1])
    stops = np.concatenate([*ends, [position]])
    up_to = np.concatenate([*letters, [num_letters]])
    is_filled = np.diff(up_to, prepend=0) > 0
    starts = np.concatenate([[0], stops[:-1]])
    return starts[is_filled], stops[is_filled]


def _list_values(stream: IO[bytes], path: Path) -> Iterator[tuple[int, int, object]]:
    """The values of one long JSON list with their byte ranges, parsed block by block: no more of the file is held.

    Raises UserError where the list is no JSON.
    """
    decoder, pending = json.JSONDecoder(), _Pending(stream, path)
    pending.skip("[\ufeff")
    while True:
        pending.skip(",")
        if pending.text.startswith("]", pending.at):
            return
        try:
            value, end = decoder.raw_decode(pending.text, pending.at)
        except (json.JSONDecodeError, RecursionError) as error:
            if not pending.read_more():
                raise UserError(
                    f"{path} is no JSON list: at byte {pending.offset}: {error}; download it again"
                ) from error
            continue
        start = pending.offset
        pending.move(end)
        yield start, pending.offset, value


class _Pending:
    """Decoded text of a stream that is still to be parsed; `offset` is the byte at which `text[at]` lies."""

    def __init__(self, stream: IO[bytes], path: Path):
        self.text, self.at, self.offset = "", 0, 0
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._is_ascii = True

    def skip(self, separators: str) -> None:
        """Go to the next character that is neither white space nor a separator."""
        while True:
            end = self.at
            while end < len(self.text) and (self.text[end].isspace() or self.text[end] in separators):
                end += 1
            self.move(end)
            if self.at < len(self.text) or not self.read_more():
                return

    def move(self, at: int) -> None:
        """Go on to character `at`."""
        passed = at - self.at if self._is_ascii else len(self.text[self.at : at].encode())
        self.at, self.offset = at, self.offset + passed

    def read_more(self) -> bool:
        """Append a block; False at the end of the file, or when a value is larger than any record can be."""
        if len(self.text) - self.at > MAX_VALUE_CHARS:
            return False
        try:
            block = self._stream.read(BLOCK_BYTES)
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path} is not UTF-8 text near byte {self.offset}: {error.reason}"
            ) from error
        self.text, self.at = self.text[self.at :] + more, 0
        self._is_ascii = self.text.isascii()
        return bool(block)


# --- CSV and TSV


class CsvFile:
    """The rows of a CSV or TSV file with a header line. Quoted fields may hold line breaks."""

    def __init__(self, path: Path):
        self.file = InputFile(path, path.name)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = self._scan()
        header, _, _ = next(rows, ([], 0, 0))
        self._columns = [name.strip().removeprefix("\ufeff") for name in header]
        self._places = [(first, end) for row, first, end in rows if row]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Rows `start ... stop - 1`; one with another number of fields than the header is dropped as `bad_row`."""
        with self.file.path.open("rb") as file:
            for number in range(start, stop):
                key = f"{self.file.name}:{number}"
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
                    values = []
                if len(values) == len(self._columns):
                    yield RawRecord(key, dict(zip(self._columns, values)), self.file)
                else:
                    yield Dropped("bad_row", key)

    def _scan(self) -> Iterator[tuple[list[str], int, int]]:
        """Every row with the place of its first byte and the one after its last; empty lines are empty rows."""
        with self.file.path.open("rb") as file:
            lines = (line.decode("utf-8", "replace") for line in iter(file.readline, b""))
            reader = csv.reader(lines, delimiter=self._delimiter)
            first = 0
            while True:
                try:
                    row = next(reader, None)
                except csv.Error:
                    # not empty, so that it counts: it is read again, and dropped, when its turn comes
                    row = ["damaged"]
                if row is None:
                    return
                yield row, first, file.tell()
                first = file.tell()


def open_rows(path: Path) -> Numbered[RawRecord]:
    """A table in a text file, by suffix. Raises UserError for another one."""
    if has_lines(path):
        return JsonRecords([path], source="table")
    if path.suffix.lower() in (".csv", ".tsv"):
        return CsvFile(path)
    raise UserError(f"{path}: tables end in .jsonl, .csv or .tsv, found {path.suffix!r}")


# --- Parquet and Arrow


class TableRows(Concatenation[RawRecord]):
    """All rows of Parquet or Arrow files. Only the wanted columns are read.

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
        self.files = find_files(inputs, TABLE_SUFFIXES, source=source)
        accepted = {name for names in wanted.values() for name in names}.union(optional)
        for file in self.files:
            require_keys(table_layout(file.path)[0], wanted, where=file.path, what=what)
        super().__init__([TableFile(file, accepted) for file in self.files])

    def column(self, name: str) -> list[Any]:
        """One whole column over all files: for columns of small values only."""
        values: list[object] = []
        for file in self.files:
            for batch in table_batches(file.path, (name,)):
                values += batch[name].to_pylist()
        return values


class TableFile:
    """The rows of one Parquet or Arrow file; one with text that is not UTF-8 is dropped."""

    def __init__(self, file: InputFile, accepted: set[str]):
        columns, group_rows = table_layout(file.path)
        self.file, self._columns = file, [column for column in columns if column in accepted]
        self._group_starts = [0, *itertools.accumulate(group_rows)]

    def __len__(self) -> int:
        return self._group_starts[-1]

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Rows `start ... stop - 1`."""
        group = bisect.bisect_right(self._group_starts, start) - 1
        while start < stop:
            row = self._group_starts[group]
            for batch in _batches(self.file.path, group, self._columns, BATCH_ROWS):
                if row + batch.num_rows > start:
                    for number in range(max(start, row), min(stop, row + batch.num_rows)):
                        yield self._row(batch, number - row, number)
                    start = min(stop, row + batch.num_rows)
                row += batch.num_rows
                if start >= stop:
                    return
            group += 1

    def _row(self, batch: pa.RecordBatch, place: int, number: int) -> RawRecord | Dropped:
        key = f"{self.file.name}:{number}"
        try:
            return RawRecord(key, batch.slice(place, 1).to_pylist()[0], self.file)
        except UnicodeDecodeError:
            return Dropped("text_not_utf8", key)


class RowCursor:
    """Rows by number, cheap when they are asked for nearly in order: what lies between is read over."""

    def __init__(self, rows: TableRows):
        self._rows, self._next = rows, 0
        self._stream: Iterator[RawRecord | Dropped] = iter(())
        self._stop = 0

    def row(self, number: int) -> RawRecord | Dropped:
        """One row."""
        if not self._next <= number < min(self._next + BATCH_ROWS, self._stop):
            self._next, self._stop = number, len(self._rows)
            self._stream = self._rows.read(number, self._stop)
        for _ in range(number - self._next):
            next(self._stream)
        self._next = number + 1
        return next(self._stream)


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
