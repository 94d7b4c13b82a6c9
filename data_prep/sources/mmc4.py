"""MMC4 (core, fewer faces): web pages as sentences, with pictures matched to them by CLIP similarity."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from data_prep.sources import Dropped, ImageOpener, Record
from data_prep.sources.convert import BadRecord, convert, mapping
from data_prep.sources.fetch import fetch_help
from data_prep.sources.inputs import InputFile, require_keys
from data_prep.sources.join import Pictures
from data_prep.sources.json_records import JsonRecord, JsonRecords
from data_prep.sources.matching import Matching, match_pictures, page_parts
from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.images import BadImage

DOCUMENTS_TO_JUDGE = 20


class Mmc4Source:
    """`docs_*.jsonl` or `.jsonl.zip`. Pictures: inside (`image_base64`), in the tar of the same name, or
    given by --images. Each picture stands before its sentence (training swaps them at random) and every
    sentence is a part of its own, so that windows can begin at any; `similarities` holds one value per
    picture.
    """

    licence = "MMC4: ODC-BY 1.0 (texts: Common Crawl terms, C4); pictures belong to their sites"
    is_image_optional = True

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None,
            "folders, tars or img2dataset output with the pictures; else beside the input",
        ] = None,
        min_pair_similarity: Annotated[float, "leave out pictures that match their sentence less"] = 0.24,
        matching: Annotated[
            Matching, "match sentences anew among the pictures at hand, or as published"
        ] = "recomputed",
    ):
        self._records = JsonRecords(inputs, source="mmc4")
        self._given = Pictures(images) if images else None
        self._min_similarity, self._matching = min_pair_similarity, matching
        first = self._records.first()
        found = first.value if isinstance(first.value, dict) else {}
        wanted = {"sentences": ("text_list",), "pictures": ("image_info",)}
        require_keys(found, wanted, where=first.file.path, what="MMC4 file")
        self._require_pictures()

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One page each."""
        return convert(self._records.read(start, stop), self._record)

    def _record(self, item: JsonRecord) -> Record:
        value = mapping(item.value)
        sentences, entries = value.get("text_list"), value.get("image_info")
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise BadRecord("bad_text")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadRecord("bad_image_info")
        if not entries:
            raise BadRecord("no_image")
        openers, lost = self._find(entries, item.file)
        if not openers:
            raise BadRecord(lost[0])
        matches = match_pictures(value, sorted(openers), matching=self._matching)
        matches = [match for match in matches if match.similarity >= self._min_similarity]
        if not matches:
            raise BadRecord("filtered:pair_similarity")
        urls = [entries[match.image].get("raw_url") for match in matches]
        info: dict[str, Any] = {"similarities": [match.similarity for match in matches], "image_urls": urls}
        if isinstance(value.get("url"), str):
            info["url"] = value["url"]
        if value.get("could_have_url_duplicate"):
            info["could_have_url_duplicate"] = 1
        document = Document(item.key, "mmc4", page_parts(sentences, matches), info)
        return Record(document, tuple(openers[match.image] for match in matches), tuple(lost))

    def _find(
        self, entries: Sequence[Mapping[str, Any]], file: InputFile
    ) -> tuple[dict[int, ImageOpener], list[str]]:
        """The pictures at hand by number, and why the others are not."""
        openers: dict[int, ImageOpener] = {}
        lost = []
        for place, entry in enumerate(entries):
            try:
                openers[place] = self._picture(entry, file)
            except (BadRecord, BadImage) as error:
                lost.append(error.reason)
        return openers, lost

    def _picture(self, entry: Mapping[str, Any], file: InputFile) -> ImageOpener:
        if isinstance(entry.get("image_base64"), str):
            try:
                return base64.b64decode(entry["image_base64"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadRecord("bad_base64") from error
        pictures = self._given or _pictures_beside(file.path, file.name)
        name, url = entry.get("image_name"), entry.get("raw_url")
        if isinstance(url, str) and (found := pictures.find_url(url)) is not None:
            return found
        if not isinstance(name, str):
            raise BadRecord("bad_image_info")
        return pictures.by_name(name)

    def _require_pictures(self) -> None:
        """Pictures are not part of MMC4: a user who has none at hand is told how to get them."""
        items = self._records.read(0, min(DOCUMENTS_TO_JUDGE, len(self)))
        values = [(item.value, item.file) for item in items if isinstance(item, JsonRecord)]
        for value, file in values:
            entries = value.get("image_info") if isinstance(value, dict) else None
            usable = [entry for entry in entries or () if isinstance(entry, dict)]
            if self._find(usable, file)[0]:
                return
        raise UserError(fetch_help("mmc4", [file.path for file in self._records.files], len(values)))


@lru_cache(maxsize=4)
def _pictures_beside(path: Path, name: str) -> Pictures:
    """The tar of the same name, else the folder."""
    tar = path.parent / f"{name.rpartition('/')[2]}.tar"
    return Pictures([tar] if tar.is_file() else [path.parent])
