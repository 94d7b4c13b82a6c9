"""The stages by kind, and the one function that makes a run's stage from its settings."""

from __future__ import annotations

from collections.abc import Mapping

from vlgpt import seeds
from vlgpt.registry import load_class
from vlgpt.settings import RunSettings
from vlgpt.stages.base import Stage

STAGES: Mapping[str, str] = {
    "image_tokenizer": "vlgpt.stages.tokenizer:ImageTokenizerStage",
    "language": "vlgpt.stages.language:LanguageStage",
}


def build_stage(run: RunSettings, *, num_sources: int) -> Stage:
    """The stage that `stage.kind` names, made by its `from_settings`; new weights are drawn from the run's seed.

    Raises UserError when a component or checkpoint is missing or does not fit.
    """
    stage = load_class(run.stage.kind, Stage, key="stage.kind", known=STAGES)
    # New weights are drawn from torch's global generator: the same on every rank.
    seeds.seed_everything(run.seed, "initialisation")
    return stage.from_settings(run, num_sources=num_sources)
