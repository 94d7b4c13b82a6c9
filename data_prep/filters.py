"""Filters that judge one record at a time; all are off unless asked for. docs/data.md gives the values of the
literature.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from data_prep.sources import Record
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.seeds import generator


class FilterSettings(BaseModel):
    """Which records are kept. A record without the number that a filter asks for is dropped as `filtered:no_...`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_text_chars: int | None = Field(None, ge=0, description="drop documents with less text")
    max_text_chars: int = Field(200_000, ge=1, description="drop documents with more text")
    min_similarity: float | None = Field(None, description="image-text CLIP similarity, column `similarity`")
    min_aesthetic: float | None = Field(None, description="LAION aesthetic score, column `aesthetic`")
    max_watermark: float | None = Field(None, description="watermark probability, column `watermark`")
    max_nsfw: float | None = Field(None, description="unsafe probability, column `nsfw`")
    max_images: int | None = Field(None, ge=1, description="cut documents before the image after this many")
    drop_single_image: float = Field(
        0.0, ge=0, le=1, description="drop this share of documents with one image"
    )
    opt_out: Path | None = Field(
        None, description="file with one URL, domain or sha256 per line to leave out"
    )
    exclude: Path | None = Field(None, description="file with one document id per line to leave out")


class RecordFilter:
    """Applies the settings to records. Raises UserError when one of the lists cannot be read."""

    def __init__(self, settings: FilterSettings):
        self._settings = settings
        self._opted_out, self._excluded = _lines(settings.opt_out), _lines(settings.exclude)

    def reason(self, record: Record) -> str | None:
        """Why the record is left out, None when it stays."""
        document, settings = record.document, self._settings
        length = sum(len(part.text) for part in document.parts if isinstance(part, TextPart))
        if length > settings.max_text_chars:
            return "filtered:text_too_long"
        if settings.min_text_chars is not None and length < settings.min_text_chars:
            return "filtered:text_too_short"
        for name, limit, sign in (
            ("similarity", settings.min_similarity, 1),
            ("aesthetic", settings.min_aesthetic, 1),
            ("watermark", settings.max_watermark, -1),
            ("nsfw", settings.max_nsfw, -1),
        ):
            if limit is not None and (reason := _threshold(document.info.get(name), name, limit, sign)):
                return reason
        if document.id in self._excluded:
            return "filtered:excluded"
        if self._opted_out and any(self._is_opted_out(url) for url in _urls(document)):
            return "filtered:opt_out"
        if document.num_images == 1 and settings.drop_single_image:
            draw = generator("single image", document.source, document.id).random()
            if draw < settings.drop_single_image:
                return "filtered:single_image"
        return None

    def opted_out_hash(self, sha256: str) -> bool:
        """Whether the original file's hash is on the opt-out list."""
        return sha256 in self._opted_out

    def crop(self, record: Record) -> Record:
        """Cut the document before the first image that is too many."""
        limit = self._settings.max_images
        if limit is None or record.document.num_images <= limit:
            return record
        document = record.document
        cut = next(
            position
            for position, part in enumerate(document.parts)
            if isinstance(part, ImagePart) and part.index == limit
        )
        shorter = Document(document.id, document.source, document.parts[:cut], document.info)
        return Record(shorter, record.images[:limit], record.lost)

    def _is_opted_out(self, url: str) -> bool:
        host = urlsplit(url).hostname or ""
        labels = host.split(".")
        domains = {".".join(labels[start:]) for start in range(len(labels))}
        return url in self._opted_out or not domains.isdisjoint(self._opted_out)


def _threshold(value: Any, name: str, limit: float, sign: int) -> str | None:
    """Keep values above the limit (sign 1) or below it (sign -1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return f"filtered:no_{name}"
    return f"filtered:{name}" if (value - limit) * sign < 0 else None


def _urls(document: Document) -> list[str]:
    found = [document.info.get("url"), *(document.info.get("image_urls") or ())]
    return [url for url in found if isinstance(url, str)]


def _lines(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    try:
        return frozenset(
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the list {path} cannot be read: {error}") from error
