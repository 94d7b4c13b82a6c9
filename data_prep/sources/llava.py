"""LLaVA-Instruct: a JSON list of dialogues about COCO images (haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import ClassVar

from data_prep.sources.base import BadRecord, Columns, ImageOpener, Info, Record, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.join import ImageFinder
from data_prep.sources.json_source import JsonSource
from data_prep.sources.records import RawRecord
from vlgpt.document import Document

COCO_2014_FOLDERS = ("train2014", "val2014")


class LlavaSource(JsonSource):
    """Dialogues `{"id", "image", "conversations"}`, as a JSON list or JSON Lines; dialogues without an image
    stay text. Images are looked up as named and by their last names, also under their names of COCO 2014.
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
        images = tuple(find_coco(self.images, name) for name in names)
        info: Info = {"record_id": str(value.get("id", ""))}
        if names:
            info["image_names"] = list(names)
        return Record(Document(raw.key, "llava", parts, info), images)


def image_names(value: Columns) -> tuple[str, ...]:
    """The images of a dialogue, if it has any. Raises BadRecord(`bad_image_name`)."""
    image = value.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("bad_image_name")
    return tuple(names)


def find_coco(images: ImageFinder, name: str) -> ImageOpener:
    """An image under its name as given. A name of digits is also tried in train2017, then under its COCO 2014 name.

    Raises BadImage when none is there.
    """
    base = PurePosixPath(name).name
    if not base[:1].isdigit():
        return images.by_name(name)
    older = (f"{folder}/COCO_{folder}_{base}" for folder in COCO_2014_FOLDERS)
    return images.by_name(name, f"train2017/{base}", *older)
