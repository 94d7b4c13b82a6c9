"""The one training loop of all stages. Three plain functions follow each step: log, validate, save.

The targets of a step are counted over all ranks and micro-batches before its first forward pass. The loader counts them
ahead, without images; the micro-batches then come one by one, and no step holds the images of more than two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlgpt import commits
from vlgpt.log import MetricsSink, get_logger
from vlgpt.planning.flops import FlopMeter, counting
from vlgpt.settings import RunSettings
from vlgpt.stages.base import Stage
from vlgpt.train import checkpoint, faults
from vlgpt.train.agreement import disagreement, replica_digest
from vlgpt.train.engine import Engine, StepResult
from vlgpt.train.observers import Observer
from vlgpt.train.progress import Content, Progress
from vlgpt.train.schedule import learning_rate


class TrainingLoader(Protocol):
    """What the loop needs of `vlgpt.data.Loader`."""

    source_names: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]: ...
    def targets(self, num_batches: int) -> list[Mapping[str, float]]:
        """Number of targets by term, for each of the next micro-batches."""

    def advance(self, num_micro_batches: int) -> None:
        """Count micro-batches as trained, so that a resume starts behind them."""

    def state_dict(self) -> Mapping[str, object]:
        """Position in the data and the settings that it depends on, JSON-ready."""

    def statistics(self) -> dict[str, object]:
        """What was read so far: samples by source, bad and rejected ones by reason, waits."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a stored position. Raises UserError when the data or its settings changed."""

    def close(self) -> None:
        """End the workers and free their buffers."""


Validate = Callable[[int, Callable[[], None]], dict[str, float]]


class TrainingStopped(RuntimeError):
    """The run cannot go on; all ranks raise it at the same step. `exit_code` is what the process should return."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class RunState:
    """What changes during a run."""

    step: int = 0
    num_skipped: int = 0
    num_skipped_in_row: int = 0
    num_rollbacks: int = 0
    spikes: faults.SpikeDetector | None = None
    # per term (2, num_sources): sums of losses and counts since the last log line
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run, handed to the functions of the loop."""

    settings: RunSettings
    engine: Engine
    loader: TrainingLoader
    facts: Mapping[str, object]
    log: MetricsSink = field(default_factory=MetricsSink)
    observers: Observer = field(default_factory=Observer)
    # validate(step, on_batch) -> numbers, collective; None when nothing is to be measured
    validate: Validate | None = None
    # whether this rank was asked to stop (preemption)
    should_stop: Callable[[], bool] = lambda: False


class Intake:
    """The micro-batches of one step as they come from `Engine.feed`. Keeps their `Content`, not the batches."""

    def __init__(self, feed: Iterator[tuple[Any, Any]], num_batches: int):
        self._feed, self._num_batches = feed, num_batches
        self.contents: list[Content] = []
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for _ in range(self._num_batches):
            started = time.monotonic()
            batch, placed = next(self._feed)
            self.wait_s += time.monotonic() - started
            self.contents.append(Content.of(batch))
            yield batch, placed


def train(run: Run, state: RunState) -> None:
    """Train from `state.step` to the last step. Raises TrainingStopped, on all ranks alike."""
    settings, engine = run.settings, run.engine
    accumulation = settings.accumulation(engine.world_size)
    progress = Progress(settings, state.step, engine=engine)
    state.spikes = faults.SpikeDetector(settings.faults.spike_sigma)
    feed = engine.feed(iter(run.loader))
    engine.train()
    run.observers.heartbeat(state.step)  # a resume or statistics may have taken long
    while state.step < settings.steps:
        step = state.step + 1
        run.observers.before_step(step)
        started = time.monotonic()
        targets = run.loader.targets(accumulation)
        counting_s = time.monotonic() - started
        intake = Intake(feed, accumulation)
        rate = learning_rate(step, steps=settings.steps, settings=settings.optimizer)
        result, losses = train_step(engine, intake, rate, targets=targets, meter=progress.meter)
        # Only now: a checkpoint's data position is what was trained on, not what workers have prepared.
        run.loader.advance(accumulation)
        state.step = step
        if not result.is_skipped:
            run.observers.after_update(step)
        note_losses(state, losses)
        progress.add(intake.contents, time.monotonic() - started, counting_s + intake.wait_s)
        run.observers.after_step(step)
        after_skip(run, state, result, intake.contents)
        if roll_back_after_spike(run, state, losses, intake.contents):
            # A new iteration: the old one still holds batches of the data that are left out.
            feed = engine.feed(iter(run.loader))
            continue
        if step % settings.log_interval_steps == 0 or step == settings.steps:
            write_log(run, state, progress, result, rate)
        if run.validate is not None and (
            step % settings.validation.interval_steps == 0 or step == settings.steps
        ):
            write_validation(run, step)
            run.observers.heartbeat(step)
        # Before the save: weights that have drifted apart must not become a checkpoint.
        check_replicas(run, step)
        after_step(run, state)
        run.observers.heartbeat(step)
    progress.close()


def train_step(
    engine: Engine,
    micro_batches: Iterable[Any],
    rate: float,
    *,
    targets: Sequence[Mapping[str, float]] | None = None,
    meter: FlopMeter | None = None,
) -> tuple[StepResult, dict[str, Tensor]]:
    """One optimizer step: sums of losses divided by the global number of targets.

    `micro_batches` are pairs from `Engine.feed` when their `targets` are given, else batches. Returns the outcome and,
    per term, (2, num_sources) sums and counts of this rank.
    """
    stage: Stage = engine.stage
    if targets is None:
        micro_batches = list(micro_batches)
        targets = [stage.count_targets(batch) for batch in micro_batches]
        micro_batches = engine.feed(micro_batches)
    # A mean per micro-batch would weigh a target by how few others its micro-batch holds. Sums divided by the count
    # over ranks and micro-batches depend on neither. The factor undoes DeepSpeed's means over both.
    counts = global_counts(engine, targets)
    undo_means = engine.world_size * len(targets)
    engine.set_learning_rate(rate)
    by_source: dict[str, Tensor] = {}
    for batch, placed in micro_batches:
        with counting(meter, batch):
            terms = engine.forward(placed)
        # At least 1: a step without images has no visual targets, and a sum of 0.
        loss = sum(terms[name].weight * terms[name].total / max(counts[name], 1.0) for name in stage.terms)
        engine.backward(loss * undo_means)  # type: ignore[arg-type]  # the int 0 is a sum of no terms
        for name in stage.terms:
            found = terms[name].by_source
            if found is not None:
                by_source[name] = by_source[name] + found if name in by_source else found
        engine.end_micro_batch()
    return engine.step_result(), by_source


def global_counts(engine: Engine, targets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Targets per term over all ranks and micro-batches of this step."""
    terms = engine.stage.terms
    # float64: fp32 counts exactly to 2^24 only, eight times the positions of the paper's step (4,096 rows of 512).
    local = torch.tensor([[counts[name] for name in terms] for counts in targets], dtype=torch.float64)
    return dict(zip(terms, engine.all_sum(local.sum(0)).tolist()))


def note_losses(state: RunState, losses: dict[str, Tensor]) -> None:
    """Add a step's per-source sums to those since the last log line."""
    for name, value in losses.items():
        state.sums[name] = state.sums[name] + value if name in state.sums else value


def after_skip(run: Run, state: RunState, result: StepResult, contents: Iterable[Content]) -> None:
    """Count a non-finite step (skipped on all ranks alike), name its documents, stop after too many in a row."""
    if not result.is_skipped:
        state.num_skipped_in_row = 0
        return
    state.num_skipped += 1
    state.num_skipped_in_row += 1
    documents = run.engine.gather_objects([list(_documents(content)) for content in contents])
    get_logger().warning(
        "step %d skipped: gradient is not finite (%d in a row)", state.step, state.num_skipped_in_row
    )
    run.log.write(state.step, {"event": "skipped_step", "documents": documents})
    if state.num_skipped_in_row >= run.settings.max_skipped_steps:
        raise TrainingStopped(
            f"{state.num_skipped_in_row} steps in a row had a non-finite gradient; the documents are in metrics.jsonl "
            "(event skipped_step). Lower optimizer.lr, or remove the data",
            faults.EXIT_NON_FINITE,
        )


def roll_back_after_spike(
    run: Run, state: RunState, losses: dict[str, Tensor], contents: Iterable[Content]
) -> bool:
    """Log a loss far above its moving mean; if asked for, load the newest commit and skip the data since then."""
    assert state.spikes is not None
    settings = run.settings.faults
    if settings.spike_sigma == 0 or not losses:
        return False
    # Global means of the terms, so that all ranks see the same number and decide alike.
    sums = torch.stack([value.sum(1).double().cpu() for _, value in sorted(losses.items())])
    totals, counts = run.engine.all_sum(sums).cpu().unbind(1)
    loss = float((totals / counts.clamp(min=1)).sum())
    if not state.spikes.is_spike(loss):
        return False
    step = state.step
    documents = run.engine.gather_objects([list(_documents(content)) for content in contents])
    event = {"event": "loss_spike", "loss": loss, "usual": state.spikes.mean, "documents": documents}
    run.log.write(step, event)
    get_logger().warning("step %d: loss %.4f is a spike, usual is %.4f", step, loss, state.spikes.mean)
    if not settings.spike_rollback or state.num_rollbacks >= settings.max_rollbacks:
        return False
    position = run.loader.state_dict()
    root = run.settings.run_dir / "checkpoints"
    resumed = checkpoint.resume(run.engine, root, facts=run.facts, observers=run.observers)
    if resumed is None:
        return False
    # Weights go back, the data position does not: the data are a pure function of it, so the run goes on behind the
    # batches that made the spike.
    run.loader.load_state_dict(position)
    state.num_rollbacks += 1
    state.step = resumed.step
    state.sums.clear()
    run.log.write(step, {"event": "rollback", "to_step": resumed.step})
    get_logger().warning("rolled back to step %d; the data read since then are left out", resumed.step)
    return True


def check_replicas(run: Run, step: int) -> None:
    """Compare the weights of all ranks (ZeRO-3 keeps no replica). Raises TrainingStopped when one has drifted."""
    interval = run.settings.faults.replica_check_steps
    if not interval or step % interval or run.engine.world_size == 1 or run.engine.zero_stage == 3:
        return
    odd = disagreement(run.engine.gather_objects(replica_digest(run.engine.stage)))
    if odd:
        raise TrainingStopped(
            f"weights drifted apart by step {step}: {odd}. Suspect the memory of those devices; the run can go on "
            "from its newest commit",
            faults.EXIT_REPLICAS,
        )


def _documents(content: Content) -> Iterator[str]:
    for item in content.documents:
        yield from (item,) if isinstance(item, str) else item


def write_log(run: Run, state: RunState, progress: Progress, result: StepResult, rate: float) -> None:
    """One record for programs, one line for people: losses per term and source, speed, waits."""
    sums = {name: run.engine.all_sum(state.sums[name].clone()) for name in sorted(state.sums)}
    state.sums.clear()
    values: dict[str, object] = {}
    for name, (totals, counts) in sums.items():
        values[f"loss/{name}"] = _ratio(float(totals.sum()), float(counts.sum()))
        if len(run.loader.source_names) > 1:
            for source, total, count in zip(run.loader.source_names, totals.tolist(), counts.tolist()):
                values[f"loss/{name}/{source}"] = _ratio(total, count)
    values["gradient_norm"] = result.gradient_norm if math.isfinite(result.gradient_norm) else None
    values["learning_rate"] = rate
    values["skipped_steps"] = state.num_skipped
    values.update(progress.rates(run.engine))
    statistics = run.loader.statistics()
    values.update({k: v for k, v in statistics.items() if isinstance(v, (int, float))})
    values["data"] = {k: v for k, v in statistics.items() if isinstance(v, dict)}
    run.log.write(state.step, {key: value for key, value in values.items() if value is not None})
    progress.line(state.step, values)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def write_validation(run: Run, step: int) -> None:
    """Held-out losses and whatever else `run.validate` measures."""
    assert run.validate is not None
    with run.engine.evaluation():
        values = run.validate(step, partial(run.observers.heartbeat, step))
    run.log.write(step, values)
    if run.engine.rank == 0:
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
        get_logger().info("step %d validation: %s", step, shown)


def after_step(run: Run, state: RunState) -> None:
    """Save when it is time, at the end, or when any rank was asked to stop (then raise with its exit code)."""
    settings = run.settings
    is_last = state.step == settings.steps
    is_first = run.engine.rank == 0
    is_off = is_first and faults.is_kill_switch_on(settings.run_dir)
    is_asked = run.should_stop() or (is_first and faults.is_stop_requested(settings.run_dir))
    # One collective for both questions, after every step: all ranks must stop after the same one.
    asked = torch.tensor([float(is_asked), float(is_off)])
    wants_stop, is_killed = (value > 0 for value in run.engine.all_max(asked).tolist())
    if is_last or wants_stop or is_killed or state.step % settings.checkpoint.interval_steps == 0:
        save(run, state)
    if is_killed and not is_last:
        raise TrainingStopped(
            f"stopped by {settings.run_dir / faults.KILL_SWITCH} after step {state.step}; remove the file to go on",
            faults.EXIT_KILL_SWITCH,
        )
    if wants_stop and not is_last:
        if is_first:
            faults.request_stop(settings.run_dir, False)
        raise TrainingStopped(
            f"stopped on request after step {state.step}; run the same command to go on",
            faults.EXIT_PREEMPTED,
        )


def save(run: Run, state: RunState) -> Path | None:
    """Commit a checkpoint with the data position consumed by the trainer; None when the disk is too full for it.

    Raises TrainingStopped in that case when the settings want it.
    """
    started_s = time.monotonic()
    try:
        folder = checkpoint.save(
            run.engine,
            run.settings.run_dir / "checkpoints",
            step=state.step,
            data=run.loader.state_dict(),
            facts={**run.facts, "num_skipped": state.num_skipped},
            keep=run.settings.checkpoint.keep,
            observers=run.observers,
        )
    except commits.CommitFailed as error:
        run.log.write(state.step, {"event": "disk_full", "message": str(error)})
        if run.settings.checkpoint.on_disk_full == "stop":
            raise TrainingStopped(str(error), faults.EXIT_DISK_FULL) from error
        get_logger().error("step %d is NOT saved: %s", state.step, error)
        return None
    if run.engine.rank == 0:
        seconds = time.monotonic() - started_s
        run.log.write(state.step, {"commit_s": round(seconds, 3), "commit_bytes": commits.size_of(folder)})
        run.observers.after_commit(folder)
    return folder
