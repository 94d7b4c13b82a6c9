"""What is measured on held-out data while a run goes on: losses, reconstructions, and the launcher's probe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlgpt.data.loader import Loader
from vlgpt.log import MetricsLog
from vlgpt.settings import RunSettings
from vlgpt.train.engine import Engine
from vlgpt.train.pictures import ReconstructionCheck

Probe = Callable[[nn.Module, int], Mapping[str, float]]


def validator(
    settings: RunSettings,
    engine: Engine,
    open_loader: Callable[..., Loader],
    *,
    log: MetricsLog | None = None,
    probe: Probe | None = None,
) -> Callable[[int], dict[str, float]] | None:
    """`validate(step) -> numbers`, collective; None when the settings name nothing to measure.

    Everything is opened once here: what is missing is told before step 1. Raises UserError or FileNotFoundError.
    """
    validation = settings.validation
    if not validation.sources and probe is None:
        return None
    data = settings.data.model_copy(update={"sources": validation.sources})
    with_pixels = data.model_copy(update={"pixels": True})
    if validation.sources:
        open_loader(data, workers=0).close()
    check = None
    if validation.pictures is not None:
        check = ReconstructionCheck(validation.pictures, engine=engine)
        open_loader(with_pixels, workers=0).close()

    def validate(step: int) -> dict[str, float]:
        values: dict[str, float] = {}
        if validation.sources:
            loader = open_loader(data, workers=0)
            try:
                values = validation_losses(
                    engine, loader.one_pass(), validation.max_batches, source_names=loader.source_names
                )
            finally:
                loader.close()
        if check is not None:
            pictures = open_loader(with_pixels, workers=0)
            try:
                values.update(check(pictures.one_pass(), step=step, log=log))
            finally:
                pictures.close()
        if probe is not None:
            values.update(probed(engine, probe, step))
        return values

    return validate


def probed(engine: Engine, probe: Probe, step: int) -> dict[str, float]:
    """The launcher's probe on rank 0; under ZeRO-3 on all ranks alike, since every forward pass is collective there."""
    is_asked = engine.rank == 0 or engine.zero_stage == 3
    found = probe(engine.stage, step) if is_asked else {}
    engine.barrier()
    return {f"probe/{name}": float(value) for name, value in found.items()}


@torch.no_grad()
def validation_losses(
    engine: Engine, batches: Iterator[Any], max_batches: int, *, source_names: tuple[str, ...] = ()
) -> dict[str, float]:
    """Mean loss per term, and per term and source, over at most `max_batches` held-out batches of each rank.

    Collective. Sources are told apart by the stage, whose number of sources must cover `source_names`.
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
