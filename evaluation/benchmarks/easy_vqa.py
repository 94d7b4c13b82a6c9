"""easy-VQA: questions about one coloured shape (V. Zhou), 13 answers; the images come with `pip install easy-vqa`.

Small, public and offline. Accuracy is exact match.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.vqa import ShortAnswers
from evaluation.core import DataNotFound, DecodeSettings, Example, Predictions, Scores, metric, read_json


@dataclass(frozen=True, kw_only=True)
class EasyVqa(ShortAnswers):
    """Splits test and train (shots), read from DATA/easy_vqa or from the installed package's data folder."""

    name: ClassVar[str] = "easy_vqa"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=5, min_new_tokens=1)
    train_split: ClassVar[str] = "train"

    split: str = "test"

    def examples(self, data: Path) -> Sequence[Example]:
        """Questions of the split, in the package's order."""
        folder = _folder(data) / self.split
        found = []
        for number, (question, answer, image) in enumerate(read_json(folder / "questions.json")):
            id = f"{self.split}-{number}"
            prompt = self.make_prompt(id, images=(folder / "images" / f"{image}.png",), question=question)
            info = {"question": question, "image_id": f"{self.split}-{image}"}
            info["question_type"] = "yes/no" if answer in ("yes", "no") else "open"
            found.append(Example(id, prompt, answer, info))
        return found

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Accuracy in percent, beside that of the answer that is most frequent among these examples."""
        scores = super().score(examples, predictions, data)
        ((_, most),) = Counter(example.truth for example in examples).most_common(1)
        scores.metrics["majority_answer"] = metric(100 * most / len(examples), len(examples))
        return scores


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
