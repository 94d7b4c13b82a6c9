"""VizWiz: questions that blind people asked about their photographs; many cannot be answered.

Official files `val.json`, `train.json`, `test.json` (a list; the picture's name is the id) and folders of
pictures. The paper's split is test-dev, whose answers only the server knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from evaluation import prompts
from evaluation.benchmarks.files import find_file, find_folder
from evaluation.benchmarks.vqa import VqaBenchmark
from evaluation.core import Example, Prediction, Prompt, Scores, SecondQuestion, metric, read_json
from evaluation.metrics.vqa import answers_of, vizwiz_answerable_from_answers, vizwiz_unanswerable
from vlgpt.document import Document
from vlgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VizWiz(VqaBenchmark):
    """Splits val (scored here), test (submission.json), train (shots). `prompt=qa_unanswerable` adds the
    sentence that moves this benchmark by 20 points and more; the default is the paper's prompt.

    `second_prompt=qa_answerable` also asks whether the answer is known, as Emu does (Emu1/mm_eval/datasets/
    vizwiz.py): the likelier of "yes." and "no." counts, "no." makes the answer "unanswerable", and the share of
    "yes." is the score of the answerability task. It is asked without demonstrations.
    """

    name: ClassVar[str] = "vizwiz"
    answer_options: ClassVar[tuple[str, ...]] = ("second_prompt",)

    mode: str = "vizwiz"
    second_prompt: str = "none"

    def examples(self, data: Path) -> Sequence[Example]:
        names = (
            f"vizwiz/{self.split}.json",
            f"vizwiz/annotations/{self.split}.json",
            f"annotations/{self.split}.json",
        )
        records = read_json(find_file(data, *names))
        folder = find_folder(
            data, f"vizwiz/{self.split}", f"vizwiz/images/{self.split}", f"images/{self.split}", self.split
        )
        return [self._example(record, folder / record["image"]) for record in records]

    def _example(self, record: Mapping[str, Any], image: Path) -> Example:
        id, question = record["image"], record["question"]
        info = {"question": question, "image_id": id}
        info |= {key: record[key] for key in ("answer_type", "answerable") if key in record}
        truth = answers_of(record) if "answers" in record else None
        return Example(id, self.make_prompt(id, images=(image,), question=question), truth, info)

    @property
    def second_template(self) -> prompts.PromptTemplate | None:
        return None if self.second_prompt == "none" else replace(self, prompt=self.second_prompt).template

    def second_question(self, example: Example) -> SecondQuestion | None:
        template = self.second_template
        if template is None:
            return None
        parts = prompts.merge_text(template.parts("prompt", question=example.info["question"]))
        prompt = Prompt(Document(example.id, self.name, parts), example.prompt.images, example.id)
        return SecondQuestion(prompt, (template.candidate("yes"), template.candidate("no")), "answerable")

    def ideal_choice(self, example: Example) -> np.ndarray:
        (is_known,) = vizwiz_answerable_from_answers([self.clean(self.ideal(example))])
        return np.array([0.0, -9.0]) if is_known else np.array([-9.0, 0.0])

    def answers(self, predictions: Mapping[str, Prediction]) -> dict[str, str]:
        answers = super().answers(predictions)
        if self.second_prompt == "none":
            return answers
        if without := [id for id, prediction in predictions.items() if "answerable" not in prediction]:
            raise UserError(
                f"{self.name}: second_prompt is {self.second_prompt}, but these predictions have no `answerable`: "
                f"{', '.join(without[:10])}"
            )
        is_known = {id: prediction["answerable"] >= 0.5 for id, prediction in predictions.items()}
        return {id: answer if is_known[id] else "unanswerable" for id, answer in answers.items()}

    def pool(self, data: Path) -> Sequence[Example]:
        return replace(self, split="train").examples(data)

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        """Accuracy, and AP and F1 of "unanswerable" from `answerable` in [0, 1] of a prediction, else from
        its text."""
        scores = super().score(predictions, data)
        scores.notes["second_prompt"] = self.second_prompt
        labels = {e.id: e.info["answerable"] for e in self.loaded(data) if "answerable" in e.info}
        ids = [id for id in predictions if id in labels]
        if not ids:
            return scores
        answers = self.answers(predictions)
        hard = vizwiz_answerable_from_answers([answers[id] for id in ids])
        given = [float(predictions[id].get("answerable", value)) for id, value in zip(ids, hard)]
        result = vizwiz_unanswerable([labels[id] for id in ids], given)
        share = 100 * sum(1 - labels[id] for id in ids) / len(ids)
        scores.metrics["unanswerable_ap"] = metric(result.average_precision, len(ids), chance=share)
        scores.metrics["unanswerable_f1"] = metric(result.f1, len(ids))
        has_scores = any("answerable" in predictions[id] for id in ids)
        scores.notes["unanswerable_from"] = "scores" if has_scores else "the answer text"
        return scores

    def from_submission(self, records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
        return [{"id": str(record["image"]), "text": record["answer"]} for record in records]

    def submission(self, predictions: Mapping[str, Prediction], data: Path) -> list[dict[str, Any]]:
        """`[{"image": name, "answer": str}]`, one for every picture of the split."""
        answers = self.answers(predictions)
        return [{"image": example.id, "answer": answers[example.id]} for example in self.loaded(data)]
