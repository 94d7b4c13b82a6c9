"""VizWiz: questions that blind people asked about their photographs; many cannot be answered.

Official files `val.json`, `train.json`, `test.json` (a list; the image's name is the id) and folders of images.
The paper's split is test-dev, whose answers only the server knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from evaluation import prompts
from evaluation.benchmarks.vqa import VqaBenchmark
from evaluation.core import (
    Example,
    Predictions,
    Prompt,
    Scores,
    SecondQuestion,
    find_file,
    find_folder,
    metric,
    read_json,
)
from evaluation.metrics.vqa import Mode, answers_of, vizwiz_answerable_from_answers, vizwiz_unanswerable
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
    train_split: ClassVar[str] = "train"
    submission_keys: ClassVar = ("image", "answer")
    answer_options: ClassVar[tuple[str, ...]] = ("second_prompt",)

    mode: Mode = "vizwiz"
    second_prompt: str = "none"

    def examples(self, data: Path) -> Sequence[Example]:
        """Questions of the split in file order; the test split has no truth."""
        split = self.split
        names = (f"vizwiz/{split}.json", f"vizwiz/annotations/{split}.json", f"annotations/{split}.json")
        folder = find_folder(data, f"vizwiz/{split}", f"vizwiz/images/{split}", f"images/{split}", split)
        found = []
        for record in read_json(find_file(data, *names)):
            id, question = record["image"], record["question"]
            info = {"question": question, "image_id": id}
            info |= {key: record[key] for key in ("answer_type", "answerable") if key in record}
            truth = answers_of(record) if "answers" in record else None
            prompt = self.make_prompt(id, images=(folder / id,), question=question)
            found.append(Example(id, prompt, truth, info))
        return found

    @property
    def second_template(self) -> prompts.PromptTemplate | None:
        return None if self.second_prompt == "none" else replace(self, prompt=self.second_prompt).template

    def second_question(self, example: Example) -> SecondQuestion | None:
        """Whether the question can be answered, by the likelihood of yes and no; None when `second_prompt` is
        "none".
        """
        template = self.second_template
        if template is None:
            return None
        parts = prompts.merge_text(template.parts("prompt", question=example.info["question"]))
        prompt = Prompt(Document(example.id, self.name, parts), example.prompt.images, example.id)
        is_known = None
        if example.truth is not None:
            is_known = bool(vizwiz_answerable_from_answers([self.clean(self.ideal(example))])[0])
        candidates = (template.candidate("yes"), template.candidate("no"))
        return SecondQuestion(prompt, candidates, "answerable", is_known)

    def answers(self, predictions: Predictions) -> dict[str, str]:
        """Cleaned answers by id, "unanswerable" where the second question says so. Raises UserError when it was not
        asked.
        """
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

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Accuracy, and AP and F1 of "unanswerable" from `answerable` in [0, 1] of a prediction, else its text."""
        scores = super().score(examples, predictions, data)
        scores.notes["second_prompt"] = self.second_prompt
        labels = {e.id: e.info["answerable"] for e in examples if "answerable" in e.info}
        if not labels:
            return scores
        answers = self.answers(predictions)
        hard = vizwiz_answerable_from_answers([answers[id] for id in labels])
        given = [float(predictions[id].get("answerable", value)) for id, value in zip(labels, hard)]
        result = vizwiz_unanswerable([*labels.values()], given)
        n = len(labels)
        share = 100 * sum(1 - label for label in labels.values()) / n
        scores.metrics["unanswerable_ap"] = metric(result.average_precision, n, chance=share)
        scores.metrics["unanswerable_f1"] = metric(result.f1, n)
        has_scores = any("answerable" in predictions[id] for id in labels)
        scores.notes["unanswerable_from"] = "scores" if has_scores else "the answer text"
        return scores
