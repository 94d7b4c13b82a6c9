"""Commits of a run: a checkpoint exists only once its marker does, and the marker vouches for every byte.

RUN/checkpoints/step_NNNNNNNN holds the files of all ranks, `rank_R.json` (names, sizes, hashes of the files of rank R)
and, written last, `COMMITTED.json` (hashes of the manifests). So the marker is a hash tree: who holds it can tell
whether any file changed. `train/together.py` tells the order in which several processes write and read commits.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from vlgpt.errors import UserError
from vlgpt.files import JsonObject, fsync_folder, sha256_file, write_atomic
from vlgpt.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

MARKER = "COMMITTED.json"
TRAINABLE_FILE = "trainable.safetensors"
AVERAGE_FILE = "average.safetensors"
SPACE_FACTOR = 1.2
_TAG = re.compile(r"^step_(\d{8})$")


class CommitFailed(RuntimeError):
    """A commit does not fit on the disk, or a rank could not write its part. Nothing of it is left."""


class FileRecord(TypedDict):
    """A file of a commit as its manifest records it."""

    name: str
    num_bytes: int
    sha256: str


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(tag: str) -> int:
    """Inverse of `tag_of`. Raises ValueError for another name."""
    match = _TAG.match(tag)
    if match is None:
        raise ValueError(f"{tag!r} is no checkpoint tag (step_NNNNNNNN)")
    return int(match.group(1))


def tags(root: Path) -> list[str]:
    """All checkpoint folders, committed or not, newest first."""
    if not root.is_dir():
        return []
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and _TAG.match(entry.name)]
    # Eight digits with leading zeros: the order of the names is that of the steps.
    return sorted(names, reverse=True)


def committed_tags(root: Path) -> list[str]:
    """Checkpoints that have a marker, newest first."""
    return [tag for tag in tags(root) if (root / tag / MARKER).is_file()]


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------- writing


def check_space(root: Path, *, first_estimate: int) -> None:
    """Refuse a commit that would not fit: 1.2 x the newest one, or x `first_estimate` bytes before there is one.

    Raises CommitFailed naming the bytes wanted and free.
    """
    newest_size = next((size_of(root / tag) for tag in committed_tags(root)), None)
    wanted = math.ceil(SPACE_FACTOR * (first_estimate if newest_size is None else newest_size))
    free = shutil.disk_usage(root).free
    if free < wanted:
        raise CommitFailed(
            f"a commit under {root} needs {wanted:,} bytes, {free:,} are free: make room, or lower checkpoint.keep"
        )


def write_manifest(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """fsync this rank's files and record their sizes and hashes in `rank_R.json`."""
    records = []
    for path in sorted(files):
        # The marker is written after this. Without fsync a power cut could keep the marker and lose the file.
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = str(path.relative_to(folder))
        records.append(FileRecord(name=name, num_bytes=path.stat().st_size, sha256=sha256_file(path)))
    manifest = {"rank": rank, "files": records}
    write_atomic(folder / f"rank_{rank}.json", json.dumps(manifest, indent=1))


def commit(folder: Path, *, world_size: int, facts: JsonObject, patience_s: float = 0.0) -> None:
    """Write the marker; call on rank 0 after a barrier. Raises ValueError when a rank's manifest is missing.

    `patience_s`: a network file system may show the files of other nodes a little later.
    """
    # The marker holds hashes of manifests, and they hold hashes of files: one small file vouches for terabytes.
    deadline_s = time.monotonic() + patience_s
    manifests = []
    for rank in range(world_size):
        path = folder / f"rank_{rank}.json"
        while not path.is_file() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        if not path.is_file():
            raise ValueError(f"{folder.name}: manifest of rank {rank} is missing, {world_size} expected")
        manifests.append(sha256_file(path))
    marker = {"world_size": world_size, "manifests": manifests, **facts}
    fsync_folder(folder.parent)  # the folder's own name
    write_atomic(folder / MARKER, json.dumps(marker, indent=1))


def discard(folder: Path) -> None:
    """Delete a checkpoint. The marker goes first, so a kill in between leaves a folder that counts as torn."""
    (folder / MARKER).unlink(missing_ok=True)
    # What cannot be deleted now counts as torn, and a later `prune` tries again.
    shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, *, keep: int) -> None:
    """Keep the newest `keep` committed checkpoints. Delete older ones, and torn ones older than the newest commit."""
    # A torn folder newer than the newest commit may be one that other ranks are writing now.
    committed = committed_tags(root)
    for tag in tags(root) if committed else []:
        if tag not in committed[:keep] and tag < committed[0]:
            discard(root / tag)


# ----------------------------------------------------------------------------------------------------------- verifying


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> JsonObject:
    """Check every byte the marker vouches for and return the marker. Raises ValueError naming the damage.

    `share` = (i, n): only every n-th manifest from the i-th on, so that n processes check n parts at once.
    """
    marker = _read_marker(folder)
    first, num_shares = share
    for rank in range(first, len(marker["manifests"]), num_shares):
        for record in _read_manifest(folder, marker, rank):
            _verify_file(folder, record)
    return marker


def verify_file(folder: Path, name: str) -> None:
    """Check one file of rank 0 alone: a copy of a commit may lack the others. Raises ValueError naming the damage."""
    records = {record["name"]: record for record in _read_manifest(folder, _read_marker(folder), 0)}
    if name not in records:
        raise ValueError(f"{name} is not in the manifest of rank 0")
    _verify_file(folder, records[name])


def _read_marker(folder: Path) -> JsonObject:
    path = folder / MARKER
    if not path.is_file():
        raise ValueError("not committed (killed while saving)")
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        # Taken apart here, so that valid JSON of another shape is refused like damaged JSON.
        return {**marker, "manifests": [*marker["manifests"]]}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"marker or manifest is not readable: {error!r}") from error


def _read_manifest(folder: Path, marker: JsonObject, rank: int) -> list[FileRecord]:
    """The records of a rank, whose manifest must have the hash that the marker holds."""
    path = folder / f"rank_{rank}.json"
    if not path.is_file() or sha256_file(path) != marker["manifests"][rank]:
        raise ValueError(f"manifest of rank {rank} is missing or damaged")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["files"]
        return [FileRecord(name=r["name"], num_bytes=r["num_bytes"], sha256=r["sha256"]) for r in records]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"marker or manifest is not readable: {error!r}") from error


def _verify_file(folder: Path, record: FileRecord) -> None:
    path = folder / record["name"]
    if not path.is_file():
        raise ValueError(f"{record['name']} is missing")
    # The size first: it needs no read, and a file cut short is the common damage.
    if path.stat().st_size != record["num_bytes"]:
        raise ValueError(
            f"{record['name']} has {path.stat().st_size} bytes, {record['num_bytes']} were written"
        )
    if sha256_file(path) != record["sha256"]:
        raise ValueError(f"{record['name']} is damaged (sha256 differs)")


# ------------------------------------------------------------------------------------------------------ trained weights


@dataclass(frozen=True)
class TrainedWeights:
    """Parameters by name, and the hashes of the frozen parts that they were trained with."""

    tag: str
    tensors: dict[str, Tensor]
    frozen: dict[str, str]


def newest_trainable(run: Path) -> TrainedWeights:
    """The newest commit of a run whose weights are whole; older ones are tried in turn, with a warning.

    With `optimizer.ema_decay` these are the moving average. One safetensors file holds them: no deepspeed, no pickle.
    Raises UserError when there is none.
    """
    # Not above: tests start and kill processes of the commit protocol by the hundred, which do without torch.
    from safetensors.torch import load_file

    for tag in committed_tags(run / "checkpoints"):
        folder = run / "checkpoints" / tag
        name = AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else TRAINABLE_FILE
        try:
            verify_file(folder, name)
        except ValueError as damage:
            get_logger("export").warning("checkpoint %s is passed over: %s", tag, damage)
            continue
        state: JsonObject = json.loads((folder / "state.json").read_text())
        return TrainedWeights(tag, load_file(folder / name), state.get("frozen", {}))
    raise UserError(f"run {run} has no committed checkpoint: train it first")
