"""python -m data_prep.dedup hash|find|apply: no picture twice, and none that an evaluation set holds.

    hash  DIR ...                                  pass 1: hashes per shard, beside the shards
    find  DIR ... [--against EVAL ...] --work W    pass 2: duplicates over all folders, and contamination; a
    report apply DIR --work W --output NEW                a copy of DIR without them, every drop counted by
    reason

Each step runs as an array (--task-index, --num-tasks), can be killed and run again. Of equal pictures the
first stays, in the order of the folders as given. A document leaves when all its pictures are duplicates, or
any of them is in an evaluation set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from data_prep.duplicates import REASONS, find
from data_prep.hashes import hash_shard, load_hashes, store_hashes
from data_prep.job import SETTINGS
from vlgpt.log import UserError, configure, run_command
from vlgpt.shards import ShardSet, ShardWriter, write_manifest
from vlgpt.shards.atomic import write_atomic
from vlgpt.shards.manifest import read_report
from vlgpt.shards.stored import read_stored_samples

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
    sealed.
    """
    shards = ShardSet.open(folder)
    if shards.manifest is None or (output / SETTINGS) == (folder / SETTINGS):
        raise UserError(
            f"apply copies a data set of data_prep to another folder, found {folder} and {output}"
        )
    path = work / f"drops-{shards.fingerprint}.npz"
    if not path.is_file():
        raise UserError(f"{work} holds no verdicts on {folder}; run python -m data_prep.dedup find first")
    with np.load(path, allow_pickle=False) as archive:
        places = archive["places"]
    output.mkdir(parents=True, exist_ok=True)
    settings = {**shards.manifest.build, "deduplicated": f"{shards.fingerprint}-{len(places)}"}
    if not (output / SETTINGS).is_file():
        write_atomic(output / SETTINGS, json.dumps(settings, indent=1, sort_keys=True).encode())
    elif json.loads((output / SETTINGS).read_text()) != settings:
        raise UserError(f"{output} holds another data set; use another --output")
    mine = range(task_index, len(shards.shards), num_tasks)
    for shard in track(mine, description=f"apply {folder.name}", console=console):
        if read_report(output, shard) is None:
            _copy_shard(folder, output, shards, shard, dict(_verdicts_of(places, shard)))
    if any(read_report(output, shard) is None for shard in range(len(shards.shards))):
        return False
    manifest = shards.manifest
    write_manifest(
        output,
        name=manifest.name,
        licence=manifest.licence,
        versions=manifest.versions,
        build=settings,
        num_shards=len(shards.shards),
    )
    return True


def _verdicts_of(places: np.ndarray, shard: int) -> Iterator[tuple[int, str]]:
    for number, sample, reason in places[places[:, 0] == shard].tolist():
        assert number == shard
        yield sample, REASONS[reason]


def _copy_shard(folder: Path, output: Path, shards: ShardSet, shard: int, verdicts: dict[int, str]) -> None:
    report = read_report(folder, shard)
    if report is None:
        raise UserError(
            f"{folder}: shard {shard:05d} is missing or incomplete; run python -m data_prep.check {folder}"
        )
    stored = read_stored_samples(folder, report, with_incomplete=True)
    dropped = {place: reason for reason, found in report.dropped_records.items() for place in found}
    lost: dict[int, list[str]] = {}
    for reason, found in report.dropped_images.items():
        for place in found:
            lost.setdefault(place, []).append(reason)
    samples = {int(str(key)[-5:]): number for number, key in enumerate(shards.index(shard).keys)}
    writer = ShardWriter(output, shard, first_record=report.first_record, build=report.build)
    try:
        for place in range(report.num_records):
            leaves = dropped.get(place) or verdicts.get(samples[place])
            if leaves:
                writer.drop(leaves)
            else:
                writer.add(*stored[place], dropped_images=lost.get(place, ()))
        writer.close()
    except BaseException:
        writer.abort()
        raise


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
    if arguments.step == "hash":
        for folder in arguments.folders:
            made = hash_folder(folder, **task)
            console.print(f"{folder}: {made} shards hashed", highlight=False, soft_wrap=True)
    elif arguments.step == "find":
        options = {
            "against": arguments.against,
            "work": arguments.work,
            "max_distance": arguments.max_distance,
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
