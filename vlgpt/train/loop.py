"""The one training loop of all stages. Three plain functions follow each step: log, validate, save."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vlgpt.log import MetricsLog, get_logger
from vlgpt.settings import RunSettings
from vlgpt.stages.base import Stage
from vlgpt.train import checkpoint
from vlgpt.train.engine import Engine, StepResult
from vlgpt.train.schedule import learning_rate
from vlgpt.train.throughput import Progress

EXIT_NON_FINITE = 70


class TrainingLoader(Protocol):
    """What the loop needs of `vlgpt.data.Loader`."""

    source_names: tuple[str, ...]

    def __iter__(self) -> Iterator[Any]: ...
    def advance(self, num_micro_batches: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def statistics(self) -> dict[str, Any]: ...


class TrainingStopped(RuntimeError):
    """The run cannot go on; all ranks raise it at the same step. `exit_code` is what the process should return."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class RunState:
    """What changes while a run goes on."""

    step: int = 0
    num_skipped: int = 0
    num_skipped_in_row: int = 0
    sums: dict[str, Tensor] = field(
        default_factory=dict
    )  # per term (2, num_sources), since the last log line


@dataclass(frozen=True)
class Run:
    """The fixed parts of a run, handed to the functions of the loop."""

    settings: RunSettings
    engine: Engine
    loader: TrainingLoader
    log: MetricsLog | None  # rank 0 only
    facts: dict[str, Any]
    validate: Any = None  # callable(step) -> dict of numbers, collective
    should_stop: Any = None  # callable() -> bool: preemption was asked for on this rank


def train(run: Run, state: RunState) -> None:
    """Train from `state.step` to the last step. Raises TrainingStopped, on all ranks alike."""
    settings, engine = run.settings, run.engine
    accumulation = settings.accumulation(engine.world_size)
    progress = Progress(settings.steps, state.step, is_shown=engine.rank == 0)
    batches = iter(run.loader)
    engine.train()
    for step in range(state.step + 1, settings.steps + 1):
        started = time.monotonic()
        micro_batches = [next(batches) for _ in range(accumulation)]
        data_wait_s = time.monotonic() - started
        rate = learning_rate(step, steps=settings.steps, settings=settings.optimizer)
        result, losses = train_step(engine, micro_batches, rate)
        run.loader.advance(accumulation)
        state.step = step
        note_losses(state, losses)
        progress.add(micro_batches, time.monotonic() - started, data_wait_s)
        after_skip(run, state, result, micro_batches)
        if step % settings.log_interval_steps == 0 or step == settings.steps:
            write_log(run, state, progress, result, rate)
        if run.validate is not None and (
            step % settings.validation.interval_steps == 0 or step == settings.steps
        ):
            write_validation(run, step)
        after_step(run, state)
    progress.close()


def train_step(engine: Engine, micro_batches: list[Any], rate: float) -> tuple[StepResult, dict[str, Tensor]]:
    """One optimizer step: sums of losses divided by the global number of targets.

    The count runs over ranks and micro-batches, so the result depends on neither. `world_size * accumulation` undoes
    DeepSpeed's two means. Returns the outcome and, per term, (2, num_sources) sums and counts of this rank.
    """
    stage: Stage = engine.stage
    counts = global_counts(engine, micro_batches)
    undo_means = engine.world_size * len(micro_batches)
    engine.set_learning_rate(rate)
    by_source: dict[str, Tensor] = {}
    for batch in micro_batches:
        terms = engine.forward(engine.place(batch))
        loss = sum(terms[name].weight * terms[name].total / max(counts[name], 1.0) for name in stage.terms)
        engine.backward(loss * undo_means)  # type: ignore[arg-type]
        for name in stage.terms:
            found = terms[name].by_source
            if found is not None:
                by_source[name] = by_source[name] + found if name in by_source else found
        engine.end_micro_batch()
    return engine.step_result(), by_source


def global_counts(engine: Engine, micro_batches: list[Any]) -> dict[str, float]:
    """Targets per term over all ranks and micro-batches of this step, from the masks."""
    local = torch.zeros(len(engine.stage.terms), dtype=torch.float64)
    for batch in micro_batches:
        counts = engine.stage.count_targets(batch)
        local += torch.tensor([counts[name] for name in engine.stage.terms], dtype=torch.float64)
    return dict(zip(engine.stage.terms, engine.all_sum(local).tolist()))


def note_losses(state: RunState, losses: dict[str, Tensor]) -> None:
    """Add a step's per-source sums to those since the last log line."""
    for name, value in losses.items():
        state.sums[name] = state.sums[name] + value if name in state.sums else value


def after_skip(run: Run, state: RunState, result: StepResult, micro_batches: list[Any]) -> None:
    """Count a non-finite step (skipped on all ranks alike), name its documents, stop after too many in a row."""
    if not result.is_skipped:
        state.num_skipped_in_row = 0
        return
    state.num_skipped += 1
    state.num_skipped_in_row += 1
    documents = run.engine.gather_objects([list(_documents(batch)) for batch in micro_batches])
    get_logger().warning(
        "step %d skipped: gradient is not finite (%d in a row)", state.step, state.num_skipped_in_row
    )
    if run.log is not None:
        run.log.write(state.step, {"event": "skipped_step", "documents": documents})
    if state.num_skipped_in_row >= run.settings.max_skipped_steps:
        raise TrainingStopped(
            f"{state.num_skipped_in_row} steps in a row had a non-finite gradient; the documents are in metrics.jsonl "
            "(event skipped_step). Lower optimizer.lr, or remove the data",
            EXIT_NON_FINITE,
        )


def _documents(batch: Any) -> Iterator[str]:
    for item in batch.documents:
        yield from (item,) if isinstance(item, str) else item


def write_log(run: Run, state: RunState, progress: Progress, result: StepResult, rate: float) -> None:
    """One record for programs, one line for people: losses per term and source, speed, waits."""
    sums = {name: run.engine.all_sum(state.sums[name].clone()) for name in sorted(state.sums)}
    state.sums.clear()
    values: dict[str, Any] = {}
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
    if run.log is not None:
        run.log.write(state.step, {key: value for key, value in values.items() if value is not None})
    progress.line(state.step, values)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def write_validation(run: Run, step: int) -> None:
    """Held-out losses; the loop knows nothing of what is measured."""
    run.engine.train(False)
    values = run.validate(step)
    run.engine.train(True)
    if run.log is not None:
        run.log.write(step, values)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
        get_logger().info("step %d validation: %s", step, shown)


def after_step(run: Run, state: RunState) -> None:
    """Save when it is time, at the end, or when any rank was asked to stop (then raise with exit code 75)."""
    settings = run.settings
    is_last = state.step == settings.steps
    wants_stop = False
    if run.should_stop is not None:
        asked = torch.tensor([1.0 if run.should_stop() else 0.0])
        wants_stop = bool(run.engine.all_max(asked).item())
    if is_last or wants_stop or state.step % settings.checkpoint.interval_steps == 0:
        save(run, state)
    if wants_stop and not is_last:
        raise TrainingStopped(
            f"stopped on request after step {state.step}; run the same command to go on", 75
        )


def save(run: Run, state: RunState) -> None:
    """Commit a checkpoint with the data position consumed by the trainer."""
    checkpoint.save(
        run.engine,
        run.settings.run_dir / "checkpoints",
        step=state.step,
        data=run.loader.state_dict(),
        facts={**run.facts, "num_skipped": state.num_skipped},
        keep=run.settings.checkpoint.keep,
    )


@torch.no_grad()
def validation_losses(engine: Engine, batches: Iterator[Any], max_batches: int) -> dict[str, float]:
    """Mean loss per term over at most `max_batches` held-out batches of each rank (collective)."""
    totals: dict[str, float] = defaultdict(float)
    for number, batch in enumerate(batches):
        if number >= max_batches:
            break
        counts = engine.stage.count_targets(batch)
        terms = engine.stage(engine.place(batch))
        for name in engine.stage.terms:
            totals[name] += float(terms[name].total)
            totals[f"{name}/count"] += counts[name]
    names = [*engine.stage.terms, *(f"{name}/count" for name in engine.stage.terms)]
    summed = engine.all_sum(torch.tensor([totals[name] for name in names], dtype=torch.float64)).tolist()
    reduced = dict(zip(names, summed))
    return {f"validation/{n}": reduced[n] / max(reduced[f"{n}/count"], 1.0) for n in engine.stage.terms}
