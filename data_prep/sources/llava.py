"""LLaVA-Instruct: a JSON list of dialogues about COCO pictures (haotian-liu/LLaVA, docs/Data.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from data_prep.sources import Dropped, ImageOpener, Record
from data_prep.sources.convert import BadRecord, convert, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.inputs import require_keys
from data_prep.sources.join import Pictures
from data_prep.sources.json_records import JsonRecord, JsonRecords
from vlgpt.document import Document

COCO_2014_FOLDERS = ("train2014", "val2014")


class LlavaSource:
    """Dialogues `{"id", "image", "conversations"}`, as a JSON list or JSON Lines; dialogues without a picture
    stay text. Pictures are looked up as named and by their last names, also under their names of COCO 2014.
    """

    licence = "LLaVA-Instruct-150K: CC BY 4.0 (older copies: CC BY-NC 4.0), OpenAI's terms; pictures: COCO"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None, "folders or tars with the pictures; else beside the input"
        ] = None,
    ):
        self._records = JsonRecords(inputs, source="llava")
        first = self._records.first()
        found = first.value if isinstance(first.value, dict) else {}
        require_keys(found, {"turns": ("conversations",)}, where=first.file.path, what="LLaVA dialogue file")
        beside = sorted({file.path.parent for file in self._records.files})
        self._pictures = Pictures(images or beside)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One dialogue each."""
        return convert(self._records.read(start, stop), self._record)

    def _record(self, item: JsonRecord) -> Record:
        value = mapping(item.value)
        names = image_names(value)
        parts = dialogue_parts(value.get("conversations"), num_images=len(names))
        images = tuple(find_coco(self._pictures, name) for name in names)
        info: dict[str, Any] = {"record_id": str(value.get("id", ""))}
        if names:
            info["image_names"] = list(names)
        return Record(Document(item.key, "llava", parts, info), images)


def image_names(value: Mapping[str, Any]) -> tuple[str, ...]:
    """The picture of a dialogue, if it has one. Raises BadRecord(`bad_image_name`)."""
    image = value.get("image")
    names = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("bad_image_name")
    return tuple(names)


def find_coco(pictures: Pictures, name: str) -> ImageOpener:
    """A picture by its name, in COCO's folder of 2017, or by the name of the same picture in COCO 2014."""
    base = PurePosixPath(name).name
    if not base[:1].isdigit():
        return pictures.by_name(name)
    older = (f"{folder}/COCO_{folder}_{base}" for folder in COCO_2014_FOLDERS)
    return pictures.by_name(name, f"train2017/{base}", *older)
