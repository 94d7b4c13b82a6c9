"""python -m data_prep.features DIR --encoder CLIP --features patches,...: encoder outputs beside the shards.

One array per shard and feature, written atomically: running the command again continues where a kill ended it. Every
feature has a FeatureSpec (encoder, weights hash, layer, preprocessing, shape), which training compares. The work is
shared by array tasks (--task-index, --num-tasks), each of several processes (--num-workers), which take the visible
GPUs in turn.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from data_prep.feature_jobs import PER, FeatureJob, compute_shard, make_job
from data_prep.options import Folders
from vlgpt import log
from vlgpt.errors import UserError, run_command
from vlgpt.models.conditions import load_conditioner
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.options import ArrayOptions, parse
from vlgpt.processes import Stopped, run_workers
from vlgpt.shards import ShardSet, write_spec

FEATURES = tuple(PER)


class FeatureOptions(ArrayOptions):
    """The command line."""

    folders: Folders = Field(description="data set folders with shards")
    features: str = Field("patches,image_condition,text_condition", description=f"of {', '.join(FEATURES)}")
    encoder: str = Field(
        description="CLIP folder or name; with --library ip_adapter the JSON of a diffusion decoder's parts"
    )
    library: Literal["open_clip", "transformers", "ip_adapter"] = "open_clip"
    pretrained: str | None = Field(None, description="weights of a named open_clip model")
    layer: int = Field(-2, description="hidden layer of patch features, -2 is the penultimate")
    drop_cls: bool = Field(False, description="leave the class token out")
    image_tokenizer: Path | None = Field(
        None, description="image_tokenizer folder of stage 1 (feature visual)"
    )
    dtype: Literal["float16", "float32", "int8"] = "float16"
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the encoder's matrix products; bfloat16 is several times faster on a GPU"
    )
    views: int = Field(1, ge=1, description="views per image: the clean one and augmented ones")
    batch_size: int = Field(64, ge=1)
    device: str | None = Field(None, description="cuda or cpu; cuda by default where there is one")
    threads: int = Field(1, ge=1, description="torch threads of each process on CPU")
    num_workers: int = Field(1, ge=1, description="processes; each loads the encoder")
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The features to compute."""
        return tuple(self.features.split(","))

    @model_validator(mode="after")
    def _check_features(self) -> FeatureOptions:
        if unknown := set(self.names) - set(FEATURES):
            raise UserError(f"unknown feature {sorted(unknown)[0]!r}; valid: {', '.join(FEATURES)}")
        if self.library == "ip_adapter" and {"patches", "visual"} & set(self.names):
            raise UserError(
                "--library ip_adapter makes image_condition and text_condition; run patches and visual with "
                "their own CLIP"
            )
        return self

    def device_of(self, worker: int) -> str:
        """The visible GPUs in turn over the processes of all tasks, or the device asked for."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device != "cuda":
            return device
        return f"cuda:{(self.task_index * self.num_workers + worker) % torch.cuda.device_count()}"


@dataclass(frozen=True)
class FeatureCost:
    """What one process did for one feature of one folder, and what the feature costs."""

    folder: Path
    feature: str
    num_rows: int
    seconds: float
    bytes_per_row: int
    flops_per_row: int


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done (or this task's share), 2 wrong use or a dead process, 75 stopped by a signal."""
    log.configure()
    options = parse(FeatureOptions, argv, prog="python -m data_prep.features", description=__doc__)
    signal.signal(signal.SIGTERM, _stop)
    started = time.monotonic()
    if options.num_workers == 1:
        costs = list(compute_share(options, 0))
    else:
        costs = _run_processes(options)
    _report(options.folders, costs, seconds=time.monotonic() - started)
    return 0


def compute_share(options: FeatureOptions, worker: int) -> Iterator[FeatureCost]:
    """Every wanted feature of every folder, for the shards of one worker."""
    torch.set_num_threads(options.threads)
    share = options.share.split(worker, options.num_workers)
    jobs = _make_jobs(options, options.device_of(worker))
    flops = {job.spec.name: job.flops_per_row() for job in jobs}
    for folder in options.folders:
        shards = ShardSet.open(folder)
        for job in jobs:
            name, num_rows, started = job.spec.name, 0, time.monotonic()
            place = Path(shards.folder.where)  # for one tar, the folder that holds it
            write_spec(place, job.spec)
            for shard in share.of(len(shards.shards)):
                num_rows += compute_shard(job, shards, shard, folder=place, batch_size=options.batch_size)
            seconds = time.monotonic() - started
            yield FeatureCost(folder, name, num_rows, seconds, job.bytes_per_row, flops[name])


def _make_jobs(options: FeatureOptions, device: str) -> list[FeatureJob]:
    encoder = load_conditioner(
        options.encoder,
        library=options.library,
        pretrained=options.pretrained,
        layer=options.layer,
        has_cls=not options.drop_cls,
    ).to(device)
    tokenizer = None
    if options.image_tokenizer is not None:
        tokenizer = ImageTokenizer.from_folder(options.image_tokenizer).eval().to(device)
    return [
        make_job(
            name,
            encoder,
            encoder_name=f"{options.library}:{Path(options.encoder).name}",
            tokenizer=tokenizer,
            dtype=options.dtype,
            views=options.views,
            seed=options.seed,
            precision=options.precision,
        )
        for name in options.names
    ]


def _run_processes(options: FeatureOptions) -> list[FeatureCost]:
    """One process per worker. Raises UserError when one of them fails; the others still finish their shares."""
    costs: list[FeatureCost] = []
    problems: list[str] = []

    def on_item(worker: int, item: FeatureCost | str) -> None:
        if isinstance(item, FeatureCost):
            costs.append(item)
        else:
            problems.append(item)

    def on_death(worker: int, exit_code: int) -> None:
        problems.append(f"process {worker} ended with exit code {exit_code}; run the same command again")

    works = [partial(_work, options, worker) for worker in range(options.num_workers)]
    run_workers(works, on_item=on_item, on_death=on_death, method="spawn")  # CUDA does not survive a fork
    if problems:
        raise UserError(problems[0])
    return costs


def _work(options: FeatureOptions, worker: int) -> Iterator[FeatureCost | str]:
    log.configure(rank=options.share.split(worker, options.num_workers).first)
    try:
        yield from compute_share(options, worker)
    except (UserError, OSError) as error:
        yield str(error)


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _report(folders: Sequence[Path], costs: Sequence[FeatureCost], *, seconds: float) -> None:
    """Speed, and what storing costs against computing."""
    for folder in folders:
        stored = ShardSet.open(folder)
        image_bytes = sum(record.num_bytes for record in stored.shards) / max(stored.num_images, 1)
        for feature in dict.fromkeys(cost.feature for cost in costs):
            mine = [cost for cost in costs if (cost.folder, cost.feature) == (folder, feature)]
            num_rows, slowest = sum(cost.num_rows for cost in mine), max(cost.seconds for cost in mine)
            log.get_logger().info("%s", _line(folder, feature, num_rows, max(slowest, 1e-9)))
            log.get_logger().info("%s", _trade_off(mine[0], image_bytes))
    log.get_logger().info("all in %.1f s", seconds)


def _line(folder: Path, feature: str, num_rows: int, seconds: float) -> str:
    what = "images" if PER[feature] == "image" else "texts"
    if not num_rows:
        return f"{folder} {feature}: nothing to do"
    return f"{folder} {feature}: {num_rows} {what}, {num_rows / seconds:.1f} {what}/s"


def _trade_off(cost: FeatureCost, image_bytes: float) -> str:
    """At 1,000 rows per second: what must be read with features stored, and computed without."""
    what, kilobytes = PER[cost.feature], cost.bytes_per_row / 1e3
    ratio = f" ({cost.bytes_per_row / image_bytes:.1f} x its picture)" if what == "image" else ""
    return (
        f"{cost.feature}: {kilobytes:.1f} kB{ratio} and {cost.flops_per_row / 1e9:.2f} GFLOPs each; 1000 {what}s/s "
        f"cost {kilobytes:.1f} MB/s of reading when stored, {cost.flops_per_row / 1e9:.2f} TFLOP/s when computed online"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
