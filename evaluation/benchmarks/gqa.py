"""GQA: compositional questions with one right answer (paper, Table 2: testdev_balanced, exact match).

Official files `{split}_questions.json`; `{split}_choices.json` (validity, plausibility) where there is one.
Consistency needs the unbalanced questions too: `--option split=testdev_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.vqa import ShortAnswers, chance_of_equal
from evaluation.core import (
    Example,
    JsonObject,
    Predictions,
    Scores,
    find_file,
    find_folder,
    has_file,
    metric,
    read_json,
)
from evaluation.metrics.gqa import Normalise, gqa_scores, normalise_answer


@dataclass(frozen=True, kw_only=True)
class Gqa(ShortAnswers):
    """`normalise`: llava (spaces, final full stop, case) or raw, applied after the cut. `truth` is the record."""

    name: ClassVar[str] = "gqa"
    train_split: ClassVar[str] = "train_balanced"
    submission_keys: ClassVar = ("questionId", "prediction")

    split: str = "testdev_balanced"
    normalise: Normalise = "llava"

    def examples(self, data: Path) -> Sequence[Example]:
        """Questions of the split in file order; `test` splits have no truth."""
        folder = find_folder(data, "gqa/images", "images", "gqa/allImages/images")
        names = (f"gqa/{self.split}_questions.json", f"gqa/questions/{self.split}_questions.json")
        found = []
        for id, record in read_json(find_file(data, *names)).items():
            question, image_id = record["question"], record["imageId"]
            info = {"question": question, "image_id": image_id}
            if "types" in record:
                info |= {f"{key}_type": record["types"][key] for key in ("structural", "semantic")}
            prompt = self.make_prompt(id, images=(folder / f"{image_id}.jpg",), question=question)
            found.append(Example(id, prompt, record if "answer" in record else None, info))
        return found

    def ideal(self, example: Example) -> str:
        """The short answer of the question's record."""
        return example.truth["answer"]

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Accuracy in percent of balanced questions, with the official validity scores where the choices file
        exists.
        """
        self.require_truths(examples)
        questions = {example.id: example.truth for example in examples}
        names = (f"gqa/{self.split}_choices.json", f"gqa/eval/{self.split}_choices.json")
        choices = read_json(find_file(data, *names)) if has_file(data, *names) else None
        result = gqa_scores(questions, self.answers(predictions), choices=choices, normalise=self.normalise)
        balanced = [id for id, record in questions.items() if record["isBalanced"]]
        metrics = {name: metric(value, n) for name, (value, n) in result.scores.items()}
        gold = [questions[id]["answer"] for id in balanced]
        metrics["accuracy"]["chance"] = chance_of_equal(gold, lambda text: normalise_answer(self.clean(text)))
        return Scores(
            metrics=metrics,
            per_example={id: 100.0 * result.is_correct[id] for id in balanced},
            breakdown={
                name: {str(key): metric(value, n) for key, (value, n) in group.items()}
                for name, group in result.groups.items()
            },
            notes={"normalise": self.normalise, "cut": self.rule},
        )

    def submission(self, predictions: Predictions, data: Path) -> list[JsonObject]:
        """`[{"questionId": str, "prediction": str}]`, lower case without a final full stop."""
        answers = self.answers(predictions)
        return [{"questionId": id, "prediction": normalise_answer(text)} for id, text in answers.items()]
