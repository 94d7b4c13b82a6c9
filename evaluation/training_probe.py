"""A few questions of a benchmark at every validation of a training run, answered by the model as it is then.

The launchers take `make_probe` from here and pass it to the training loop, which knows nothing of benchmarks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from evaluation import benchmarks
from evaluation.core import IMAGE_KINDS, Prediction
from evaluation.responders import ModelResponder
from evaluation.run import answer, select
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.settings import LanguageStageSettings, ProbeSettings, RunSettings


def make_probe(settings: RunSettings) -> Callable[[nn.Module, int], Iterator[Mapping[str, float]]]:
    """`probe(stage, step)` yields {"benchmark/metric": value} for every benchmark that the settings name.

    It yields an empty mapping after every batch, so that the watchdog can tell a long probe from a hang.
    Examples are chosen once, so that values of different steps can be compared. Raises UserError for a stage that
    has no language model, an unknown benchmark, one that draws, or missing data.
    """
    stage = settings.stage
    if not isinstance(stage, LanguageStageSettings):
        raise UserError(
            f"validation.probes are for stage.kind=language, this run has {stage.kind}: remove them"
        )
    asked = [_Questions(probe, seed=settings.seed) for probe in settings.validation.probes]

    def probe(module: nn.Module, step: int) -> Iterator[Mapping[str, float]]:
        responder = _responder(module, stage)
        found: dict[str, float] = {}
        for questions in asked:
            for part in questions.ask(responder):
                found.update(part)
                yield part
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        get_logger("evaluation").info("step %d probe: %s", step, shown)

    return probe


class _Questions:
    """The chosen examples of one benchmark."""

    def __init__(self, settings: ProbeSettings, *, seed: int):
        options = {"prompt_file": settings.prompts, **settings.options}
        self.benchmark = benchmarks.make(settings.benchmark, **options)
        if self.benchmark.kind in IMAGE_KINDS:
            raise UserError(
                f"{settings.benchmark} draws images; a probe answers in text, such as coco_caption, vqav2"
            )
        self.settings, self.data = settings, Path(settings.data)
        every = self.benchmark.examples(self.data)
        self.examples = select(every, limit=settings.num_examples, seed=seed)

    def ask(self, responder: ModelResponder) -> Iterator[dict[str, float]]:
        """An empty mapping after each batch, metrics by name at the end; no file is kept."""
        predictions: dict[str, Prediction] = {}
        size, decoding = self.settings.batch_size, self.benchmark.decoding
        with tempfile.TemporaryDirectory() as folder:
            for start in range(0, len(self.examples), size):
                batch = self.examples[start : start + size]
                prompts = [example.prompt for example in batch]
                records = answer(self.benchmark, responder, batch, prompts, decoding, Path(folder))
                predictions |= {record["id"]: record for record in records}
                yield {}
        metrics = self.benchmark.score(self.examples, predictions, self.data).metrics
        yield {f"{self.benchmark.name}/{name}": metric["value"] for name, metric in metrics.items()}


def _responder(module: nn.Module, stage: LanguageStageSettings) -> ModelResponder:
    """The model inside a training stage as a responder; nothing is copied."""
    from vlgpt.decoding.generator import Generator
    from vlgpt.stages.language import LanguageStage as Trained
    from vlgpt.stages.language import load_tokenizer

    assert isinstance(module, Trained)
    tokenizer = load_tokenizer(stage)
    generator = Generator(model=module.model, tokenizer=tokenizer, encoder=module.encoder, decoder=None)
    return ModelResponder(generator, identity={"kind": "training"})
