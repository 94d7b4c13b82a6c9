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
from vlgpt.log import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.zip", ".json.zip", ".jsonl.gz", ".json.gz")
FIRST_RECORDS = 100


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
                stream.seek(int(starts[value_number]))
                text = stream.read(int(stops[value_number] - starts[value_number]))
                first, after = int(first_record[value_number]), int(first_record[value_number + 1])
                value, reason = _parse(text)
                for number in range(start, min(stop, after)):
                    part = number - first
                    key = f"{file.name}:{value_number}" + (f":{part}" if after - first > 1 else "")
                    yield Dropped(reason, key) if reason else JsonRecord(key, value, file, part)
                start, value_number = min(stop, after), value_number + 1


def _in_memory(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(array) for array in arrays)  # a memory map would hold its file open


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
    starts, stops, counts = [], [], []
    try:
        with open_binary(path) as stream:
            is_list = _first_byte(stream) == b"["
            stream.seek(0)
            for start, stop, value in list_values(stream, path) if is_list else _lines(stream, count):
                starts.append(start)
                stops.append(stop)
                counts.append(1 if count is None or value is None else count(value))
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut or damaged: {error}; download it again") from error
    return np.array(starts, np.int64), np.array(stops, np.int64), np.cumsum([0, *counts], dtype=np.int64)


def _first_byte(stream: IO[bytes]) -> bytes:
    while (byte := stream.read(1)) and (byte.isspace() or byte in b"\xef\xbb\xbf"):
        continue
    return byte


def _lines(stream: IO[bytes], count: Callable[[Any], int] | None) -> Iterator[tuple[int, int, Any]]:
    start = 0
    for line in stream:
        stop = start + len(line)
        if not line.isspace():
            yield start, stop, None if count is None else _parse(line)[0]
        start = stop
