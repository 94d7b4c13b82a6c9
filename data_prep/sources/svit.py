"""SVIT: dialogues about Visual Genome pictures, as published or in the LLaVA format (BAAI/SVIT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from data_prep.sources import Dropped, ImageOpener, Record
from data_prep.sources.convert import BadRecord, convert, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.inputs import require_keys
from data_prep.sources.join import Pictures
from data_prep.sources.json_records import JsonRecord, JsonRecords
from data_prep.sources.llava import find_coco, image_names
from vlgpt.document import Document

FOLDERS = ("VG_100K", "VG_100K_2")


class SvitSource:
    """Original files (`image_id` and a list of dialogues: every dialogue is a record) and the files of
    `format/llava-v1.5` (`image`, one dialogue). Pictures are looked up in `VG_100K` and `VG_100K_2`.
    """

    licence = "SVIT: CC BY 4.0, made with GPT-4 (OpenAI's terms apply); pictures: Visual Genome, CC BY 4.0"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None, "folder that holds VG_100K and VG_100K_2, or tars; else beside the input"
        ] = None,
    ):
        self._records = JsonRecords(inputs, source="svit", kind="svit", count=num_dialogues)
        first = self._records.first()
        found = first.value if isinstance(first.value, dict) else {}
        wanted = {"turns": ("conversations",), "picture": ("image_id", "image", "id")}
        require_keys(found, wanted, where=first.file.path, what="SVIT file")
        beside = sorted({file.path.parent for file in self._records.files})
        self._pictures = Pictures(images or beside)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One dialogue each."""
        return convert(self._records.read(start, stop), self._record)

    def _record(self, item: JsonRecord) -> Record:
        value = mapping(item.value)
        if is_original(value):
            dialogue = value["conversations"][item.part]
            names = genome_names(value)
            images: tuple[ImageOpener, ...] = (self._pictures.by_name(*names),)
            turns = _turns(dialogue)
            info: dict[str, Any] = {"image_names": [names[-1]]}
            if isinstance(dialogue, dict) and isinstance(dialogue.get("topic"), str):
                info["topic"] = dialogue["topic"]
        else:
            found = image_names(value)
            images = tuple(find_coco(self._pictures, name) for name in found)
            turns = value.get("conversations")
            info = {"image_names": list(found)} if found else {}
        parts = dialogue_parts(turns, num_images=len(images))
        return Record(Document(item.key, "svit", parts, info), images)


def is_original(value: Mapping[str, Any]) -> bool:
    """Whether `conversations` is a list of dialogues (else it is a list of turns)."""
    dialogues = value.get("conversations")
    if not isinstance(dialogues, list) or not dialogues:
        return False
    first = dialogues[0]
    return isinstance(first, list) or (isinstance(first, dict) and isinstance(first.get("content"), list))


def num_dialogues(value: Any) -> int:
    """Records in one element of the file; an element that gives none counts as one, to be dropped by name."""
    return len(value["conversations"]) if isinstance(value, dict) and is_original(value) else 1


def _turns(dialogue: Any) -> Any:
    return dialogue.get("content") if isinstance(dialogue, dict) else dialogue


def genome_names(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Both places where Visual Genome may keep a picture. Raises BadRecord(`bad_image_id`)."""
    number = value.get("image_id")
    if isinstance(number, bool) or not isinstance(number, (int, str)) or not str(number).isdigit():
        raise BadRecord("bad_image_id")
    return (*(f"{folder}/{number}.jpg" for folder in FOLDERS), f"{number}.jpg")
