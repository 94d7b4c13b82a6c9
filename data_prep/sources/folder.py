"""Images in a folder with a table of captions: Hugging Face imagefolder and anything close to it."""

from __future__ import annotations

import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import BadRecord, ConvertingSource, Numbered, Record, mapping, storable, text
from data_prep.sources.csv_rows import ROW_SUFFIXES, CsvFile, open_rows
from data_prep.sources.inputs import inside, list_files
from data_prep.sources.records import FIRST_RECORDS, TABLE_SUFFIXES, Concatenation, RawRecord
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.image_formats import IMAGE_SUFFIXES
from vlgpt.images import BadImage

METADATA = tuple(f"metadata{suffix}" for suffix in ROW_SUFFIXES)
NUMBERS = ("similarity", "aesthetic", "watermark", "nsfw")
"""Columns that filters compare: they are numbers, in text files too. All others keep their text."""


class FolderSource(ConvertingSource[RawRecord]):
    """`metadata.jsonl` or `metadata.csv` with the columns `file_name` and `text`, beside the images (any depth).

    Another table can be given as --input itself (.jsonl, .csv, .tsv, .parquet); file names are relative to its
    folder. Other columns are kept as they are; numbers under `similarity`, `aesthetic`, `watermark`, `nsfw` and a
    `url` serve the filters.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        file_column: Annotated[str, "column with the image's file name"] = "file_name",
        text_column: Annotated[str, "column with the caption"] = "text",
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        self._file_column, self._text_column = file_column, text_column
        self.licence = licence
        tables = []
        for path in _find_tables(inputs):
            tables.append(open_rows(path))
            self._check(path, tables[-1])
        self.records = Concatenation(tables)

    def make(self, raw: RawRecord) -> Record:
        """A pair of image and caption."""
        columns = mapping(raw.value)
        name = columns.get(self._file_column)
        if not isinstance(name, str) or not name:
            raise BadRecord("no_file_name")
        caption = text(columns, self._text_column, word="caption")
        info = {
            key: _number(value) if key in NUMBERS else storable(value)
            for key, value in columns.items()
            if key not in (self._file_column, self._text_column)
        }
        path = find_image(raw.file.path.parent, name)
        return Record(Document(name, "folder", (ImagePart(0), TextPart(caption)), info), (path,))

    def _check(self, path: Path, table: Numbered[RawRecord]) -> None:
        """Look at the first rows. Raises UserError for a column that is not there, or when all names lead nowhere."""
        rows = list(table.read(0, min(FIRST_RECORDS, len(table))))
        values = [row for row in rows if isinstance(row, RawRecord) and isinstance(row.value, dict)]
        found = dict.fromkeys(table.columns if isinstance(table, CsvFile) else ())
        for row in values:
            found |= dict.fromkeys(row.value)
        for flag, column in (("--file-column", self._file_column), ("--text-column", self._text_column)):
            if found and column not in found:
                raise UserError(
                    f"{path} has no column {column!r}; found {', '.join(map(repr, found))}: name it with {flag}"
                )
        problems: list[BadImage] = []
        for row in values:
            try:
                self.make(row)
                return
            except BadImage as error:
                problems.append(error)
            except BadRecord:
                pass
        if problems:
            raise UserError(
                f"{path}: no image of its first {len(problems)} rows is found: {problems[0].detail}"
            )


def _find_tables(inputs: Sequence[Path]) -> list[Path]:
    """The tables in these folders, and those given. Raises UserError for two of one folder, or none."""
    tables: list[Path] = []
    others: list[str] = []
    for path in inputs:
        if not path.is_dir():
            tables.append(path)
            continue
        beside: dict[Path, list[Path]] = defaultdict(list)
        for file in list_files([path], ROW_SUFFIXES, others=IMAGE_SUFFIXES):
            if file.path.name.lower() in METADATA:
                beside[file.path.parent].append(file.path)
            else:
                others.append(str(file.path))
        for found in beside.values():
            if len(found) > 1:
                raise UserError(
                    f"{found[0]} and {found[1]} describe the same images; give the one to read as --input"
                )
            tables += found
    if not tables:
        other = f"; a table of another name is given as --input itself: {others[0]}" if others else ""
        if others and others[0].endswith(TABLE_SUFFIXES):
            other = f"; if {others[0]} holds the images too, the source parquet reads it"
        shown = ", ".join(map(str, inputs)) or "no --input"
        raise UserError(
            f"the folder source needs a metadata.jsonl or metadata.csv, found none in {shown}{other}"
        )
    if twice := sorted({str(path) for path in tables if tables.count(path) > 1}):
        raise UserError(f"{twice[0]} is given twice as --input; leave one out")
    return tables


def find_image(folder: Path, name: str) -> Path:
    """The file under a name from a table: as written, with `/` for Windows' `\\`, or with accents composed otherwise.

    Raises BadImage(`path_outside_folder`), or BadImage(`missing_file`) where a file of nearly that name is there.
    Where none is, opening the path will tell.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise BadImage("missing_file", f"{name!r}: {error.reason}") from error
    slashes = name.replace("\\", "/")
    forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")]
    first = inside(folder, name)
    for form in dict.fromkeys([name, slashes, *forms]):
        path = inside(folder, form)
        if path is not None and os.path.lexists(path):
            return path
    if hint := _near(folder, slashes):
        raise BadImage("path_outside_folder" if first is None else "missing_file", f"{name!r}: {hint}")
    if first is None:
        raise BadImage(
            "path_outside_folder", f"{name!r} leads out of {folder}; names are relative to the table"
        )
    return first


def _near(folder: Path, name: str) -> str:
    """Why a name is not there although its file seems to be; empty if it does not."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    if not parts or "\0" in name:
        return ""
    for start in range(1, len(parts)):
        if os.path.lexists(folder.joinpath(*parts[start:])):
            return f"without the leading {'/'.join(parts[:start])!r} it is there; take that off the names"
    place = folder
    for part in parts:
        known = _names(place)
        if part not in known and part.casefold() not in known:
            break
        place /= known.get(part, known.get(part.casefold(), part))
    else:
        return (
            f"letters differ, the file is {place.relative_to(folder).as_posix()!r}; write names as files are"
        )
    for below in islice(dict.fromkeys(_names(folder).values()), FIRST_RECORDS):
        if os.path.lexists(folder.joinpath(below, *parts)):
            return f"it lies in {below!r}; put that before the names, or move the table there"
    return ""


@lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, str]:
    """What lies in a folder, by name and by name without case."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    return {name.casefold(): name for name in names} | {name: name for name in names}


def _number(value: object) -> object:
    """Text files have no numbers: those of filters are read, what is none stays."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else storable(value)
