"""InstructPix2Pix: picture, instruction, edited picture; the original folder or the Parquet copy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.sources import Dropped, ImageOpener, Record
from data_prep.sources.convert import BadRecord, convert, mapping, numbers, table_image, text
from data_prep.sources.tables import Row, TableRows
from data_prep.sources.templates import edit_chat
from vlgpt.document import Document
from vlgpt.images import BadImage
from vlgpt.log import UserError

SEEDS = "seeds.json"
SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0), "all": (0.0, 1.0)}
SCORES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image", "p2p_threshold", "cfg_scale")
COLUMNS = {
    "picture": ("original_image",),
    "instruction": ("edit_prompt",),
    "edited picture": ("edited_image",),
}
PROMPTS = ("original_prompt", "edited_prompt")


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of pictures in the original folder."""

    key: str
    folder: Path
    seed: str


class InstructPix2PixSource:
    """Editing chats (Table 6 of the paper). Input: the folder with `seeds.json`, or Parquet files
    (timbrooks/instructpix2pix-clip-filtered). Every pair of pictures is a record.
    """

    licence = "InstructPix2Pix data: MIT; generated pictures, CreativeML Open RAIL-M"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        split: Annotated[
            Literal["train", "val", "test", "all"], "by position in seeds.json: 90, 5 and 5 percent"
        ] = "train",
    ):
        seeds = [path / SEEDS if path.is_dir() else path for path in inputs]
        is_folder = bool(seeds) and all(path.name == SEEDS and path.is_file() for path in seeds)
        self._pairs = [pair for path in seeds for pair in _pairs(path, split)] if is_folder else None
        if self._pairs is None:
            what = f"InstructPix2Pix table (a folder is known by its {SEEDS})"
            self._rows = TableRows(inputs, COLUMNS, optional=PROMPTS, source="instructpix2pix", what=what)

    def __len__(self) -> int:
        return len(self._rows) if self._pairs is None else len(self._pairs)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One pair of pictures each."""
        if self._pairs is None:
            return convert(self._rows.read(start, stop), _row_record)
        return convert(self._pairs[start:stop], _pair_record)


def _row_record(row: Row) -> Record:
    images = table_image(row.value["original_image"]), table_image(row.value["edited_image"])
    info = {name: row.value[name] for name in PROMPTS if isinstance(row.value.get(name), str)}
    return _record(row.key, text(row.value, "edit_prompt", word="instruction"), images, info)


def _pair_record(pair: Pair) -> Record:
    prompt = _json_object(pair.folder / "prompt.json")
    info = {
        name: prompt[field]
        for name, field in zip(PROMPTS, ("input", "output"))
        if isinstance(prompt.get(field), str)
    }
    images = tuple(pair.folder / f"{pair.seed}_{number}.jpg" for number in (0, 1))
    info |= _scores(pair.folder / "metadata.jsonl", pair.seed)
    return _record(pair.key, text(prompt, "edit", word="instruction"), images, info)


def _record(key: str, instruction: str, images: tuple[ImageOpener, ...], info: Mapping[str, Any]) -> Record:
    parts = edit_chat([(instruction, True)])
    return Record(Document(key, "instructpix2pix", parts, {**info, "instruction": instruction}), images)


def _pairs(seeds: Path, split: str) -> list[Pair]:
    """Raises UserError when seeds.json is not a list of [folder, [seed, ...]]."""
    try:
        content = json.loads(seeds.read_bytes())
        listed = [(str(name), [str(seed) for seed in found]) for name, found in content]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{seeds} must be a list of [folder, [seed, ...]]: {error}") from error
    for name, found in listed:
        if not all(part.isalnum() for part in (name, *found)):
            raise UserError(f"{seeds}: folders and seeds are numbers, found {name!r} with seeds {found!r}")
    # UPSTREAM: floor(share * length), as in instruct-pix2pix's edit_dataset.py
    first, last = (math.floor(share * len(listed)) for share in SPLITS[split])
    pairs = [(name, seed) for name, found in listed[first:last] for seed in found]
    return [Pair(f"{name}/{seed}", seeds.parent / name, seed) for name, seed in pairs]


def _json_object(path: Path) -> Mapping[str, Any]:
    """Raises BadImage(`missing_file`) or BadRecord(`bad_json`)."""
    try:
        return mapping(json.loads(path.read_bytes()))
    except OSError as error:
        raise BadImage("missing_file", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json") from error


def _scores(path: Path, seed: str) -> dict[str, Any]:
    """CLIP scores of this pair, where `metadata.jsonl` is there and has them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and str(value.get("seed")) == seed:
            return numbers(value, {name: (name,) for name in SCORES})
    return {}
