"""Records of JSON files by number: JSON Lines (also .zip and .gz) and files that hold one long list.

A file is parsed once to find where its records lie; these offsets are kept beside it, so that any range is
then read with one seek.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.sources import Dropped
from data_prep.sources.inputs import InputFile, find_files, kept_arrays, split_range
from data_prep.sources.json_list import list_values
from vlgpt.errors import UserError

LINES = (".jsonl", ".ndjson")
"""Files with these names hold one value per line, whatever the first line begins with."""
SUFFIXES = tuple(f"{kind}{packing}" for packing in ("", ".zip", ".gz") for kind in (*LINES, ".json"))
FIRST_RECORDS = 100
CHUNK_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20
IN_MEMORY_BYTES = 64 << 20
IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))


@dataclass(frozen=True, slots=True)
class JsonRecord:
    """One record. `part` counts from 0 where one JSON value holds several records."""

    key: str
    value: Any
    file: InputFile
    part: int = 0


class JsonRecords:
    """All records of the files in order. `count` tells how many records a JSON value holds (its name, `kind`,
    keeps the stored offsets of different sources apart).
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        source: str,
        kind: str = "records",
        count: Callable[[Any], int] | None = None,
    ):
        self.files = find_files(inputs, SUFFIXES, source=source)
        make = partial(_index, count=count)
        self._spans = [
            _in_memory(
                kept_arrays(
                    file.path,
                    kind=kind,
                    names=("start", "stop", "first_record"),
                    make=partial(make, file.path),
                )
            )
            for file in self.files
        ]
        totals = (int(first_record[-1]) for _, _, first_record in self._spans)
        self._file_starts = [0, *itertools.accumulate(totals)]

    def __len__(self) -> int:
        return self._file_starts[-1]

    def read(self, start: int, stop: int) -> Iterator[JsonRecord | Dropped]:
        """Records `start ... stop - 1`; text that is no JSON is dropped as `bad_json` or `text_not_utf8`."""
        for place, first, end in split_range(self._file_starts, start, stop):
            yield from self._read_file(place, first, end)

    def first(self) -> JsonRecord:
        """The first record that is JSON. Raises UserError when there is none among the first hundred."""
        for item in self.read(0, min(FIRST_RECORDS, len(self))):
            if isinstance(item, JsonRecord):
                return item
        raise UserError(f"{self.files[0].path} holds no JSON records")

    def _read_file(self, place: int, start: int, stop: int) -> Iterator[JsonRecord | Dropped]:
        file, (starts, stops, first_record) = self.files[place], self._spans[place]
        value_number = int(np.searchsorted(first_record, start, side="right")) - 1
        with open_binary(file.path) as stream:
            while start < stop:
                place_bytes, end_bytes = int(starts[value_number]), int(stops[value_number])
                first, after = int(first_record[value_number]), int(first_record[value_number + 1])
                value, reason = _read_value(stream, place_bytes, end_bytes)
                for number in range(start, min(stop, after)):
                    part = number - first
                    key = f"{file.name}:{value_number}" + (f":{part}" if after - first > 1 else "")
                    yield Dropped(reason, key) if reason else JsonRecord(key, value, file, part)
                start, value_number = min(stop, after), value_number + 1


def _in_memory(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """A memory map holds its file open, and there may be thousands of small files; large ones stay mapped."""
    return tuple(array if array.nbytes > IN_MEMORY_BYTES else np.array(array) for array in arrays)


def _read_value(stream: IO[bytes], start: int, stop: int) -> tuple[Any, str]:
    if stop - start > MAX_RECORD_BYTES:
        return None, "record_too_long"
    stream.seek(start)
    return _parse(stream.read(stop - start))


def _parse(text: bytes) -> tuple[Any, str]:
    """(value, "") or (None, reason)."""
    try:
        return json.loads(text.decode("utf-8-sig")), ""
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


def _index(path: Path, *, count: Callable[[Any], int] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte ranges of the JSON values and running number of records: -> (n,), (n,), (n + 1,)."""
    try:
        with open_binary(path) as stream:
            is_list = not has_lines(path) and _first_byte(stream) == b"["
            stream.seek(0)
            if is_list:
                places = [
                    (start, stop, _count(value, count)) for start, stop, value in list_values(stream, path)
                ]
                starts, stops, counts = np.array(places, np.int64).reshape(-1, 3).T
            else:
                starts, stops = _lines(stream)
                counts = np.ones(len(starts), np.int64)
                for number in range(len(starts)) if count is not None else ():
                    value, _ = _read_value(stream, int(starts[number]), int(stops[number]))
                    counts[number] = _count(value, count)
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut or damaged: {error}; download it again") from error
    return starts, stops, np.concatenate([[0], np.cumsum(counts)])


def _count(value: Any, count: Callable[[Any], int] | None) -> int:
    """Records in a value; what is no JSON counts as one, so that it can be dropped."""
    return 1 if count is None or value is None else count(value)


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
