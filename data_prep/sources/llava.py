"""LLaVA-Instruct: a JSON list of dialogues about COCO images (haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from data_prep.sources.base import BadRecord, Columns, Info, Record, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.join import image_reference
from data_prep.sources.json_source import JsonSource, open_records
from data_prep.sources.records import JsonRecords, RawRecord, TableRows
from vlgpt.document import Document
from vlgpt.image_formats import IMAGE_SUFFIXES

IMAGE_FIELDS, TURN_FIELDS = ("image", "images"), ("conversations", "texts")
OTHER_MEDIA_FIELD = re.compile(r"video|audio|speech|sound|music|point_?cloud|frames", re.IGNORECASE)
OTHER_IMAGE_FIELD = re.compile(r"(^|_)(image|img|picture|photo|pixel)", re.IGNORECASE)
OTHER_MEDIA_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".wav", ".mp3", ".flac", ".ogg", ".m4a")


class LlavaSource(JsonSource):
    """Dialogues `{"id", "image", "conversations"}`, as a JSON list, JSON Lines, or Parquet with the images inside;
    `image` (or `images`) is a name or a list, and dialogues without it stay text. Turns may also lie under `texts`
    as `{"user", "assistant"}` (FineVision). Images are looked up as named and by their last names, also under
    COCO's names of 2014 and 2017. Dialogues about films, sounds, and images under other fields are dropped.
    """

    licence = "LLaVA-Instruct-150K: CC BY 4.0 (older copies: CC BY-NC 4.0), OpenAI's terms; pictures: COCO"
    name, what = "llava", "LLaVA dialogue file"
    wanted: ClassVar = {"turns": TURN_FIELDS}

    def _open(self, inputs: Sequence[Path]) -> JsonRecords | TableRows:
        return open_records(inputs, self.wanted, source=self.name, what=self.what)

    def make(self, raw: RawRecord) -> Record:
        """A dialogue with the images that it names.

        Raises BadRecord for malformed turns or image names, or when the `<image>` tokens are not as many as the images;
        BadImage when an image is not found.
        """
        value = mapping(raw.value)
        images = dialogue_images(value)
        parts = dialogue_parts(_turns(value), num_images=len(images))
        openers = tuple(map(self.images.open, images))
        info: Info = {"record_id": str(value.get("id", ""))}
        if names := [image for image in images if isinstance(image, str)]:
            info["image_names"] = names
        return Record(Document(raw.key, "llava", parts, info), openers)


def _turns(value: Columns) -> object:
    """The turns of a dialogue, FineVision's pairs as LLaVA has them."""
    if (turns := value.get("conversations")) is not None:
        return turns
    pairs = value.get("texts")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        return pairs
    speakers = {"user": "human", "assistant": "gpt"}
    return [
        {"from": speaker, "value": pair.get(name)} for pair in pairs for name, speaker in speakers.items()
    ]


def dialogue_images(value: Columns) -> tuple[str | bytes, ...]:
    """The images of a dialogue, if it has any: names, or bytes where a table holds them.

    Raises BadRecord: `bad_image_name`; `other_media` for a film or a sound; `unknown_image_field` when the dialogue has
    no image but a field that looks as if it named one.
    """
    given = [value[field] for field in IMAGE_FIELDS if value.get(field) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise BadRecord("bad_image_name", "image and images differ")
    listed = given[0] if given and isinstance(given[0], list) else given[:1]
    held = tuple(map(image_reference, listed))
    for field, found in value.items():
        if field in (*IMAGE_FIELDS, *TURN_FIELDS):
            continue
        items = (
            [item for item in found if not isinstance(item, (int, float))]
            if isinstance(found, list)
            else [found]
        )
        if not any(items):
            continue
        if OTHER_MEDIA_FIELD.search(field) or _have_suffix(items, OTHER_MEDIA_SUFFIXES):
            raise BadRecord("other_media", field)
        if not held and (OTHER_IMAGE_FIELD.search(field) or _have_suffix(items, IMAGE_SUFFIXES)):
            raise BadRecord("unknown_image_field", field)
    return held


def _have_suffix(items: Sequence[object], suffixes: tuple[str, ...]) -> bool:
    return any(isinstance(item, str) and item.lower().endswith(suffixes) for item in items)
