"""One training run from settings to result: build, resume, prepare, train, save. What every launcher calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vlgpt import log, seeds
from vlgpt.data.loader import Loader
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings, RunSettings
from vlgpt.stages.base import Stage
from vlgpt.stages.build import build_stage
from vlgpt.stages.weights import newest_trainable
from vlgpt.train import checkpoint, faults
from vlgpt.train.agreement import disagreement
from vlgpt.train.average import MovingAverage
from vlgpt.train.ds_config import lint, merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group
from vlgpt.train.facts import check_features, data_facts, describe, record_run, versions
from vlgpt.train.loop import Run, RunState, TrainingStopped, train
from vlgpt.train.profile import ProfileWindow
from vlgpt.train.result import finish, placed
from vlgpt.train.upload import Uploader
from vlgpt.train.validation import Probe, validator, watched
from vlgpt.train.wandb_mirror import WandbMirror
from vlgpt.train.watchdog import Watchdog


def run_training(
    settings: RunSettings, ds_config: Mapping[str, Any], *, ds_source: str, probe: Probe | None = None
) -> int:
    """Train one stage; returns the process's exit code. Collective over the launcher's processes.

    `probe(stage, step)` is asked on rank 0 after every validation, with whole weights in eval mode; its numbers are
    logged under `probe/`. Raises UserError for anything the user has to mend.
    """
    try:
        return _run_together(settings, ds_config, ds_source=ds_source, probe=probe)
    except (UserError, FileNotFoundError):
        faults.record_exit_code(settings.run_dir, faults.EXIT_USER_ERROR)
        raise


def _run_together(
    settings: RunSettings, ds_config: Mapping[str, Any], *, ds_source: str, probe: Probe | None
) -> int:
    """`run_training` after the promise that a user's mistake is recorded."""
    torch.set_num_threads(settings.threads)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.configure(rank=rank)
    merged = merge_config(settings, ds_config, world_size=world_size, source=ds_source)
    for warning in lint(merged, source=ds_source):
        log.get_logger().warning("%s", warning)
    refuse_kill_switch(settings)
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
    stop_process_group()  # not after an unexpected error: the other ranks would not come to its barrier
    return exit_code


def refuse_kill_switch(settings: RunSettings) -> None:
    """Raises UserError while the file that stopped a run is still there."""
    if faults.is_kill_switch_on(settings.run_dir):
        raise UserError(f"{settings.run_dir / faults.KILL_SWITCH} is there: remove it to train")


def close(run: Run) -> None:
    """End threads and workers."""
    if run.uploader is not None:
        run.uploader.wait()
    if run.watchdog is not None:
        run.watchdog.close()
    run.loader.close()  # type: ignore[attr-defined]
    if run.log is not None:
        run.log.close()


def build_run(
    settings: RunSettings, merged: Mapping[str, Any], *, probe: Probe | None = None
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
    metrics = None
    is_first = engine.rank == 0
    if is_first:
        record_run(settings, merged, facts)
        describe(stage)
        mirrors = [WandbMirror(settings)] if settings.wandb_project else []
        metrics = log.MetricsLog(settings.run_dir, mirrors=mirrors)
    open_loader = loader_opener(settings, engine, stage)
    loader = open_loader(settings.data)
    check_features(loader.feature_specs, stage, facts["frozen"])
    if odd := disagreement(engine.gather_objects(loader.state_dict())):
        raise UserError(
            f"processes read different data: {odd}; do all nodes see the same shards and indexes?"
        )
    decay = settings.optimizer.ema_decay
    average = MovingAverage(engine, decay=decay) if decay else None
    run = Run(
        settings=settings,
        engine=engine,
        loader=loader,
        log=metrics,
        facts=facts,
        validate=validator(settings, engine, open_loader, log=metrics, probe=probe),
        should_stop=listen_for_stop(),
        watchdog=Watchdog(settings.run_dir / "watch", rank=engine.rank, timeout_s=settings.step_timeout_s),
        profile=ProfileWindow(settings.profile, settings.run_dir / "profile", rank=engine.rank),
        uploader=Uploader(settings.checkpoint.upload) if settings.checkpoint.upload and is_first else None,
        average=average,
    )
    return run, begin(run, open_loader)


def loader_opener(settings: RunSettings, engine: Engine, stage: Stage) -> Callable[..., Loader]:
    """`open_loader(data, workers=None)`: this run's loader over other sources, or with other workers."""

    def open_loader(data: DataSettings, *, workers: int | None = None) -> Loader:
        chosen = data if workers is None else data.model_copy(update={"num_workers": workers})
        return Loader(
            chosen,
            kind=stage.batch_kind,
            micro_batch=settings.micro_batch,
            rank=engine.rank,
            world_size=engine.world_size,
            tokenizer=stage.document_tokenizer,
            run_positions=settings.steps * settings.global_batch,
            quarantine=settings.run_dir / f"quarantine_rank_{engine.rank}.jsonl",
            count_targets=stage.count_targets,
            pin_memory=engine.device.type == "cuda",
        )

    return open_loader


def begin(run: Run, open_loader: Callable[..., Loader]) -> RunState:
    """Resume from the newest good commit, or take statistics from the data and seed this rank."""
    settings, engine, state = run.settings, run.engine, RunState()
    resumed = None
    if settings.checkpoint.resume == "auto":
        root = settings.run_dir / "checkpoints"
        resumed = checkpoint.resume(engine, root, facts=run.facts, average=run.average)
    if resumed is not None:
        state.step = resumed.step
        state.num_skipped = resumed.facts.get("num_skipped", 0)
        run.loader.load_state_dict(resumed.data)
    else:
        fresh = open_loader(settings.data, workers=0)
        batches = watched(fresh, lambda: run.is_alive(0))
        engine.stage.prepare(placed(engine, batches), engine.all_sum)
        fresh.close()
        if source := getattr(
            settings.stage, "init_from", None
        ):  # in fp32: the stage's copy was cast to its precision
            engine.load_weights(newest_trainable(Path(source)).tensors)
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
