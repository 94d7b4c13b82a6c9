"""One training run from settings to result: build, resume, prepare, train, save. What every launcher calls."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vlgpt import commits, log, seeds
from vlgpt.data.loader import Loader
from vlgpt.errors import UserError
from vlgpt.files import replacing_folder, write_atomic
from vlgpt.settings import DataSettings, RunSettings
from vlgpt.stages.build import build_stage
from vlgpt.train import checkpoint, faults
from vlgpt.train.agreement import disagreement
from vlgpt.train.ds_config import lint, merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group
from vlgpt.train.facts import RESULT, check_features, data_facts, describe, record_run, versions
from vlgpt.train.loop import Run, RunState, TrainingStopped, train
from vlgpt.train.observers import MovingAverage, Observer, Observers, ProfileWindow, Uploader, Watchdog
from vlgpt.train.validation import Probe, validator, watched


def run_training(
    settings: RunSettings, ds_config: Mapping[str, object], *, ds_source: str, probe: Probe | None = None
) -> int:
    """Train one stage; returns the process's exit code. Collective over the launcher's processes.

    `probe(stage, step)` is asked on rank 0 after every validation, with whole weights in eval mode; its numbers are
    logged under `probe/`. Raises UserError for anything the user has to correct.
    """
    try:
        return _run_together(settings, ds_config, ds_source=ds_source, probe=probe)
    except (UserError, FileNotFoundError):
        faults.record_exit_code(settings.run_dir, faults.EXIT_USER_ERROR)
        raise


def _run_together(
    settings: RunSettings, ds_config: Mapping[str, object], *, ds_source: str, probe: Probe | None
) -> int:
    torch.set_num_threads(settings.threads)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.configure(rank=rank)
    merged = merge_config(settings, ds_config, world_size=world_size, source=ds_source)
    for warning in lint(merged, source=ds_source):
        log.get_logger().warning("%s", warning)
    if faults.is_kill_switch_on(settings.run_dir):
        raise UserError(f"{settings.run_dir / faults.KILL_SWITCH} is there: remove it to train")
    agreed = {
        "settings": settings.model_dump(mode="json"),
        "deepspeed": merged,
        "versions": versions(),
        "data": data_facts(settings),
    }
    start_process_group(timeout_s=settings.step_timeout_s, facts=agreed)
    run, state = build_run(settings, merged, probe=probe)
    try:
        train(run, state)
        finish(run)
        exit_code = 0
    except TrainingStopped as stopped:
        log.get_logger().error("%s", stopped)
        exit_code = stopped.exit_code
    close(run)
    if run.engine.rank == 0:
        faults.record_exit_code(settings.run_dir, exit_code)
    # Not in a `finally`: after an unexpected error the other ranks would not come to its barrier.
    stop_process_group()
    return exit_code


def close(run: Run) -> None:
    """End threads and workers."""
    run.observers.close()
    run.loader.close()
    run.log.close()


# ------------------------------------------------------------------------------------------------------------ building


def build_run(
    settings: RunSettings, merged: Mapping[str, object], *, probe: Probe | None = None
) -> tuple[Run, RunState]:
    """Everything before step 1: loader, stage, engine, resume or statistics, and the record of what runs."""
    num_sources = max(len(settings.data.sources), len(settings.validation.sources))
    stage = build_stage(settings, num_sources=num_sources)
    facts = {"frozen": stage.frozen_hashes(), "versions": versions()}  # before ZeRO-3 takes parameters apart
    engine = Engine(stage, settings, merged)
    if odd := disagreement(engine.gather_objects(facts["frozen"])):
        raise UserError(f"processes hold different frozen weights: {odd}; do all nodes see the same files?")
    stage.settle(engine.device, engine.dtype)
    with engine.evaluation():
        stage.check()
    metrics = log.MetricsSink()
    if engine.rank == 0:
        record_run(settings, merged, facts)
        describe(stage)
        metrics = log.MetricsLog(settings.run_dir, mirrors=mirrors_of(settings))
    quarantine = settings.run_dir / f"quarantine_rank_{engine.rank}.jsonl"
    loader = open_loader(engine, settings.data, quarantine=quarantine)
    check_features(loader.feature_specs, stage, facts["frozen"])
    if odd := disagreement(engine.gather_objects(loader.state_dict())):
        raise UserError(
            f"processes read different data: {odd}; do all nodes see the same shards and indexes?"
        )
    run = Run(
        settings=settings,
        engine=engine,
        loader=loader,
        facts=facts,
        log=metrics,
        observers=Observers(_observers(settings, engine)),
        validate=validator(settings, engine, partial(open_loader, engine), log=metrics, probe=probe),
        should_stop=listen_for_stop(),
    )
    return run, begin(run)


def mirrors_of(settings: RunSettings) -> list[log.MetricsSink]:
    """Services beside the metrics file that the settings ask for: Weights & Biases or none."""
    if settings.wandb_project is None:
        return []
    config = settings.model_dump(mode="json")
    return [
        log.WandbMirror(settings.run_dir, project=settings.wandb_project, name=settings.name, config=config)
    ]


def _observers(settings: RunSettings, engine: Engine) -> Iterator[Observer]:
    if settings.checkpoint.upload and engine.rank == 0:
        yield Uploader(settings.checkpoint.upload)
    yield Watchdog(settings.run_dir / "watch", rank=engine.rank, timeout_s=settings.step_timeout_s)
    yield ProfileWindow(settings.profile, settings.run_dir / "profile", rank=engine.rank)
    if settings.optimizer.ema_decay:
        yield MovingAverage(engine, decay=settings.optimizer.ema_decay)


def open_loader(engine: Engine, data: DataSettings, **options: Any) -> Loader:
    """A loader of the batches that the engine's stage trains on; `options` are further ones of `Loader`."""
    settings, stage = engine.settings, engine.stage
    return Loader(
        data,
        kind=stage.batch_kind,
        micro_batch=settings.micro_batch,
        rank=engine.rank,
        world_size=engine.world_size,
        tokenizer=stage.document_tokenizer,
        run_positions=settings.steps * settings.global_batch,
        count_targets=stage.count_targets,
        pin_memory=engine.device.type == "cuda",
        **options,
    )


@contextlib.contextmanager
def batches_for_statistics(run: Run) -> Iterator[Iterator[Any]]:
    """The training stream from its start, read in this process, on the engine's device; each is a sign of life."""
    # No quarantine file: training meets the same bad samples, and writes each down once.
    data = run.settings.data.model_copy(update={"num_workers": 0})
    with contextlib.closing(open_loader(run.engine, data)) as loader:
        yield map(run.engine.place, watched(loader, lambda: run.observers.heartbeat(0)))


def begin(run: Run) -> RunState:
    """Resume from the newest good commit, or take statistics from the data and seed this rank."""
    settings, engine, state = run.settings, run.engine, RunState()
    resumed = None
    if settings.checkpoint.resume == "auto":
        root = settings.run_dir / "checkpoints"
        resumed = checkpoint.resume(engine, root, facts=run.facts, observers=run.observers)
    if resumed is not None:
        state.step = resumed.step
        state.num_skipped = resumed.facts.get("num_skipped", 0)
        run.loader.load_state_dict(resumed.data)
        return state
    with batches_for_statistics(run) as batches:
        engine.stage.prepare(batches, engine.all_sum)
    if source := getattr(settings.stage, "init_from", None):
        # Loaded here and not by the stage, whose copy was cast to its precision: the masters want fp32.
        engine.load_weights(commits.newest_trainable(Path(source)).tensors)
    seeds.seed_everything(settings.seed, "training", engine.rank)
    return state


def listen_for_stop() -> Callable[[], bool]:
    """SIGTERM and SIGUSR1 ask for a commit after the current step; returns whether one came."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return lambda: bool(asked)


# ----------------------------------------------------------------------------------------------------------- finishing


def finish(run: Run) -> None:
    """After the last step: the moving average takes over, then statistics for the next stage, then the result."""
    settings, engine = run.settings, run.engine
    run.observers.before_result()
    with engine.evaluation(), batches_for_statistics(run) as batches:
        engine.stage.finish(batches, engine.all_sum)
    engine.train(False)
    with engine.gathered_weights():
        if engine.rank == 0:
            write_result(settings, engine)
    engine.barrier()


def write_result(settings: RunSettings, engine: Engine) -> None:
    """The result folder, written beside its place and moved there when it is whole."""
    result = settings.run_dir / RESULT
    with replacing_folder(result) as folder:
        engine.stage.save(folder)
        done = {"settings": settings.model_dump(mode="json")}
        write_atomic(folder / "done.json", json.dumps(done, indent=1))
    log.get_logger().info("result written to %s", result)
