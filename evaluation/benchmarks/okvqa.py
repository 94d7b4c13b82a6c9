"""OK-VQA: questions that need outside knowledge (paper, Table 2: val). The human answers are stemmed.

Official files `OpenEnded_mscoco_{split}_questions.json` and `mscoco_{split}_annotations.json`. The main
number stems the prediction too (Porter, as Emu and LAVIS do); `accuracy_unstemmed` is the plain VQA formula
on the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.vqav2 import Vqav2
from evaluation.core import Example, Prediction, Scores, metric
from evaluation.metrics.vqa import vqa_accuracy


@dataclass(frozen=True, kw_only=True)
class Okvqa(Vqav2):
    """Splits val2014 and train2014 (shots)."""

    name: ClassVar[str] = "okvqa"
    question_files: ClassVar[tuple[str, ...]] = ("OpenEnded_mscoco_{split}_questions.json",)
    annotation_files: ClassVar[tuple[str, ...]] = ("mscoco_{split}_annotations.json",)

    mode: str = "official_2016"
    stem: str = "porter"

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        scores = super().score(predictions, data)
        examples: list[Example] = [e for e in self.loaded(data) if e.id in predictions]
        answers = self.answers(predictions)
        plain = vqa_accuracy(
            [answers[e.id] for e in examples], [e.truth for e in examples], mode="official_2021"
        )
        scores.metrics["accuracy_unstemmed"] = metric(plain.overall, len(examples))
        return scores
