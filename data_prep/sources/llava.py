"""LLaVA-Instruct: a JSON list of dialogues about COCO images (haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from data_prep.sources.base import BadRecord, Columns, Info, Record, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.join import coco_names
from data_prep.sources.json_source import JsonSource
from data_prep.sources.records import RawRecord
from vlgpt.document import Document
from vlgpt.image_formats import IMAGE_SUFFIXES

IMAGE_FIELDS = ("image", "images")
OTHER_MEDIA_FIELD = re.compile(r"video|audio|speech|sound|music|point_?cloud|frames", re.IGNORECASE)
OTHER_IMAGE_FIELD = re.compile(r"(^|_)(image|img|picture|photo|pixel)", re.IGNORECASE)
OTHER_MEDIA_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".wav", ".mp3", ".flac", ".ogg", ".m4a")


class LlavaSource(JsonSource):
    """Dialogues `{"id", "image", "conversations"}`, as a JSON list or JSON Lines; `image` (or `images`) is a name or
    a list, and dialogues without it stay text. Images are looked up as named and by their last names, also under
    COCO's names of 2014 and 2017. Dialogues about films, sounds, and images under other fields are dropped.
    """

    licence = "LLaVA-Instruct-150K: CC BY 4.0 (older copies: CC BY-NC 4.0), OpenAI's terms; pictures: COCO"
    name, what = "llava", "LLaVA dialogue file"
    wanted: ClassVar = {"turns": ("conversations",)}

    def make(self, raw: RawRecord) -> Record:
        """A dialogue with the images that it names.

        Raises BadRecord for malformed turns or image names, or when the `<image>` tokens are not as many as the images;
        BadImage when an image is not found.
        """
        value = mapping(raw.value)
        names = image_names(value)
        parts = dialogue_parts(value.get("conversations"), num_images=len(names))
        images = tuple(self.images.by_name(*coco_names(name)) for name in names)
        info: Info = {"record_id": str(value.get("id", ""))}
        if names:
            info["image_names"] = list(names)
        return Record(Document(raw.key, "llava", parts, info), images)


def image_names(value: Columns) -> tuple[str, ...]:
    """The images of a dialogue, if it has any.

    Raises BadRecord: `bad_image_name`; `other_media` for a film or a sound; `unknown_image_field` when the dialogue has
    no image but a field that looks as if it named one.
    """
    given = [value[field] for field in IMAGE_FIELDS if value.get(field) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise BadRecord("bad_image_name", "image and images differ")
    names = given[0] if given and isinstance(given[0], list) else given[:1]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("bad_image_name")
    for field, found in value.items():
        if not found or field in (*IMAGE_FIELDS, "conversations"):
            continue
        if OTHER_MEDIA_FIELD.search(field) or any(_ends_with(found, OTHER_MEDIA_SUFFIXES)):
            raise BadRecord("other_media", field)
        if not names and (OTHER_IMAGE_FIELD.search(field) or any(_ends_with(found, IMAGE_SUFFIXES))):
            raise BadRecord("unknown_image_field", field)
    return tuple(names)


def _ends_with(found: object, suffixes: tuple[str, ...]) -> Iterator[bool]:
    """For a string, or every item of a list: is it a name with one of these suffixes?"""
    for item in found if isinstance(found, list) else [found]:
        yield isinstance(item, str) and item.lower().endswith(suffixes)
