"""easy-VQA: questions about one coloured shape (V. Zhou), 13 answers; the pictures come with `pip install
easy-vqa`.

Small, public and offline: the demo's published VQA benchmark. Accuracy is exact match.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.vqa import ShortAnswers
from evaluation.core import DataNotFound, Decoding, Example, Prediction, Scores, mean_by, metric, read_json


@dataclass(frozen=True, kw_only=True)
class EasyVqa(ShortAnswers):
    """Splits test and train (shots), read from DATA/easy_vqa or from the installed package's data folder."""

    name: ClassVar[str] = "easy_vqa"
    default_decoding: ClassVar[Decoding] = Decoding(max_new_tokens=5, min_new_tokens=1)

    split: str = "test"

    def examples(self, data: Path) -> Sequence[Example]:
        folder = _folder(data) / self.split
        return [
            self._example(f"{self.split}-{number}", question, answer, folder / "images" / f"{image}.png")
            for number, (question, answer, image) in enumerate(read_json(folder / "questions.json"))
        ]

    def _example(self, id: str, question: str, answer: str, image: Path) -> Example:
        info = {"question": question, "image_id": f"{self.split}-{image.stem}"}
        info["question_type"] = "yes/no" if answer in ("yes", "no") else "open"
        return Example(id, self.make_prompt(id, images=(image,), question=question), answer, info)

    def pool(self, data: Path) -> Sequence[Example]:
        return replace(self, split="train").examples(data)

    def ideal(self, example: Example) -> str:
        return example.truth

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        examples = [example for example in self.loaded(data) if example.id in predictions]
        answers = self.answers(predictions)
        per_example = {e.id: 100.0 * (answers[e.id] == e.truth) for e in examples}
        counts, n = Counter(example.truth for example in examples), len(examples)
        chance = 100 * sum(count * (count - 1) for count in counts.values()) / max(n * (n - 1), 1)
        return Scores(
            metrics={
                "accuracy": metric(sum(per_example.values()) / n, n, chance=chance),
                "majority_answer": metric(100 * counts.most_common(1)[0][1] / n, n),
            },
            per_example=per_example,
            breakdown={
                "question_type": mean_by(per_example, {e.id: e.info["question_type"] for e in examples})
            },
            notes={"cut": self.cut},
        )


def _folder(data: Path) -> Path:
    """DATA/easy_vqa, or DATA itself when it is the installed package's data folder."""
    for folder in (data / "easy_vqa", data):
        if (folder / "test" / "questions.json").is_file():
            return folder
    spec = importlib.util.find_spec("easy_vqa")
    package = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    place = f"{package}/data" if package else "the data folder of `pip install easy-vqa`"
    raise DataNotFound(
        f"easy-VQA not found in {data}; give --data {place}, or link that folder as {data}/easy_vqa"
    )
