"""MagicBrush: images edited by hand in several turns, as editing dialogues."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from data_prep.sources.base import BadRecord, Dropped, ImageOpener, Record, convert, table_image, text
from data_prep.sources.inputs import find_files
from data_prep.sources.records import TABLE_SUFFIXES, RowCursor, TableRows
from data_prep.sources.templates import edit_chat
from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.log import get_logger

HELD_OUT = ("dev", "test", "validation")
COLUMNS = {
    "img_id": ("img_id",),
    "turn_index": ("turn_index",),
    "source": ("source_img",),
    "instruction": ("instruction",),
    "target": ("target_img",),
}


@dataclass(frozen=True, slots=True)
class Session:
    """The rows that edit one image, in order of turns."""

    key: str
    rows: tuple[int, ...]


class MagicBrushSource:
    """Parquet files of osunlp/MagicBrush. `multi` makes one dialogue of all turns on an image: a turn edits
    the result of the turn before, and shows its own source only where there is none. `single` makes a chat of
    every row. The test split is published apart, to keep it out of training data.
    """

    licence = "MagicBrush: CC BY 4.0; pictures: COCO, Flickr's terms of use. Never train on its test split"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        turns: Annotated[Literal["multi", "single"], "a dialogue per image, or a chat per row"] = "multi",
        split: Annotated[Literal["train", "all"], "train passes over files named dev-* and test-*"] = "train",
    ):
        files = [file.path for file in find_files(inputs, TABLE_SUFFIXES, source="magicbrush")]
        chosen = [path for path in files if split == "all" or not path.name.startswith(HELD_OUT)]
        if not chosen:
            raise UserError(f"{files[0]} and the like are splits for evaluation; --split all reads them")
        for path in sorted(set(files) - set(chosen)):
            get_logger("magicbrush").warning("%s is left out: its split is for evaluation", path)
        self._rows = TableRows(chosen, COLUMNS, source="magicbrush", what="MagicBrush table")
        numbers, turn_numbers = self._rows.column("img_id"), self._rows.column("turn_index")
        groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for row, (number, turn) in enumerate(zip(numbers, turn_numbers)):
            key = str(number) if turns == "multi" else f"{number}:{turn}:{row}"
            groups[key].append((turn if type(turn) is int else 0, row))
        self._sessions = [
            Session(key, tuple(row for _, row in sorted(group))) for key, group in groups.items()
        ]

    def __len__(self) -> int:
        return len(self._sessions)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One dialogue each, in order of each image's first row."""
        cursor = RowCursor(self._rows)
        return convert(self._sessions[start:stop], partial(self._record, cursor=cursor))

    def _record(self, session: Session, *, cursor: RowCursor) -> Record:
        rows = []
        for number in session.rows:
            row = cursor.row(number)
            if isinstance(row, Dropped):
                raise BadRecord(row.reason)
            rows.append(row)
        turns = [row.value["turn_index"] for row in rows]
        if any(type(turn) is not int for turn in turns):
            raise BadRecord("bad_turn_index")
        if len(set(turns)) < len(turns):
            raise BadRecord("duplicate_turn")
        instructions: list[tuple[str, bool]] = []
        images: list[ImageOpener] = []
        for place, row in enumerate(rows):
            shows_source = place == 0 or turns[place] != turns[place - 1] + 1
            if shows_source:
                images.append(table_image(row.value["source_img"]))
            instructions.append((text(row.value, "instruction", word="instruction"), shows_source))
            images.append(table_image(row.value["target_img"]))
        info = {"image_id": str(rows[0].value["img_id"]), "turns": turns}
        return Record(Document(session.key, "magicbrush", edit_chat(instructions), info), tuple(images))
