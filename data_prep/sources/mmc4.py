"""MMC4 (core, fewer faces): web pages as sentences, with images matched to them by CLIP similarity."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar

from data_prep.sources.base import BadRecord, Columns, ImageOpener, Info, Record, mapping
from data_prep.sources.fetch import fetch_help
from data_prep.sources.inputs import InputFile
from data_prep.sources.join import ImageFinder
from data_prep.sources.json_source import JsonSource
from data_prep.sources.matching import Matching, match_images, page_parts
from data_prep.sources.records import RawRecord
from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.images import BadImage

DOCUMENTS_TO_JUDGE = 20


class Mmc4Source(JsonSource):
    """`docs_*.jsonl` or `.jsonl.zip`. Images: inside (`image_base64`), in the tar of the same name, or given by
    --images. Each image stands before its sentence (training swaps them at random) and every sentence is a part of its
    own, so that windows can begin at any; `similarities` holds one value per image.
    """

    licence = "MMC4: ODC-BY 1.0 (texts: Common Crawl terms, C4); pictures belong to their sites"
    is_image_optional = True
    name, what = "mmc4", "MMC4 file"
    wanted: ClassVar = {"sentences": ("text_list",), "images": ("image_info",)}

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None,
            "folders, tars or img2dataset output with the images; else beside the input",
        ] = None,
        min_pair_similarity: Annotated[float, "leave out images that match their sentence less"] = 0.24,
        matching: Annotated[
            Matching, "match sentences again among the images at hand, or as published"
        ] = "recomputed",
    ):
        self.records = self._open(inputs)
        self._given = ImageFinder(images) if images else None
        self._min_similarity, self._matching = min_pair_similarity, matching
        self._require_images()

    def make(self, raw: RawRecord) -> Record:
        """The page."""
        value = mapping(raw.value)
        sentences, entries = value.get("text_list"), value.get("image_info")
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise BadRecord("bad_text")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadRecord("bad_image_info")
        if not entries:
            raise BadRecord("no_image")
        openers, lost = self._find(entries, raw.file)
        if not openers:
            raise BadRecord(lost[0])
        matches = match_images(value, sorted(openers), matching=self._matching)
        matches = [match for match in matches if match.similarity >= self._min_similarity]
        if not matches:
            raise BadRecord("filtered:pair_similarity")
        urls = [entries[match.image].get("raw_url") for match in matches]
        info: Info = {"similarities": [match.similarity for match in matches], "image_urls": urls}
        if isinstance(value.get("url"), str):
            info["url"] = value["url"]
        if value.get("could_have_url_duplicate"):
            info["could_have_url_duplicate"] = 1
        document = Document(raw.key, "mmc4", page_parts(sentences, matches), info)
        return Record(document, tuple(openers[match.image] for match in matches), tuple(lost))

    def _find(self, entries: Sequence[Columns], file: InputFile) -> tuple[dict[int, ImageOpener], list[str]]:
        """The images at hand by number, and why the others are not."""
        openers: dict[int, ImageOpener] = {}
        lost = []
        for place, entry in enumerate(entries):
            try:
                openers[place] = self._image(entry, file)
            except (BadRecord, BadImage) as error:
                lost.append(error.reason)
        return openers, lost

    def _image(self, entry: Columns, file: InputFile) -> ImageOpener:
        if isinstance(entry.get("image_base64"), str):
            try:
                # MIME breaks lines after 76 letters, and web pages name the format first
                letters = entry["image_base64"].rpartition(";base64,")[2]
                return base64.b64decode("".join(letters.split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadRecord("bad_base64") from error
        images = self._given or _images_beside(file.path, file.name)
        name, url = entry.get("image_name"), entry.get("raw_url")
        if isinstance(url, str) and (found := images.find_url(url)) is not None:
            return found
        if not isinstance(name, str):
            raise BadRecord("bad_image_info")
        return images.by_name(name)

    def _require_images(self) -> None:
        """Images are not part of MMC4. Raises UserError that tells how to download them when none is at hand."""
        items = self.records.read(0, min(DOCUMENTS_TO_JUDGE, len(self)))
        values = [(item.value, item.file) for item in items if isinstance(item, RawRecord)]
        for value, file in values:
            entries = value.get("image_info") if isinstance(value, dict) else None
            usable = [entry for entry in entries or () if isinstance(entry, dict)]
            if self._find(usable, file)[0]:
                return
        raise UserError(fetch_help("mmc4", [file.path for file in self.records.files], len(values)))


@lru_cache(maxsize=4)
def _images_beside(path: Path, name: str) -> ImageFinder:
    """The tar of the same name, else the folder."""
    tar = path.parent / f"{name.rpartition('/')[2]}.tar"
    return ImageFinder([tar] if tar.is_file() else [path.parent])
