"""Commits by several processes: all save or none, and all resume from the same one, errors included.

Order of a save: room is made -> every rank writes -> every rank fsyncs its files and writes `rank_R.json` (names,
sizes, hashes) -> rank 0 checks that all manifests are there and writes `COMMITTED.json` by temporary file, fsync and
rename -> old tags are deleted last. So at any moment of a kill there is an old commit that is whole, a new one that is
whole, or both. The processes meet between the steps and tell each other what failed. No deepspeed and no torch here, so
that a test can kill two real processes a hundred times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

from vlgpt import commits
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.log import get_logger

T = TypeVar("T")
PATIENCE_S = 60.0  # for manifests of other nodes on a network file system


class Group(Protocol):
    """The processes of a run, as `Engine` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def gather_objects(self, value: T) -> list[T]:
        """One JSON-like value per rank, on every rank. Raises when a process is lost."""


class Alone:
    """A group of one process."""

    rank, world_size = 0, 1

    def gather_objects(self, value: T) -> list[T]:
        """A list of the value alone, since there is one process."""
        return [value]


def on_rank_0(group: Group, action: Callable[[], T]) -> T:
    """Run something on rank 0 and give its JSON-like value to all; an OSError there is raised on all ranks."""
    outcome: tuple[T | None, str] = (None, "")
    if group.rank == 0:
        try:
            outcome = action(), ""
        except OSError as error:
            outcome = None, str(error) or "an OSError without a message"
    value, failure = group.gather_objects(outcome)[0]
    if failure:
        raise OSError(failure)
    return cast(T, value)


# -------------------------------------------------------------------------------------------------------------- saving


def save(
    group: Group,
    root: Path,
    *,
    step: int,
    write: Callable[[Path], None],
    owned: Callable[[Path], list[Path]],
    keep: int,
    first_estimate: int,
    facts: JsonObject | None = None,
) -> Path:
    """Commit what `write(folder)` writes on every rank (collective), prune old tags, return the folder.

    `owned(folder)`: the files that this rank vouches for, once all have written. Raises commits.CommitFailed on all
    ranks alike when the disk is too full or a rank could not write; what was written is deleted then.
    """
    folder = root / commits.tag_of(step)
    refusal = on_rank_0(group, lambda: _make_room(root, folder, first_estimate))
    if refusal:
        raise commits.CommitFailed(refusal)
    _all_or_none(group, folder, lambda: write(folder))
    _all_or_none(group, folder, lambda: commits.write_manifest(folder, group.rank, owned(folder)))
    marker = {"step": step, **(facts or {})}
    _all_or_none(group, folder, lambda: _seal(group, folder, marker))
    on_rank_0(group, lambda: _prune(root, keep))
    return folder


def _seal(group: Group, folder: Path, marker: JsonObject) -> None:
    if group.rank == 0:
        commits.commit(folder, world_size=group.world_size, facts=marker, patience_s=PATIENCE_S)


def _prune(root: Path, keep: int) -> None:
    try:
        commits.prune(root, keep=keep)
    except OSError as error:  # the new commit is safe: no reason to stop
        get_logger().warning("old checkpoints under %s cannot be deleted: %s", root, error)


def _make_room(root: Path, folder: Path, first_estimate: int) -> str:
    """Delete a torn folder of the same step, check the free space, make the folder; returns why not, or nothing."""
    root.mkdir(parents=True, exist_ok=True)
    commits.discard(folder)
    try:
        commits.check_space(root, first_estimate=first_estimate)
    except commits.CommitFailed as error:
        return str(error)
    folder.mkdir()
    return ""


def _all_or_none(group: Group, folder: Path, action: Callable[[], None]) -> None:
    """Run a step of a save on every rank; if it failed anywhere, nothing of the folder is left and all raise."""
    failure = ""
    try:
        action()
    except (OSError, ValueError) as error:
        failure = f"rank {group.rank}: {error}"
    failures = [text for text in group.gather_objects(failure) if text]
    if failures:
        on_rank_0(group, lambda: commits.discard(folder))
        raise commits.CommitFailed(f"{folder} could not be written ({'; '.join(failures)}): make room")


# ------------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, its marker, and what was passed over and why."""

    tag: str
    marker: JsonObject
    skipped: tuple[tuple[str, str], ...]


def newest(root: Path, group: Group | None = None) -> Found | None:
    """Newest checkpoint that verifies (collective: the ranks share the work); None when there is none at all.

    Raises UserError on all ranks when checkpoints are there but none is good: starting over would lose the run.
    """
    group = group or Alone()
    skipped: list[tuple[str, str]] = []
    was_committed = False
    for tag in on_rank_0(group, lambda: commits.tags(root)):
        reports = group.gather_objects(_examine(root / tag, (group.rank, group.world_size)))
        damage = next((report["damage"] for report in reports if "damage" in report), "")
        if not damage and any(report != reports[0] for report in reports):
            damage = "ranks read different markers"
        if not damage:
            return Found(tag, reports[0]["marker"], tuple(skipped))
        was_committed = was_committed or any(report["is_committed"] for report in reports)
        skipped.append((tag, damage))
        if group.rank == 0:
            get_logger().warning("checkpoint %s is passed over: %s", tag, damage)
    if was_committed:
        listing = "; ".join(f"{tag}: {why}" for tag, why in skipped)
        raise UserError(
            f"no checkpoint under {root} is whole ({listing}); restore one, or set checkpoint.resume=never"
        )
    return None


def _examine(folder: Path, share: tuple[int, int]) -> JsonObject:
    """The marker, or the damage that this rank found in its share of the files."""
    is_committed = (folder / commits.MARKER).exists()
    try:
        return {"is_committed": is_committed, "marker": commits.verify(folder, share=share)}
    except (ValueError, OSError) as error:
        return {"is_committed": is_committed, "damage": str(error)}
