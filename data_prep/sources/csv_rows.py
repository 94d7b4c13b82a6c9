"""Rows of CSV and TSV files, and one stray quote cannot hide the rows after it."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.sources.base import Dropped, Numbered
from data_prep.sources.inputs import InputFile, kept_arrays
from data_prep.sources.records import (
    CHUNK_BYTES,
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
    JsonRecords,
    RawRecord,
    TableFile,
    line_end,
    open_text,
    table_layout,
)
from vlgpt.errors import UserError

CSV_SUFFIXES = tuple(f"{kind}{packing}" for packing in ("", ".zip", ".gz") for kind in (".csv", ".tsv"))
ROW_SUFFIXES = (*JSON_SUFFIXES, *CSV_SUFFIXES, *TABLE_SUFFIXES)
MAX_ROW_BYTES = 1 << 20
"""Of a row whose quoted fields hold line breaks: no caption is longer."""
BLANK = b" \r\n"
WORD = re.compile(r"[0-9A-Za-z\x80-\xff]+")
SHAPE_CHARS = 6

# UPSTREAM: the module's own limit is 131,072 characters, for all readers of a process
csv.field_size_limit(MAX_ROW_BYTES)


def open_rows(path: Path) -> Numbered[RawRecord]:
    """The rows of a table of any kind, by suffix. Raises UserError for another one."""
    name = path.name.lower()
    if name.endswith(CSV_SUFFIXES):
        return CsvFile(path)
    if name.endswith(JSON_SUFFIXES):
        return JsonRecords([path], source="table")
    if name.endswith(TABLE_SUFFIXES):
        return TableFile(InputFile(path, path.name), set(table_layout(path)[0]))
    raise UserError(f"{path}: tables end in .parquet, .json, .jsonl, .csv or .tsv, found {path.suffix!r}")


def read_header(path: Path) -> tuple[list[str], str]:
    """The fields of the first line that is not blank, and what separates them: commas (tabs in .tsv) if there are any,
    else semicolons or tabs.
    """
    with open_text(path) as stream:
        lines = list(_blank_and_header(_lines(stream)))
    first = lines[-1] if lines else b""
    header = first.decode("utf-8-sig", "replace").strip("\r\n")
    letters = "\t,;" if ".tsv" in path.name.lower() else ",;\t"
    delimiter = next((letter for letter in letters if letter in header), letters[0])
    names = _fields(header, delimiter) or header.split(delimiter)
    return [name.strip() for name in names], delimiter


class CsvFile:
    """The rows of a CSV or TSV file with a header line. Fields in quotes may hold line breaks.

    A row whose quotes do not fit is taken as it stands, if it has as many fields as the header. Raises UserError for a
    header that names a column twice.
    """

    def __init__(self, path: Path):
        self.file = InputFile(path, path.name)
        self.columns, self._delimiter = read_header(path)
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            raise UserError(f"{path} names the column {twice[0]!r} twice; rename one")
        self._starts, self._stops = kept_arrays(path, kind="rows", names=("start", "stop"), make=self._scan)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Rows `start ... stop - 1`.

        One with another number of fields than the header is dropped as `bad_row`, a line with a quote whose end is
        not found as `open_quote`: the lines after it are rows again.
        """
        with open_text(self.file.path) as stream:
            for number in range(start, stop):
                key = f"{self.file.name}:{number}"
                stream.seek(int(self._starts[number]))
                data = stream.read(int(self._stops[number] - self._starts[number]))
                try:
                    row = data.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield Dropped("text_not_utf8", key)
                    continue
                values = _fields(row, self._delimiter)
                if values is None and _is_open(row, self._delimiter):
                    yield Dropped("open_quote", key)
                    continue
                values = values or row.split(self._delimiter)
                if len(values) == len(self.columns):
                    yield RawRecord(key, dict(zip(self.columns, values)), self.file)
                else:
                    yield Dropped("bad_row", key)

    def _scan(self) -> list[np.ndarray]:
        """Where the rows lie: -> (n,), (n,) int64 first byte and the one after the last."""
        with open_text(self.file.path) as stream:
            lines = _lines(stream)
            start = sum(map(len, _blank_and_header(lines)))
            places = np.fromiter(_row_places(lines, start, self._delimiter, len(self.columns)), np.int64)
        return list(places.reshape(-1, 2).T)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines with their ends."""
    end, rest = line_end(stream), b""
    while chunk := stream.read(CHUNK_BYTES):
        *whole, rest = (rest + chunk).split(end)
        yield from (line + end for line in whole)
    if rest:
        yield rest


def _blank_and_header(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The first line that is not blank, and those before it."""
    for line in lines:
        yield line
        if line.strip(BLANK):
            return


def _fields(row: str, delimiter: str) -> list[str] | None:
    """The fields of one row, None where its quotes do not fit or one is open."""
    try:
        return next(csv.reader((row,), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


def _first_row(lines: Iterable[str], delimiter: str) -> tuple[list[str] | None, int]:
    """The first row of these lines, None where the quotes do not fit, and how many lines it asked for."""
    asked = 0

    def counted() -> Iterator[str]:
        nonlocal asked
        for line in lines:
            asked += 1
            yield line
        asked += 1

    try:
        return next(csv.reader(counted(), delimiter=delimiter, strict=True), []), asked
    except csv.Error:
        return None, asked


def _is_open(row: str, delimiter: str) -> bool:
    """Whether a quote has no end in this row: it asks for one more line."""
    return _first_row([row], delimiter)[1] > 1


def _row_places(lines: Iterator[bytes], start: int, delimiter: str, num_columns: int) -> Iterator[int]:
    """First byte of each row and the one after its last, the first line beginning at byte `start`."""
    ahead: deque[bytes] = deque()
    field = rf'(?:"[^"]*(?:""[^"]*)*"|[^"{delimiter}\r\n][^{delimiter}\r\n]*|)'
    whole = re.compile(
        rf"{field}(?:{delimiter}{field})*[\r\n]*".encode()
    )  # three times as fast as the csv module
    while line := ahead.popleft() if ahead else next(lines, b""):
        stop = start + len(line)
        if b'"' in line and not whole.fullmatch(line) and _is_open(_text(line), delimiter):
            for _ in range(_num_more(line, ahead, lines, delimiter, num_columns)):
                stop += len(ahead.popleft())
        if line.strip(BLANK):
            yield start
            yield stop
        start = stop


def _num_more(
    line: bytes, ahead: deque[bytes], lines: Iterator[bytes], delimiter: str, num_columns: int
) -> int:
    """How many lines after this one belong to its row; those that had to be read for it are left in `ahead`.

    None do where the open quote has no end or does not fit, and where a line would be a row by itself: then the quote
    is a stray one, and its end is another.
    """

    def following() -> Iterator[str]:
        size = 0
        for more in chain([line], ahead, _kept(lines, ahead)):
            size += len(more)
            if size > MAX_ROW_BYTES:
                return
            yield _text(more)

    fields, num_lines = _first_row(following(), delimiter)
    if fields is None:
        return 0
    broken = next((place for place, field in enumerate(fields) if re.search(r"[\r\n]", field)), 0)
    column = 0 if broken else -1  # one that the quote did not swallow
    for more in islice(ahead, num_lines - 1):
        values = _text(more).rstrip("\r\n").split(delimiter)
        if (
            len(values) == num_columns > 1
            and not any(value.startswith(" ") for value in values)
            and _shape(values[column]) == _shape(fields[column])
        ):
            return 0
    return num_lines - 1


def _kept(lines: Iterator[bytes], ahead: deque[bytes]) -> Iterator[bytes]:
    for line in lines:
        ahead.append(line)
        yield line


def _text(line: bytes) -> str:
    """For looking at quotes and delimiters only: in UTF-8 no other character has their bytes."""
    return line.decode("latin-1")


def _shape(value: str) -> str:
    """How a value is put together: `a12/07.jpg` -> `x/0.x`. Its beginning is enough."""
    return WORD.sub(lambda found: "0" if found[0].isdigit() else "x", value)[:SHAPE_CHARS]
