"""python -m data_prep.dedup hash|find|apply: no picture twice, and none that an evaluation set holds.

    hash  DIR ...                                  pass 1: hashes per shard, beside the shards
    find  DIR ... [--against EVAL ...] --work W    pass 2: duplicates over all folders, contamination, a report
    apply DIR --work W --output NEW                a copy of DIR without them, every drop counted by reason

Each step runs as an array (--task-index, --num-tasks), can be killed and run again. Of equal pictures the
first stays, in the order of the folders as given. A document leaves when all its pictures are duplicates, or
any of them is in an evaluation set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from data_prep.duplicates import REASONS, find
from data_prep.hashes import hash_shard, load_hashes, store_hashes
from data_prep.rewrite import copy_without, require_copyable
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure
from vlgpt.shards import ShardSet

console = Console(stderr=True)


def hash_folder(folder: Path, *, task_index: int = 0, num_tasks: int = 1) -> int:
    """Store the hashes of this task's shards; returns how many were made now."""
    shards = ShardSet.open(folder)
    made = 0
    mine = range(task_index, len(shards.shards), num_tasks)
    for shard in track(mine, description=f"hash {folder.name}", console=console):
        record = shards.shards[shard]
        if load_hashes(folder, record.name, tar_sha256=record.sha256) is None:
            store_hashes(folder, record.name, hash_shard(shards, shard), tar_sha256=record.sha256)
            made += 1
    return made


def apply(folder: Path, *, work: Path, output: Path, task_index: int = 0, num_tasks: int = 1) -> bool:
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
    tasks = {"task_index": task_index, "num_tasks": num_tasks}
    return copy_without(folder, output, verdicts=verdicts, note=note, **tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done (or this task's share), 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.dedup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=("hash", "find", "apply"))
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="data set folders")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], help="find: evaluation sets (hashed folders)"
    )
    parser.add_argument(
        "--only-against",
        action="store_true",
        help="find: keep duplicates (several captions or dialogues of one picture), drop what --against holds",
    )
    parser.add_argument("--work", type=Path, help="find, apply: folder for pairs, verdicts and report.json")
    parser.add_argument("--output", type=Path, help="apply: the new data set")
    parser.add_argument(
        "--max-distance", type=int, default=3, help="find: bits of 64 that may differ (default: 3)"
    )
    parser.add_argument("--task-index", type=int, default=0, help="this task, from 0 (default: 0)")
    parser.add_argument("--num-tasks", type=int, default=1, help="tasks that share the work (default: 1)")
    arguments = parser.parse_args(argv)
    configure()
    task = {"task_index": arguments.task_index, "num_tasks": arguments.num_tasks}
    if not 0 <= arguments.task_index < arguments.num_tasks:
        raise UserError(
            f"--task-index must be between 0 and {arguments.num_tasks - 1}, found {arguments.task_index}"
        )
    if not 0 <= arguments.max_distance <= 15:
        raise UserError(f"--max-distance must be between 0 and 15, found {arguments.max_distance}")
    if arguments.step != "hash" and arguments.work is None:
        raise UserError(f"{arguments.step} needs --work, a folder for what find has found")
    if arguments.only_against and not arguments.against:
        raise UserError("--only-against compares with nothing: name the evaluation sets with --against")
    if arguments.step == "hash":
        for folder in arguments.folders:
            made = hash_folder(folder, **task)
            console.print(f"{folder}: {made} shards hashed", highlight=False, soft_wrap=True)
    elif arguments.step == "find":
        options = {
            "against": arguments.against,
            "work": arguments.work,
            "max_distance": arguments.max_distance,
            "is_only_against": arguments.only_against,
        }
        report = find(arguments.folders, **options, **task)
        console.print_json(json.dumps(report["folders"])) if report else console.print(
            "other tasks are not done yet"
        )
    else:
        if len(arguments.folders) != 1 or arguments.output is None:
            raise UserError("apply takes one DIR and --output, the folder of the new data set")
        done = apply(arguments.folders[0], work=arguments.work, output=arguments.output, **task)
        console.print(
            f"{arguments.output}: {'complete' if done else 'other tasks are not done yet'}", soft_wrap=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
