"""The commit protocol: a checkpoint exists only once its marker does, and the marker vouches for every byte.

Here are its files; `together.py` tells the order in which several processes write and read them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlgpt.files import fsync_folder, sha256_file, write_atomic

MARKER = "COMMITTED.json"
SPACE_FACTOR = 1.2
_TAG = re.compile(r"^step_(\d{8})$")


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(tag: str) -> int:
    """Inverse of `tag_of`. Raises ValueError for another name."""
    match = _TAG.match(tag)
    if match is None:
        raise ValueError(f"{tag!r} is no checkpoint tag (step_NNNNNNNN)")
    return int(match.group(1))


class NotEnoughSpace(RuntimeError):
    """A commit does not fit on the disk, or a rank could not write its part; nothing of it is left."""


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_space(root: Path, *, first_estimate: int) -> None:
    """Refuse a commit that would not fit: 1.2 x the newest one, or x `first_estimate` bytes before there is one.

    Raises NotEnoughSpace naming the bytes wanted and free.
    """
    newest_size = next((size_of(root / tag) for tag in tags(root) if (root / tag / MARKER).is_file()), None)
    wanted = math.ceil(SPACE_FACTOR * (first_estimate if newest_size is None else newest_size))
    free = shutil.disk_usage(root).free
    if free < wanted:
        raise NotEnoughSpace(
            f"a commit under {root} needs {wanted:,} bytes, {free:,} are free: make room, or lower checkpoint.keep"
        )


def write_manifest(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """fsync this rank's files and record their sizes and hashes in `rank_R.json`."""
    records = []
    for path in sorted(files):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        records.append(
            {
                "name": str(path.relative_to(folder)),
                "num_bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
        )
    manifest = {"rank": rank, "files": records}
    write_atomic(folder / f"rank_{rank}.json", json.dumps(manifest, indent=1).encode())


def commit(folder: Path, *, world_size: int, facts: dict[str, Any], patience_s: float = 0.0) -> None:
    """Write the marker; call on rank 0 after a barrier. Raises ValueError when a rank's manifest is missing.

    `patience_s`: a network file system may show the files of other nodes a little later.
    """
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
    write_atomic(folder / MARKER, json.dumps(marker, indent=1).encode())


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Check every byte the marker vouches for and return the marker. Raises ValueError naming the damage.

    `share` = (i, n): only every n-th manifest from the i-th on, so that n processes check n parts at once.
    """
    path = folder / MARKER
    if not path.is_file():
        raise ValueError("not committed (killed while saving)")
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        first, num_shares = share
        for rank, expected in enumerate(marker["manifests"]):
            if rank % num_shares != first:
                continue
            manifest_path = folder / f"rank_{rank}.json"
            if not manifest_path.is_file() or sha256_file(manifest_path) != expected:
                raise ValueError(f"manifest of rank {rank} is missing or damaged")
            for record in json.loads(manifest_path.read_text(encoding="utf-8"))["files"]:
                _verify_file(folder, record)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"marker or manifest is not readable: {error!r}") from error
    return marker


def _verify_file(folder: Path, record: dict[str, Any]) -> None:
    path = folder / record["name"]
    if not path.is_file():
        raise ValueError(f"{record['name']} is missing")
    if path.stat().st_size != record["num_bytes"]:
        raise ValueError(
            f"{record['name']} has {path.stat().st_size} bytes, {record['num_bytes']} were written"
        )
    if sha256_file(path) != record["sha256"]:
        raise ValueError(f"{record['name']} is damaged (sha256 differs)")


def tags(root: Path) -> list[str]:
    """All checkpoint folders, newest first."""
    if not root.is_dir():
        return []
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and _TAG.match(entry.name)]
    return sorted(names, reverse=True)


def discard(folder: Path) -> None:
    """Delete a checkpoint. The marker goes first, so a kill in between leaves a folder that nobody trusts."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, *, keep: int) -> None:
    """Delete old checkpoints but the newest `keep` committed ones; torn ones older than those go too."""
    committed = [tag for tag in tags(root) if (root / tag / MARKER).is_file()]
    for tag in tags(root) if committed else []:
        if tag not in committed[:keep] and tag < committed[0]:
            discard(root / tag)
