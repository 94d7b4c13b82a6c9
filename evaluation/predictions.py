"""predictions.jsonl: written line by line by any number of processes, merged, and checked by id.

OUT/shards/00000-of-00002.jsonl ...   what each process has answered so far; survives a kill
OUT/predictions.jsonl                 all of it in the benchmark's order, once nothing is missing
OUT/images/*.png                      drawn images, named by id
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from evaluation.core import Prediction, Record
from vlgpt import seeds
from vlgpt.errors import UserError
from vlgpt.files import write_atomic
from vlgpt.images import png_bytes

SHOWN_IDS = 10


def process_of(id: str, *, num_processes: int) -> int:
    """Which process answers an example: depends on its id only."""
    return seeds.address("evaluation-process", id) % num_processes


def to_line(prediction: Record) -> str:
    """One line of a predictions file."""
    return json.dumps(prediction, ensure_ascii=False, sort_keys=True) + "\n"


class PredictionLog:
    """Appends predictions to the file of one process. A line that a kill cut short is removed on opening."""

    def __init__(self, folder: Path, *, rank: int, num_processes: int):
        folder = folder / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{rank:05d}-of-{num_processes:05d}.jsonl"
        self._file = path.open("ab")
        whole = path.read_bytes()
        self._file.truncate(whole.rfind(b"\n") + 1)

    def write(self, predictions: Iterable[Prediction]) -> None:
        """Append whole lines and hand them to the operating system: a killed process loses nothing."""
        self._file.write("".join(to_line(prediction) for prediction in predictions).encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file of this process; lines are already on disk."""
        self._file.close()


def save_image(folder: Path, id: str, image: Image.Image) -> str:
    """Write a drawn image as PNG, whole or not at all; the path below `folder`."""
    is_plain = re.fullmatch(r"\w[\w.-]{0,99}", id) is not None
    name = id if is_plain else hashlib.blake2b(id.encode(), digest_size=12).hexdigest()
    path = folder / "images" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, png_bytes(image))
    return path.relative_to(folder).as_posix()


def read_jsonl(path: Path, *, is_growing: bool = False) -> list[Prediction]:
    """Records of a predictions file. With `is_growing` a last line without its end is left out.

    Raises UserError that names the line when it is not a JSON object with an `id`.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if is_growing else lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not valid JSON ({error}); delete this line and run again"
            ) from error
        if not isinstance(record, dict) or "id" not in record:
            raise UserError(f'{path}:{number}: a prediction is {{"id": ..., ...}}, found {line[:80]!r}')
        record["id"] = str(record["id"])
        records.append(record)
    return records


def read_shards(folder: Path) -> dict[str, Prediction]:
    """What all processes have answered so far, by id.

    A question answered twice (after a restart with another number of processes) counts once; raises UserError
    where the two answers differ.
    """
    found: dict[str, Prediction] = {}
    for path in sorted((folder / "shards").glob("*-of-*.jsonl")):
        for record in read_jsonl(path, is_growing=True):
            other = found.setdefault(record["id"], record)
            if other != record:
                raise UserError(
                    f"{folder}: {record['id']!r} has two answers ({path.name}); the settings changed"
                    " between runs: delete the folder or choose another --output"
                )
    return found


def merge(folder: Path, ids: Sequence[str]) -> Path | None:
    """Write predictions.jsonl in the order of `ids` when every one is answered, else None. It may run many times."""
    found = read_shards(folder)
    if any(id not in found for id in ids):
        return None
    path = folder / "predictions.jsonl"
    write_atomic(path, "".join(to_line(found[id]) for id in ids))
    return path


@dataclass(frozen=True)
class IdCheck:
    """What is wrong with the ids of a predictions file."""

    missing: tuple[str, ...] = ()
    duplicate: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.duplicate or self.foreign)

    def __str__(self) -> str:
        found = asdict(self).items()
        return "; ".join(f"{len(ids)} {name} ids: {_shorten(ids)}" for name, ids in found if ids)


def _shorten(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
    return ", ".join(ids[:SHOWN_IDS]) + rest


def check_ids(found: Iterable[str], wanted: Iterable[str]) -> IdCheck:
    """Compare the ids of predictions with those of the benchmark."""
    counts, wanted = Counter(found), list(wanted)
    known = set(wanted)
    return IdCheck(
        missing=tuple(id for id in wanted if id not in counts),
        duplicate=tuple(id for id, count in counts.items() if count > 1),
        foreign=tuple(id for id in counts if id not in known),
    )
