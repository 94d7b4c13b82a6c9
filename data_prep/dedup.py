"""python -m data_prep.dedup hash|find|apply: no image twice, and none that an evaluation set holds.

    hash  DIR ...                                  pass 1: hashes per shard, beside the shards
    find  DIR ... [--against EVAL ...] --work W    pass 2: duplicates over all folders, contamination, a report
    apply DIR --work W --output NEW                a copy of DIR without them, every drop counted by reason

Each step runs as an array (--task-index, --num-tasks), can be killed and run again. Of equal images the first stays, in
the order of the folders as given. A document leaves when all its images are duplicates, or any of them is in an
evaluation set.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import track

from data_prep.duplicates import REASONS, find
from data_prep.hashes import hash_shard, load_hashes, store_hashes
from data_prep.options import Folders
from data_prep.rewrite import copy_without, require_copyable
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure
from vlgpt.options import Argument, ArrayOptions, parse
from vlgpt.processes import Share
from vlgpt.shards import ShardSet

console = Console(stderr=True)


class DedupOptions(ArrayOptions):
    """The command line."""

    step: Annotated[Literal["hash", "find", "apply"], Argument(is_positional=True)]
    folders: Folders = Field(description="data set folders")
    against: tuple[Path, ...] = Field((), description="find: evaluation sets (hashed folders)")
    only_against: bool = Field(
        False,
        description="find: keep duplicates (several captions or dialogues of one image), drop what --against holds",
    )
    work: Path | None = Field(None, description="find, apply: folder for pairs, verdicts and report.json")
    output: Path | None = Field(None, description="apply: the new data set")
    max_distance: int = Field(3, ge=0, le=15, description="find: bits of 64 that may differ")

    @model_validator(mode="after")
    def _check_step(self) -> DedupOptions:
        if self.step != "hash" and self.work is None:
            raise UserError(f"{self.step} needs --work, a folder for what find has found")
        if self.only_against and not self.against:
            raise UserError("--only-against compares with nothing: name the evaluation sets with --against")
        return self


def hash_folder(folder: Path, share: Share) -> int:
    """Store the hashes of this task's shards: -> how many were made now."""
    shards = ShardSet.open(folder)
    made = 0
    mine = share.of(len(shards.shards))
    for shard in track(mine, description=f"hash {folder.name}", console=console):
        record, place = shards.shards[shard], Path(shards.folder.where)
        if load_hashes(place, record.name, tar_sha256=record.sha256) is None:
            store_hashes(place, record.name, hash_shard(shards, shard), tar_sha256=record.sha256)
            made += 1
    return made


def apply(folder: Path, *, work: Path, output: Path, share: Share) -> bool:
    """Copy this task's shards without the documents that leave; True when the new data set is complete and
    sealed. Raises UserError when `find` has not judged this folder.
    """
    require_copyable(folder, output)
    fingerprint = ShardSet.open(folder).fingerprint
    path = work / f"drops-{fingerprint}.npz"
    if not path.is_file():
        raise UserError(f"{work} holds no verdicts on {folder}; run python -m data_prep.dedup find first")
    with np.load(path, allow_pickle=False) as archive:
        places = archive["places"]
    digest = hashlib.sha256(np.ascontiguousarray(places).tobytes()).hexdigest()[:12]

    def verdicts(shard: int) -> dict[int, str]:
        found = places[places[:, 0] == shard]
        return {sample: REASONS[reason] for _, sample, reason in found.tolist()}

    note = {"deduplicated": f"{fingerprint}-{digest}"}
    return copy_without(folder, output, verdicts=verdicts, note=note, share=share)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done (or this task's share), 2 wrong use."""
    options = parse(DedupOptions, argv, prog="python -m data_prep.dedup", description=__doc__)
    configure()
    if options.step == "hash":
        for folder in options.folders:
            made = hash_folder(folder, options.share)
            console.print(f"{folder}: {made} shards hashed", highlight=False, soft_wrap=True)
        return 0
    assert options.work is not None  # checked with the options
    if options.step == "find":
        report = find(
            options.folders,
            against=options.against,
            work=options.work,
            max_distance=options.max_distance,
            is_only_against=options.only_against,
            share=options.share,
        )
        if report is None:
            console.print("other tasks are not done yet")
        else:
            console.print_json(json.dumps(report["folders"], allow_nan=False))
        return 0
    if len(options.folders) != 1 or options.output is None:
        raise UserError("apply takes one DIR and --output, the folder of the new data set")
    is_done = apply(options.folders[0], work=options.work, output=options.output, share=options.share)
    console.print(
        f"{options.output}: {'complete' if is_done else 'other tasks are not done yet'}", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
