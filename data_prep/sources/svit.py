"""SVIT: dialogues about Visual Genome images, as published or in the LLaVA format (BAAI/SVIT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from data_prep.sources.base import BadRecord, Columns, ImageOpener, Info, Record, mapping
from data_prep.sources.dialogue import dialogue_parts
from data_prep.sources.json_source import JsonSource, open_json
from data_prep.sources.llava import dialogue_images
from data_prep.sources.records import JsonRecords, RawRecord, TableRows
from vlgpt.document import Document

FOLDERS = ("VG_100K", "VG_100K_2")


class SvitSource(JsonSource):
    """Original files (`image_id` and a list of dialogues: every dialogue is a record) and the files of
    `format/llava-v1.5` (`image`, one dialogue). Images are looked up in `VG_100K` and `VG_100K_2`.
    """

    licence = "SVIT: CC BY 4.0, made with GPT-4 (OpenAI's terms apply); pictures: Visual Genome, CC BY 4.0"
    name, what = "svit", "SVIT file"
    wanted: ClassVar = {"turns": ("conversations",), "image": ("image_id", "image", "id")}

    def _open(self, inputs: Sequence[Path]) -> JsonRecords | TableRows:
        return open_json(
            inputs, self.wanted, source=self.name, what=self.what, kind="svit", count=num_dialogues
        )

    def make(self, raw: RawRecord) -> Record:
        """One dialogue about one Visual Genome image, from either format. Raises BadRecord when its turns do not
        fit.
        """
        value = mapping(raw.value)
        if is_original(value):
            dialogue = value["conversations"][raw.part]
            names = genome_names(value)
            images: tuple[ImageOpener, ...] = (self.images.by_name(*names),)
            turns = _turns(dialogue)
            info: Info = {"image_names": [names[-1]]}
            if isinstance(dialogue, dict) and isinstance(dialogue.get("topic"), str):
                info["topic"] = dialogue["topic"]
        else:
            found = dialogue_images(value)
            images = tuple(map(self.images.open, found))
            turns = value.get("conversations")
            info = {"image_names": [str(name) for name in found]} if found else {}
        parts = dialogue_parts(turns, num_images=len(images))
        return Record(Document(raw.key, "svit", parts, info), images)


def is_original(value: Columns) -> bool:
    """Whether `conversations` is a list of dialogues (else it is a list of turns)."""
    dialogues = value.get("conversations")
    if not isinstance(dialogues, list) or not dialogues:
        return False
    first = dialogues[0]
    return isinstance(first, list) or (isinstance(first, dict) and isinstance(first.get("content"), list))


def num_dialogues(value: object) -> int:
    """Records in one element of the file; an element that gives none counts as one, to be dropped by name."""
    return len(value["conversations"]) if isinstance(value, dict) and is_original(value) else 1


def _turns(dialogue: object) -> object:
    return dialogue.get("content") if isinstance(dialogue, dict) else dialogue


def genome_names(value: Columns) -> tuple[str, ...]:
    """Both places where Visual Genome may keep an image. Raises BadRecord(`bad_image_id`)."""
    number = value.get("image_id")
    if isinstance(number, bool) or not isinstance(number, (int, str)) or not str(number).isdigit():
        raise BadRecord("bad_image_id")
    return (*(f"{folder}/{number}.jpg" for folder in FOLDERS), f"{number}.jpg")
