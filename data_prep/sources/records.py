"""Records of files by number: JSON in its many layouts (also .zip and .gz), Parquet and Arrow.

A JSON file is read once to find where its records lie; these offsets are kept beside it, so that any range is then
read with one seek. Tables are read in small batches of rows. CSV is in csv_rows.py.
"""

from __future__ import annotations

import bisect
import codecs
import gzip
import itertools
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from string import whitespace
from typing import IO, Any, Generic

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.base import Dropped, Numbered, Raw
from data_prep.sources.inputs import InputFile, find_files, kept_arrays, require_keys, split_range
from vlgpt.errors import UserError

LINES = (".jsonl", ".ndjson")
"""Files with these names hold one value per line, if they do not begin with a list of objects."""
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
SHOWN_BYTES = 40
SEPARATORS = ",\ufeff"
"""What may stand between the values of a file, besides white space."""
JSON = json.JSONDecoder()
NUMBER = re.compile(r"[-+.\w]*")
LETTER = re.compile(r"\s*(\S)")
BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
"""A string, or a bracket outside of strings."""
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
        """The first record that is an object. Raises UserError when there is none among the first hundred."""
        items = list(self.read(0, min(FIRST_RECORDS, len(self))))
        for item in items:
            if isinstance(item, RawRecord) and isinstance(item.value, dict):
                return item
        path = self.files[0].path
        if not items:
            raise UserError(f"{path} holds no JSON records: it is empty")
        reason = items[0].reason if isinstance(items[0], Dropped) else "no object"
        raise UserError(f"{path} holds no JSON records: it begins with {_beginning(path)!r} ({reason})")


class JsonFile:
    """The records of one JSON file; text that is no JSON is dropped as `bad_json` or `text_not_utf8`."""

    def __init__(
        self, file: InputFile, *, kind: str = "records", count: Callable[[object], int] | None = None
    ):
        self.file = file
        arrays = kept_arrays(
            file.path,
            # the number changes when other records are found in the same file
            kind=f"{kind}.2",
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
        with open_text(self.file.path) as stream:
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
        if path.suffix.lower() == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        if path.suffix.lower() != ".zip":
            return path.open("rb")
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not _is_mac(name)]
            if len(names) != 1:
                raise UserError(f"{path} must hold one file, found {len(names)}: {', '.join(names[:5])}")
            return archive.open(names[0])
    except (zipfile.BadZipFile, RuntimeError) as error:  # the second: one with a password
        raise UserError(
            f"{path} is no zip file that can be read, or is cut: {error}; download it again"
        ) from error


def _is_mac(name: str) -> bool:
    """Whether macOS added this member to an archive."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._")


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """`open_binary` for a file that should be UTF-8. Raises UserError for UTF-16, and while a packed file that is cut
    or damaged is read.
    """
    try:
        with open_binary(path) as stream:
            start = stream.read(2)
            if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in start:
                raise UserError(
                    f"{path} is not UTF-8 text, it begins as UTF-16 does ({start!r}); write it again as UTF-8: "
                    f"iconv -f UTF-16 -t UTF-8 {path.name} > NEW"
                )
            stream.seek(0)
            yield stream
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut or damaged: {error}; download it again") from error


def _beginning(path: Path) -> str:
    with open_text(path) as stream:
        return stream.read(SHOWN_BYTES).decode("utf-8", "replace").lstrip("\ufeff").strip()


def _index(path: Path, *, count: Callable[[object], int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte ranges of the JSON values and running number of records: -> (n,), (n,), (n + 1,)."""

    def num_records(value: object) -> int:
        # what is no JSON counts as one record, so that it can be dropped
        return 1 if count is None or value is None else count(value)

    with open_text(path) as stream:
        # lines are found without parsing them, and a damaged one does not hide the others
        if _is_lines(stream, path):
            starts, stops = find_lines(stream)
            counts = np.ones(len(starts), np.int64)
            for number in range(len(starts)) if count is not None else ():
                value, _ = _read_value(stream, int(starts[number]), int(stops[number]))
                counts[number] = num_records(value)
        else:
            stream.seek(0)
            places = [(start, stop, num_records(value)) for start, stop, value in _values(stream, path)]
            starts, stops, counts = np.array(places, np.int64).reshape(-1, 3).T
    return starts, stops, np.concatenate([[0], np.cumsum(counts)])


def has_lines(path: Path) -> bool:
    """Whether the name says JSON Lines."""
    return path.name.lower().removesuffix(".zip").removesuffix(".gz").endswith(LINES)


def _is_lines(stream: IO[bytes], path: Path) -> bool:
    """Whether each line holds one value: else values stand one after the other, in a list or with line breaks inside.

    The file's name and its first value decide.
    """
    head = stream.read(CHUNK_BYTES).decode("utf-8", "replace").lstrip(SEPARATORS + whitespace)
    if head.startswith("["):
        return has_lines(path) and re.match(r"\[\s*{", head) is None
    try:
        _, end = JSON.raw_decode(head)
    except (ValueError, RecursionError):
        return True
    same_line = re.split(r"[\r\n]", head[end : end + SHOWN_BYTES])[0].strip()
    return re.search(r"[\r\n]", head[:end]) is None and same_line[:1] not in ("{", "[", ",")


def line_end(stream: IO[bytes]) -> bytes:
    """What the first line ends with, CR (old Macs) or LF. Reads from the start of the stream, and goes back there."""
    stream.seek(0)
    start = stream.read(CHUNK_BYTES)
    stream.seek(0)
    place = start.find(b"\r")
    return b"\r" if place >= 0 and b"\n" not in start[: place + 2] else b"\n"


def find_lines(stream: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines lie that are not blank, found by array operations, a chunk at a time. -> (n,), (n,) int64"""
    end = line_end(stream)
    ends, letters = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    position = num_letters = 0
    while chunk := stream.read(CHUNK_BYTES):
        values = np.frombuffer(chunk, np.uint8)
        running = np.cumsum(~IS_SPACE[values], dtype=np.int32)
        breaks = np.flatnonzero(values == ord(end))
        ends.append(breaks + position + 1)
        letters.append(running[breaks].astype(np.int64) + num_letters)
        position, num_letters = position + len(chunk), num_letters + int(running[-1])
    stops = np.concatenate([*ends, [position]])
    up_to = np.concatenate([*letters, [num_letters]])
    is_filled = np.diff(up_to, prepend=0) > 0
    starts = np.concatenate([[0], stops[:-1]])
    return starts[is_filled], stops[is_filled]


def _values(stream: IO[bytes], path: Path) -> Iterator[tuple[int, int, object]]:
    """The values of a JSON file with their byte ranges, parsed block by block: no more of the file is held.

    Lists are opened: a list in a list if it holds lists or objects. Several lists or objects may follow each other, as
    `cat` joins them, and commas may be too many or too few. Raises UserError where the text is no JSON or ends
    within a list.
    """
    pending, depth = _Pending(stream, path), 0
    while True:
        pending.skip(SEPARATORS)
        letter = pending.text[pending.at : pending.at + 1]
        if not letter and depth:
            raise UserError(
                f"{path} is cut: it ends at byte {pending.offset} within a list; download it again"
            )
        if not letter:
            return
        if letter == "[" and (depth == 0 or pending.after_bracket() in ("[", "{")):
            depth += 1
            pending.move(pending.at + 1)
        elif letter == "]" and depth:
            depth -= 1
            pending.move(pending.at + 1)
        else:
            start = pending.offset
            value, end = pending.parse()
            pending.move(end)
            yield start, pending.offset, value


class _Pending:
    """Decoded text of a stream that is still to be parsed; `offset` is the byte at which `text[at]` lies."""

    def __init__(self, stream: IO[bytes], path: Path):
        self.text, self.at, self.offset = "", 0, 0
        self._stream, self._path = stream, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_bytes = 0
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

    def after_bracket(self) -> str:
        """The first letter within the list that begins here."""
        while (found := LETTER.match(self.text, self.at + 1)) is None and self.read_more():
            continue
        return found[1] if found else ""

    def parse(self) -> tuple[object, int]:
        """The value that begins here and the character after it; a value that Python refuses (numbers of thousands of
        digits, lists in thousands of lists) is None. Raises UserError when there is no whole value.
        """
        error: Exception | None = None
        while True:
            try:
                value, end = JSON.raw_decode(self.text, self.at)
                if end < len(self.text):
                    return value, end
            except json.JSONDecodeError as refusal:
                error, value, end = refusal, None, 0
            except (ValueError, RecursionError) as refusal:
                error, value, end = refusal, None, _end_of_value(self.text, self.at)
            # a number may go on in the next block
            if 0 < end < len(self.text) or not self.read_more():
                break
        if end:
            return value, end
        found = self.text[self.at : self.at + SHOWN_BYTES]
        reason = (
            "is cut or no JSON" if len(self.text) - self.at <= MAX_VALUE_CHARS else "holds a value too long"
        )
        raise UserError(
            f"{self._path} {reason}: {found!r} at byte {self.offset}: {error}; repair it there, or download it again"
        ) from error

    def read_more(self) -> bool:
        """Append a block; False at the end of the file, or when a value is larger than any record can be."""
        if len(self.text) - self.at > MAX_VALUE_CHARS:
            return False
        block = self._stream.read(BLOCK_BYTES)
        kept = len(self._decoder.getstate()[0])
        try:
            more = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = self._num_bytes - kept + error.start
            raise UserError(f"{self._path} is not UTF-8 text at byte {place}: {error.reason}") from error
        if not block:
            return False
        self._num_bytes += len(block)
        self.text, self.at = self.text[self.at :] + more, 0
        self._is_ascii = self.text.isascii()
        return True


def _end_of_value(text: str, start: int) -> int:
    """The character after the object, list or number that begins at `start`; 0 if it has no end."""
    if text[start] not in "[{":
        return NUMBER.match(text, start).end()  # type: ignore[union-attr]
    depth = 0
    for found in BRACKETS.finditer(text, start):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth == 0:
            return found.end()
    return 0


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
            if row != self._group_starts[group]:
                raise UserError(
                    f"{self.file.path}, row group {group - 1}, ends {self._group_starts[group] - row} rows before its "
                    "stated size; download the file again"
                )

    def _row(self, batch: pa.RecordBatch, place: int, number: int) -> RawRecord | Dropped:
        key = f"{self.file.name}:{number}"
        try:
            return RawRecord(key, batch.slice(place, 1).to_pylist()[0], self.file)
        except UnicodeDecodeError:
            return Dropped("text_not_utf8", key)
        except (ValueError, OverflowError):  # a date that Python does not have
            return Dropped("bad_row", key)


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
        if path.suffix.lower() == ".arrow":
            batches, schema = _arrow_batches(path)
            groups = [batch.num_rows for batch in batches]
        else:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is no Parquet or Arrow table, or is cut: {reason}") from error
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise UserError(f"{path} names the column {twice[0]!r} twice; rename one")
    return tuple(schema.names), tuple(groups)


@lru_cache(maxsize=1024)
def table_schema(path: Path) -> pa.Schema:
    """Column names and types. Raises UserError for a file that is no table."""
    table_layout(path)
    return _arrow_batches(path)[1] if path.suffix.lower() == ".arrow" else pq.read_schema(path)


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that can hold images: `{"bytes", "path"}` as `datasets` writes it, bytes, or lists of either."""
    return [
        field.name
        for field in schema
        if _has_bytes(_item_type(field.type)) or _is_bytes(_item_type(field.type))
    ]


def text_columns(schema: pa.Schema) -> list[str]:
    """Columns of strings, or lists of strings."""
    return [field.name for field in schema if is_string(_item_type(field.type))]


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        kind.field(place).name == "bytes" for place in range(kind.num_fields)
    )


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _item_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if is_list(kind) or pa.types.is_dictionary(kind) else kind


def is_string(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


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
        if path.suffix.lower() == ".arrow":
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
