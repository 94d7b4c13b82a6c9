"""OBELICS: web pages as texts and image URLs in reading order, joined with what img2dataset downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import BadRecord, Columns, ConvertingSource, ImageOpener, Record
from data_prep.sources.fetch import fetch_help
from data_prep.sources.join import ImageFinder
from data_prep.sources.records import RawRecord, TableRows
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError

PARAGRAPH = re.compile(r"(?=\n\n)")
MISSING = "missing_file"


class ObelicsSource(ConvertingSource[RawRecord]):
    """Parquet or Arrow files with `images`, `texts`, `metadata`, `general_metadata`. Images that were not
    downloaded are left out and counted; the order of the page is kept. Texts are cut before every empty line,
    so that training windows can begin at any paragraph; joined together the parts are the text as published.
    """

    licence = "OBELICS: CC BY 4.0 (texts: Common Crawl terms); pictures belong to their sites"
    is_image_optional = True

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[tuple[Path, ...] | None, "img2dataset output with the images"] = None,
    ):
        self.records = TableRows(
            inputs,
            {"images": ("images",), "texts": ("texts",)},
            optional=("general_metadata",),
            source="obelics",
            what="OBELICS table",
        )
        if not images:
            raise UserError(fetch_help("obelics", [file.path for file in self.records.files], 0))
        self._images = ImageFinder(images)

    def make(self, raw: RawRecord) -> Record:
        """The page."""
        items = page_items(raw.value)
        parts: list[Part] = []
        urls: list[str] = []
        openers: list[ImageOpener] = []
        num_lost = 0
        for text, url in items:
            if text is not None:
                parts += [TextPart(piece) for piece in PARAGRAPH.split(text) if piece.strip()]
            elif url is not None and (opener := self._images.find_url(url)) is not None:
                parts.append(ImagePart(len(openers)))
                urls.append(url)
                openers.append(opener)
            else:
                num_lost += 1
        if not openers:
            raise BadRecord(MISSING if num_lost else "no_image")
        info = {"image_urls": urls, **_page_url(raw.value)}
        document = Document(raw.key, "obelics", tuple(parts), info)
        return Record(document, tuple(openers), (MISSING,) * num_lost)


def page_items(value: Columns) -> list[tuple[str | None, str | None]]:
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
