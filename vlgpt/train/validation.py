"""What is measured on held-out data during a run: losses, reconstructions, and the launcher's probe."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlgpt.data.loader import Loader
from vlgpt.log import MetricsSink
from vlgpt.settings import RunSettings
from vlgpt.train.engine import Engine
from vlgpt.train.pictures import ReconstructionCheck

T = TypeVar("T")
Probe = Callable[[nn.Module, int], Iterator[Mapping[str, float]]]
"""Asks the stage its questions at a step. Yields after every batch of them, numbers or an empty mapping."""


def validator(
    settings: RunSettings,
    engine: Engine,
    open_loader: Callable[..., Loader],
    *,
    log: MetricsSink,
    probe: Probe | None = None,
) -> Callable[[int, Callable[[], None]], dict[str, float]] | None:
    """`validate(step, on_batch) -> numbers`, collective; None when the settings name nothing to measure.

    `open_loader(data, **options)` gives a loader of the stage's batches. `on_batch` is called on every rank at every
    batch: a validation may take longer than `step_timeout_s`. Everything is opened once here, so that a missing file is
    reported before step 1. Raises UserError or FileNotFoundError.
    """
    validation = settings.validation
    if not validation.sources and probe is None:
        return None
    data = settings.data.model_copy(update={"sources": validation.sources, "num_workers": 0})
    with_pixels = data.model_copy(update={"pixels": True})
    open_pass = partial(open_loader, is_one_pass=True)
    if validation.sources:
        open_pass(data).close()
    check = None
    if validation.pictures is not None:
        check = ReconstructionCheck(validation.pictures, engine=engine)
        open_pass(with_pixels).close()

    def validate(step: int, on_batch: Callable[[], None]) -> dict[str, float]:
        values: dict[str, float] = {}
        if validation.sources:
            with contextlib.closing(open_pass(data)) as loader:
                batches, names = watched(loader, on_batch), loader.source_names
                values = validation_losses(engine, batches, validation.max_batches, source_names=names)
        if check is not None:
            with contextlib.closing(open_pass(with_pixels)) as loader:
                values.update(check(watched(loader, on_batch), step=step, log=log))
        if probe is not None:
            values.update(probed(engine, probe, step, on_batch))
        return values

    return validate


def watched(batches: Iterable[T], on_batch: Callable[[], None]) -> Iterator[T]:
    """The same batches; `on_batch` is called before each."""
    for batch in batches:
        on_batch()
        yield batch


def probed(engine: Engine, probe: Probe, step: int, on_batch: Callable[[], None]) -> dict[str, float]:
    """The numbers of the launcher's probe (collective)."""
    # Rank 0 asks it alone; under ZeRO-3 all ranks do, since every forward pass is collective there. All meet after
    # every batch: a rank that waited for the whole probe would run into the time limit of its collective.
    is_asked = engine.rank == 0 or engine.zero_stage == 3
    parts = probe(engine.stage, step) if is_asked else iter(())
    found: dict[str, float] = {}
    is_over = False
    while not is_over:
        part = next(parts, None)
        found.update(part or {})
        on_batch()
        is_over = bool(engine.all_max(torch.tensor([float(is_asked and part is None)])) > 0)
    return {f"probe/{name}": float(value) for name, value in found.items()}


@torch.no_grad()
def validation_losses(
    engine: Engine, batches: Iterator[Any], max_batches: int, *, source_names: tuple[str, ...] = ()
) -> dict[str, float]:
    """Mean loss per term, and per term and source, over at most `max_batches` held-out batches of each rank.

    Collective. The stage sums by source, so its number of sources must cover `source_names`.
    """
    terms = engine.stage.terms
    totals: dict[str, float] = defaultdict(float)
    by_source: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        if number >= max_batches:
            break
        counts = engine.stage.count_targets(batch)
        found = engine.stage(engine.place(batch))
        for name in terms:
            totals[name] += float(found[name].total)
            totals[f"{name}/count"] += counts[name]
            part = found[name].by_source
            if part is not None:
                part = part.double().cpu()
                by_source[name] = by_source[name] + part if name in by_source else part
    names = [*terms, *(f"{name}/count" for name in terms)]
    summed = engine.all_sum(torch.tensor([totals[name] for name in names], dtype=torch.float64)).tolist()
    reduced = dict(zip(names, summed))
    values = {f"validation/{n}": reduced[n] / max(reduced[f"{n}/count"], 1.0) for n in terms}
    if len(source_names) > 1:
        for name in sorted(by_source):
            for source, total, count in zip(source_names, *engine.all_sum(by_source[name]).tolist()):
                if count:
                    values[f"validation/{name}/{source}"] = total / count
    return values
