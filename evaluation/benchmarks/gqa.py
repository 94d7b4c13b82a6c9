"""GQA: compositional questions with one right answer (paper, Table 2: testdev_balanced, exact match).

Official files `{split}_questions.json`; `{split}_choices.json` (validity, plausibility) where there is one.
Consistency needs the unbalanced questions too: `--option split=testdev_all`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmarks.files import find_file, find_folder, has_file
from evaluation.benchmarks.vqa import ShortAnswers
from evaluation.core import Example, Prediction, Scores, metric, read_json
from evaluation.metrics.gqa import gqa_scores, normalise_answer

GROUPS = ("structural_type", "semantic_type", "detailed_type", "steps", "length")


@dataclass(frozen=True, kw_only=True)
class Gqa(ShortAnswers):
    """`normalise`: llava (blanks, final full stop, case) or raw, applied after the cut."""

    name: ClassVar[str] = "gqa"

    split: str = "testdev_balanced"
    normalise: str = "llava"

    def examples(self, data: Path) -> Sequence[Example]:
        folder = find_folder(data, "gqa/images", "images", "gqa/allImages/images")
        questions = self._questions(data)
        return [self._example(id, record, folder) for id, record in questions.items()]

    def _questions(self, data: Path) -> dict[str, dict[str, Any]]:
        return read_json(
            find_file(data, f"gqa/{self.split}_questions.json", f"gqa/questions/{self.split}_questions.json")
        )

    def _example(self, id: str, record: Mapping[str, Any], folder: Path) -> Example:
        question, image = record["question"], folder / f"{record['imageId']}.jpg"
        info = {"question": question, "image_id": record["imageId"]}
        info |= {
            f"{key}_type": record["types"][key] for key in ("structural", "semantic") if "types" in record
        }
        return Example(
            id, self.make_prompt(id, images=(image,), question=question), record.get("answer"), info
        )

    def pool(self, data: Path) -> Sequence[Example]:
        return replace(self, split="train_balanced").examples(data)

    def ideal(self, example: Example) -> str:
        return example.truth

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        questions = {id: record for id, record in self._questions(data).items() if id in predictions}
        names = [f"gqa/{self.split}_choices.json", f"gqa/eval/{self.split}_choices.json"]
        choices = read_json(find_file(data, *names)) if has_file(data, *names) else None
        answers = self.answers(predictions)
        result = gqa_scores(questions, answers, choices=choices, normalise=self.normalise)  # type: ignore[arg-type]
        balanced = [id for id, record in questions.items() if record["isBalanced"]]
        binary = [id for id in balanced if questions[id]["types"]["structural"] != "query"]
        sizes = {"accuracy": len(balanced), "binary": len(binary), "open": len(balanced) - len(binary)}
        metrics = {
            name: metric(getattr(result, name), sizes.get(name, len(balanced)))
            for name in (
                "accuracy",
                "binary",
                "open",
                "consistency",
                "validity",
                "plausibility",
                "distribution",
            )
            if getattr(result, name) is not None and sizes.get(name, 1)
        }
        metrics["accuracy"]["chance"] = self._chance([questions[id]["answer"] for id in balanced])
        return Scores(
            metrics=metrics,
            per_example={id: 100.0 * result.is_correct[id] for id in balanced},
            breakdown={
                name: {
                    str(key): metric(value, n) for key, (value, n) in getattr(result, f"per_{name}").items()
                }
                for name in GROUPS
            },
            notes={"normalise": self.normalise, "cut": self.cut},
        )

    def _chance(self, gold: Sequence[str]) -> float:
        """Share of question pairs with the same answer: what other questions' answers score."""
        n, counts = len(gold), Counter(gold)
        kept = {answer for answer in counts if normalise_answer(self.clean(answer), "llava") == answer}
        return 100 * sum(counts[answer] * (counts[answer] - 1) for answer in kept) / max(n * (n - 1), 1)

    def from_submission(self, records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
        return [{"id": str(record["questionId"]), "text": record["prediction"]} for record in records]

    def submission(self, predictions: Mapping[str, Prediction], data: Path) -> list[dict[str, Any]]:
        """`[{"questionId": str, "prediction": str}]`, lower case without a final full stop."""
        answers = self.answers(predictions)
        return [{"questionId": id, "prediction": normalise_answer(text)} for id, text in answers.items()]
