"""OBELICS: web pages as texts and image URLs in reading order, joined with what img2dataset downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.sources.base import (
    BadRecord,
    Columns,
    ConvertingSource,
    Dropped,
    ImageOpener,
    Numbered,
    Record,
)
from data_prep.sources.fetch import fetch_help
from data_prep.sources.inputs import InputFile, kept_arrays
from data_prep.sources.join import ImageFinder
from data_prep.sources.records import (
    Concatenation,
    RawRecord,
    TableRows,
    is_list,
    is_string,
    table_batches,
)
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.shards.samples import visible

PARAGRAPH = re.compile(r"(?=\n\n)")
MISSING = "missing_file"
END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
"""UPSTREAM: in the place of a page's "more" links, where another topic begins; in training an end of document."""
Item = tuple[str | None, str | None]
"""(text, image URL), one of the two."""


class ObelicsSource(ConvertingSource[RawRecord]):
    """Parquet or Arrow files with `images`, `texts`, `metadata`, `general_metadata`. Images that were not
    downloaded are left out and counted; the order of the page is kept. A page that OBELICS' mark for the end of a
    document divides gives several documents. Texts are cut before every empty line, so that training windows can
    begin at any paragraph; joined together the parts are the text as published.
    """

    licence = "OBELICS: CC BY 4.0 (texts: Common Crawl terms); pictures belong to their sites"
    is_image_optional = True

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[tuple[Path, ...] | None, "img2dataset output with the images"] = None,
    ):
        rows = TableRows(
            inputs,
            {"images": ("images",), "texts": ("texts",)},
            optional=("general_metadata",),
            source="obelics",
            what="OBELICS table",
        )
        if not images:
            raise UserError(fetch_help("obelics", [file.path for file in rows.files], 0))
        self.records = Concatenation([_Documents(*pair) for pair in zip(rows.parts, rows.files)])
        self._images = ImageFinder(images)

    def make(self, raw: RawRecord) -> Record:
        """One document of a page."""
        documents = split_documents(page_items(raw.value))
        parts: list[Part] = []
        urls: list[str] = []
        openers: list[ImageOpener] = []
        num_lost = 0
        for text, url in documents[raw.part]:
            if text is not None:
                text = text.replace("\0", "")
                parts += [TextPart(piece) for piece in PARAGRAPH.split(text) if visible(piece)]
            elif url is not None and (opener := self._images.find_url(url)) is not None:
                parts.append(ImagePart(len(openers)))
                urls.append(url)
                openers.append(opener)
            else:
                num_lost += 1
        if not openers:
            # a page may end in news without images: nothing is damaged
            no_image = "no_image" if len(documents) == 1 else "filtered:no_image"
            raise BadRecord(MISSING if num_lost else no_image)
        info = {"image_urls": urls, **_page_url(raw.value)}
        document = Document(raw.key, "obelics", tuple(parts), info)
        return Record(document, tuple(openers), (MISSING,) * num_lost)


class _Documents:
    """The documents of one table: most rows hold one, those with marks inside several (`part`)."""

    def __init__(self, rows: Numbered[RawRecord], file: InputFile):
        self._rows, self._file = rows, file
        (self._starts,) = kept_arrays(file.path, kind="documents", names=("start",), make=self._count)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Iterator[RawRecord | Dropped]:
        """Documents `start ... stop - 1`."""
        if start >= stop:
            return
        row = int(np.searchsorted(self._starts, start, side="right")) - 1
        for item in self._rows.read(row, int(np.searchsorted(self._starts, stop, side="left"))):
            first, after = self._starts[row : row + 2].tolist()
            for number in range(max(start, first), min(stop, after)):
                if isinstance(item, Dropped) or after - first == 1:
                    yield item
                else:
                    part = number - first
                    yield RawRecord(f"{item.key}:{part}", item.value, item.file, part)
            row += 1

    def _count(self) -> list[np.ndarray]:
        """-> (rows + 1,) int64: the number of every row's first document."""
        counts = [np.zeros(1, np.int64)]
        for batch in table_batches(self._file.path, ("texts", "images")):
            found = np.ones(batch.num_rows, np.int64)
            for row in _rows_with_marks(batch["texts"]):
                found[row] = _num_documents(batch.slice(row, 1))
            counts.append(found)
        return [np.cumsum(np.concatenate(counts))]


def _rows_with_marks(texts: pa.Array) -> list[int]:
    if not (is_list(texts.type) and is_string(texts.type.value_type)):
        return []
    has_mark = pc.match_substring(pc.list_flatten(texts), END_OF_DOCUMENT).fill_null(False)
    rows = pc.list_parent_indices(texts).filter(has_mark)
    return np.unique(rows.to_numpy(zero_copy_only=False)).tolist()


def _num_documents(row: pa.RecordBatch) -> int:
    try:
        return len(split_documents(page_items(row.to_pylist()[0])))
    except (BadRecord, UnicodeDecodeError):
        return 1  # the row is dropped when its turn comes


def split_documents(items: Sequence[Item]) -> list[list[Item]]:
    """The page cut at OBELICS' marks; what is empty between them is left out. At least one, which may be empty."""
    documents: list[list[Item]] = [[]]
    for text, url in items:
        pieces = [None] if text is None else text.split(END_OF_DOCUMENT)
        for place, piece in enumerate(pieces):
            if place and documents[-1]:
                documents.append([])
            if piece is None:
                documents[-1].append((None, url))
            elif visible(piece):
                documents[-1].append((_trimmed(piece, place, len(pieces)), None))
    return documents if documents[-1] or len(documents) == 1 else documents[:-1]


def _trimmed(piece: str, place: int, num_pieces: int) -> str:
    """Without the blanks beside a mark."""
    piece = piece.lstrip() if place else piece
    return piece.rstrip() if place + 1 < num_pieces else piece


def page_items(value: Columns) -> list[Item]:
    """(text, image URL) in reading order, one of the two at each place.

    Raises BadRecord `bad_row`, `unequal_lengths`, or `bad_alignment` where a place holds both or nothing.
    """
    texts, images = value["texts"], value["images"]
    if not isinstance(texts, list) or not isinstance(images, list):
        raise BadRecord("bad_row")
    if len(texts) != len(images):
        raise BadRecord("unequal_lengths")
    items = list(zip(texts, images))
    if any((text is None) == (image is None) for text, image in items):
        raise BadRecord("bad_alignment")
    if not all(isinstance(item, str) for pair in items for item in pair if item is not None):
        raise BadRecord("bad_row")
    return items


def _page_url(value: Columns) -> dict[str, str]:
    """The page's URL, which opt-out lists need. Raises BadRecord(`bad_metadata`)."""
    if value.get("general_metadata") is None:
        return {}
    try:
        metadata = json.loads(value["general_metadata"])
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecord("bad_metadata") from error
    url = metadata.get("url") if isinstance(metadata, dict) else None
    return {"url": url} if isinstance(url, str) else {}
