"""Tables that hold the images themselves: Parquet as `push_to_hub` writes it, Arrow as `save_to_disk` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from data_prep.sources.base import (
    BadRecord,
    ConvertingSource,
    Dropped,
    Info,
    Record,
    numbers,
    storable,
    table_image,
    text,
)
from data_prep.sources.img2dataset_shards import FILTER_COLUMNS, caption_column
from data_prep.sources.inputs import InputFile, find_files, kept_arrays, require_keys
from data_prep.sources.records import (
    TABLE_SUFFIXES,
    Concatenation,
    RawRecord,
    TableFile,
    image_columns,
    is_list,
    table_batches,
    table_schema,
    text_columns,
)
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError


class ParquetSource(ConvertingSource[RawRecord]):
    """Parquet or Arrow files with images in a column: `{"bytes", "path"}`, bytes, or lists of these (all of a row's
    images come before its text). A list of captions makes a pair of each. Other columns of strings and numbers are
    kept; numbers under LAION's and img2dataset's names and a `url` serve the filters.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        image_column: Annotated[
            str | None, "column with the images; else the only one that holds any"
        ] = None,
        text_column: Annotated[str | None, "column with the caption; else found by its name"] = None,
        require_caption: Annotated[bool, "drop images without one (stage 1 can do without)"] = True,
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        self.licence, self._require_caption = licence, require_caption
        files = find_files(inputs, TABLE_SUFFIXES, source="parquet")
        first = files[0].path
        self._image = image_column or _only_images(first)
        self._text = text_column or caption_column(text_columns(table_schema(first)))
        if self._text is None and require_caption:
            raise UserError(
                f"{first} has no column that is known to hold captions; found {_shown(first)}: name it with "
                "--text-column, or give --no-require-caption"
            )
        for file in files:
            self._check(file.path)
        self.records = Concatenation([CaptionRows(file, self._image, self._text) for file in files])

    def _check(self, path: Path) -> None:
        """Raises UserError for a table that lacks a column, or holds something else in it."""
        schema = table_schema(path)
        wanted = {name: (name,) for name in (self._image, self._text) if name is not None}
        require_keys(schema.names, wanted, where=path, what="table with the columns asked for")
        held = {"images": (self._image, image_columns(schema)), "text": (self._text, text_columns(schema))}
        for what, (name, possible) in held.items():
            if name is not None and name not in possible:
                raise UserError(
                    f"{path}: column {name} holds no {what}, but {schema.field(name).type}; columns that can: "
                    f"{', '.join(possible) or 'none'}"
                )

    def make(self, raw: RawRecord) -> Record:
        """The images of a row, and one caption."""
        held = raw.value[self._image]
        images = tuple(table_image(value) for value in (held if isinstance(held, list) else [held]))
        if not images:
            raise BadRecord("no_image")
        parts: list[Part] = [ImagePart(place) for place in range(len(images))]
        try:
            parts.append(TextPart(text(raw.value, self._text or "", word="caption")))
        except BadRecord as error:
            if self._require_caption or error.reason == "bad_caption":
                raise
        info: Info = {
            name: storable(value)
            for name, value in raw.value.items()
            if name not in (self._image, self._text)
        }
        info |= numbers(raw.value, FILTER_COLUMNS)
        if isinstance(info.get("URL"), str):
            info.setdefault("url", info["URL"])
        return Record(Document(raw.key, "parquet", tuple(parts), info), images)


class CaptionRows:
    """The rows of one table; one with a list of captions comes once for each of them (`part`)."""

    def __init__(self, file: InputFile, image: str, text: str | None):
        schema = table_schema(file.path)
        self._text = text
        self._table = TableFile(file, {image, *_kept(schema), *([text] if text else [])})
        self._starts: np.ndarray | None = None
        if text is not None and is_list(schema.field(text).type):
            (self._starts,) = kept_arrays(
                file.path, kind=f"captions-{text.replace('/', '-')}", names=("start",), make=self._count
            )

    def __len__(self) -> int:
        return len(self._table) if self._starts is None else int(self._starts[-1])

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Pairs `start ... stop - 1`."""
        if self._starts is None or start >= stop:
            yield from self._table.read(start, stop)
            return
        row = int(np.searchsorted(self._starts, start, side="right")) - 1
        for item in self._table.read(row, int(np.searchsorted(self._starts, stop, side="left"))):
            first, after = map(int, self._starts[row : row + 2])
            for number in range(max(start, first), min(stop, after)):
                yield item if isinstance(item, Dropped) else self._one(item, number - first, after - first)
            row += 1

    def _one(self, row: RawRecord, part: int, num_parts: int) -> RawRecord:
        captions = row.value[self._text] or [None]
        key = f"{row.key}:{part}" if num_parts > 1 else row.key
        return RawRecord(key, row.value | {self._text: captions[part]}, row.file, part)

    def _count(self) -> list[np.ndarray]:
        """-> (rows + 1,) int64: the number of every row's first pair; a row without caption counts as one."""
        lengths = [np.zeros(1, np.int64)]
        for batch in table_batches(self._table.file.path, [str(self._text)]):
            found = pc.fill_null(pc.list_value_length(batch.column(0)), 0)
            lengths.append(np.maximum(found.to_numpy(zero_copy_only=False).astype(np.int64), 1))
        return [np.cumsum(np.concatenate(lengths))]


def _only_images(path: Path) -> str:
    """The column that holds images. Raises UserError when none does, or several do."""
    schema = table_schema(path)
    found = image_columns(schema)
    # bytes may be anything where the images have their own form
    found = [name for name in found if not types.is_binary(schema.field(name).type)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{path} holds images in {', '.join(found)}: choose with --image-column")
    raise UserError(
        f"{path} holds no images; found {_shown(path)}. A table of URLs is for img2dataset: the source img2dataset "
        "prints its command"
    )


def _kept(schema: pa.Schema) -> list[str]:
    """Columns that become `info`: numbers, strings, booleans."""
    images = image_columns(schema)
    return [field.name for field in schema if not types.is_nested(field.type) and field.name not in images]


def _shown(path: Path) -> str:
    return ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in table_schema(path))
