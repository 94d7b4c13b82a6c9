"""Precompute what frozen encoders give, beside the shards: `python -m data_prep.features DIR --features
patches,...`.

One array per shard and feature, written atomically and never twice: rerunning continues where a kill left
off. Every feature carries a FeatureSpec (encoder, weights hash, layer, preprocessing, shape), which training
compares. The work is shared by array tasks (--task-index, --num-tasks), each of several processes
(--num-workers), which take the visible GPUs in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from data_prep.feature_jobs import PER, FeatureJob, compute_shard, make_job
from data_prep.workers import STOPPED
from vlgpt import log
from vlgpt.errors import UserError
from vlgpt.models.conditions import load_conditioner
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.shards import ShardSet, write_spec

FEATURES = tuple(PER)


@dataclass(frozen=True)
class Share:
    """Shards `first, first + step, ...` of every folder: what one process does."""

    first: int
    step: int
    device: str


@dataclass(frozen=True)
class Tally:
    """What one process did for one feature of one folder."""

    folder: Path
    feature: str
    num_rows: int
    seconds: float
    bytes_per_row: int
    flops_per_row: int


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done (or this task's share), 1 a process died, 2 wrong use, 75 stopped by a signal."""
    log.configure()
    arguments = _parse(argv)
    signal.signal(signal.SIGTERM, _stop)
    num_shares = arguments.num_tasks * arguments.num_workers
    shares = [
        Share(arguments.task_index + worker * arguments.num_tasks, num_shares, _device(arguments, worker))
        for worker in range(arguments.num_workers)
    ]
    started = time.monotonic()
    if len(shares) == 1:
        tallies = compute_share(arguments, shares[0])
    else:
        tallies = _run_processes(arguments, shares)
    _report(arguments.dir, tallies, seconds=time.monotonic() - started)
    return 0


def compute_share(arguments: argparse.Namespace, share: Share, *, parent: int | None = None) -> list[Tally]:
    """Every wanted feature of every folder. With `parent`, the work ends when that process is gone."""

    def on_batch(num_rows: int) -> None:
        if parent is not None and os.getppid() != parent:
            raise SystemExit(STOPPED)

    torch.set_num_threads(arguments.threads)
    jobs = _make_jobs(arguments, share.device)
    flops = {job.spec.name: job.flops_per_row() for job in jobs}
    tallies = []
    for folder in arguments.dir:
        shards = ShardSet.open(folder)
        for job in jobs:
            name, num_rows, started = job.spec.name, 0, time.monotonic()
            write_spec(folder, job.spec)
            for shard in range(share.first, len(shards.shards), share.step):
                num_rows += compute_shard(
                    job, shards, shard, folder=folder, batch_size=arguments.batch_size, on_batch=on_batch
                )
            seconds = time.monotonic() - started
            tallies.append(Tally(folder, name, num_rows, seconds, job.bytes_per_row, flops[name]))
    return tallies


def _make_jobs(arguments: argparse.Namespace, device: str) -> list[FeatureJob]:
    encoder = load_conditioner(
        arguments.encoder,
        library=arguments.library,
        pretrained=arguments.pretrained,
        layer=arguments.layer,
        has_cls=arguments.has_cls,
    ).to(device)
    tokenizer = None
    if arguments.image_tokenizer is not None:
        tokenizer = ImageTokenizer.from_folder(arguments.image_tokenizer).eval().to(device)
    return [
        make_job(
            name,
            encoder,
            encoder_name=f"{arguments.library}:{Path(arguments.encoder).name}",
            tokenizer=tokenizer,
            dtype=arguments.dtype,
            views=arguments.views,
            seed=arguments.seed,
            precision=arguments.precision,
        )
        for name in arguments.features
    ]


def _device(arguments: argparse.Namespace, worker: int) -> str:
    """`cuda` means the visible GPUs in turns."""
    if arguments.device != "cuda":
        return arguments.device
    return f"cuda:{(arguments.task_index * arguments.num_workers + worker) % torch.cuda.device_count()}"


def _run_processes(arguments: argparse.Namespace, shares: Sequence[Share]) -> list[Tally]:
    """One process per share. Raises UserError when one of them fails; the others still finish their shares."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    running = []
    for share in shares:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(arguments, share, sender, os.getpid()), daemon=True)
        process.start()
        sender.close()
        running.append((process, receiver))
    tallies: list[Tally] = []
    problems = []
    for number, (process, receiver) in enumerate(running):
        try:
            result = receiver.recv()
        except EOFError:
            process.join()
            result = f"process {number} ended with exit code {process.exitcode}; run the same command again"
        if isinstance(result, str):
            problems.append(result)
        else:
            tallies += result
        process.join()
    if problems:
        raise UserError(problems[0])
    return tallies


def _work(arguments: argparse.Namespace, share: Share, sender: Connection, parent: int) -> None:
    log.configure(rank=share.first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sender.send(compute_share(arguments, share, parent=parent))
    except (UserError, OSError) as error:
        sender.send(str(error))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(STOPPED)  # daemons end with their parent; what is stored stays


def _report(folders: Sequence[Path], tallies: Sequence[Tally], *, seconds: float) -> None:
    """Speed, and what storing costs against computing."""
    for folder in folders:
        stored = ShardSet.open(folder)
        num_images = max(stored.num_images, 1)
        picture_bytes = sum(record.num_bytes for record in stored.shards) / num_images
        for feature in dict.fromkeys(tally.feature for tally in tallies):
            mine = [tally for tally in tallies if (tally.folder, tally.feature) == (folder, feature)]
            num_rows, slowest = sum(tally.num_rows for tally in mine), max(tally.seconds for tally in mine)
            log.get_logger().info("%s", _line(folder, feature, num_rows, max(slowest, 1e-9)))
            bytes_per_row, flops = mine[0].bytes_per_row, mine[0].flops_per_row
            log.get_logger().info("%s", _trade_off(feature, bytes_per_row, flops, picture_bytes))
    log.get_logger().info("all in %.1f s", seconds)


def _line(folder: Path, feature: str, num_rows: int, seconds: float) -> str:
    what = "images" if PER[feature] == "image" else "texts"
    if not num_rows:
        return f"{folder} {feature}: nothing to do"
    return f"{folder} {feature}: {num_rows} {what}, {num_rows / seconds:.1f} {what}/s"


def _trade_off(feature: str, bytes_per_row: int, flops: int, picture_bytes: float) -> str:
    """At 1,000 rows per second: what must be read with features stored, and computed without."""
    what = "image" if PER[feature] == "image" else "text"
    ratio = f" ({bytes_per_row / picture_bytes:.1f} x its picture)" if what == "image" else ""
    return (
        f"{feature}: {bytes_per_row / 1e3:.1f} kB{ratio} and {flops / 1e9:.2f} GFLOPs each; 1000 {what}s/s cost "
        f"{bytes_per_row / 1e3:.1f} MB/s of reading when stored, {flops / 1e9:.2f} TFLOP/s when computed online"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.features", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("dir", type=Path, nargs="+", metavar="DIR", help="data set folders with shards")
    parser.add_argument(
        "--features", default="patches,image_condition,text_condition", help=f"of {', '.join(FEATURES)}"
    )
    parser.add_argument(
        "--encoder",
        required=True,
        help="CLIP folder or name; with --library ip_adapter the JSON of a diffusion decoder's parts",
    )
    parser.add_argument("--library", choices=("open_clip", "transformers", "ip_adapter"), default="open_clip")
    parser.add_argument("--pretrained", help="weights of a named open_clip model")
    parser.add_argument(
        "--layer", type=int, default=-2, help="hidden layer of patch features (default: penultimate)"
    )
    parser.add_argument("--drop-cls", dest="has_cls", action="store_false", help="leave the class token out")
    parser.add_argument(
        "--image-tokenizer", type=Path, help="image_tokenizer folder of stage 1 (feature visual)"
    )
    parser.add_argument("--dtype", choices=("float16", "float32", "int8"), default="float16")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the encoder's matrix products (default: float32; bfloat16 is several times faster on a GPU)",
    )
    parser.add_argument(
        "--views", type=int, default=1, help="views per picture: the clean one and augmented ones"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process on CPU")
    parser.add_argument("--num-workers", type=int, default=1, help="processes; each loads the encoder")
    parser.add_argument("--task-index", type=int, default=0, help="this task of an array")
    parser.add_argument("--num-tasks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.features = tuple(arguments.features.split(","))
    if unknown := set(arguments.features) - set(FEATURES):
        raise UserError(f"unknown feature {sorted(unknown)[0]!r}; valid: {', '.join(FEATURES)}")
    if arguments.library == "ip_adapter" and {"patches", "visual"} & set(arguments.features):
        raise UserError(
            "--library ip_adapter makes image_condition and text_condition; run patches and visual with their own CLIP"
        )
    for name in ("views", "batch_size", "threads", "num_workers", "num_tasks"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, found {getattr(arguments, name)}")
    if not 0 <= arguments.task_index < arguments.num_tasks:
        raise UserError(
            f"--task-index must be between 0 and {arguments.num_tasks - 1}, found {arguments.task_index}"
        )
    return arguments


if __name__ == "__main__":
    sys.exit(log.run_command(main))
