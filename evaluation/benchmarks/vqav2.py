"""VQAv2: open questions about COCO pictures (paper, Tables 2 and 3: test-dev, whose answers only the server
knows).

Official files `v2_OpenEnded_mscoco_{split}_questions.json` and `v2_mscoco_{split}_annotations.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.benchmarks.files import coco_folder, coco_image, find_file, has_file
from evaluation.benchmarks.vqa import VqaBenchmark
from evaluation.core import NO_PROMPT, Example, Prediction, Prompt, read_json
from evaluation.metrics.vqa import answers_of
from vlgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Vqav2(VqaBenchmark):
    """Splits: val2014 (scored here), test-dev2015 and test2015 (submission.json for EvalAI), train2014
    (shots)."""

    name: ClassVar[str] = "vqav2"
    question_files: ClassVar[tuple[str, ...]] = ("v2_OpenEnded_mscoco_{split}_questions.json",)
    annotation_files: ClassVar[tuple[str, ...]] = ("v2_mscoco_{split}_annotations.json",)

    split: str = "val2014"

    def examples(self, data: Path) -> Sequence[Example]:
        subset = "test2015" if self.split.startswith("test") else self.split
        folder = coco_folder(data, subset)

        def prompt(id: str, question: Mapping[str, Any]) -> Prompt:
            image = coco_image(folder, subset, question["image_id"])
            return self.make_prompt(id, images=(image,), question=question["question"])

        return self._examples(data, prompt)

    def truths(self, data: Path) -> Sequence[Example]:
        return self._examples(data, lambda id, question: NO_PROMPT)

    def _examples(self, data: Path, prompt: Callable[[str, Mapping[str, Any]], Prompt]) -> Sequence[Example]:
        annotations = self._annotations(data)
        questions = read_json(self._find(data, self.question_files))["questions"]
        return [self._example(question, annotations, prompt) for question in questions]

    def _annotations(self, data: Path) -> dict[int, tuple[list[str], dict[str, str]]] | None:
        """Human answers and types by question; None for a split whose answers are not public."""
        if not has_file(data, *self._names(self.annotation_files)) and self.split.startswith("test"):
            return None
        records = read_json(self._find(data, self.annotation_files))["annotations"]
        found = {}
        while records:  # each is given up once it is read: the file has 190 MB, its objects more than 1 GB
            record = records.pop()
            types = {key: record[key] for key in ("answer_type", "question_type") if key in record}
            found[record["question_id"]] = (answers_of(record), types)
        return found

    def _example(
        self,
        question: Mapping[str, Any],
        annotations: Mapping[int, tuple[list[str], dict[str, str]]] | None,
        prompt: Callable[[str, Mapping[str, Any]], Prompt],
    ) -> Example:
        id = str(question["question_id"])
        info = {"question": question["question"], "image_id": question["image_id"]}
        truth = None
        if annotations is not None:
            if question["question_id"] not in annotations:
                raise UserError(f"{self.name}: question {id} has no annotation; the two files are not a pair")
            truth, types = annotations[question["question_id"]]
            info |= types
        return Example(id, prompt(id, question), truth, info)

    def _names(self, patterns: Sequence[str]) -> list[str]:
        return [f"{self.name}/{pattern.format(split=self.split)}" for pattern in patterns]

    def _find(self, data: Path, patterns: Sequence[str]) -> Path:
        return find_file(data, *self._names(patterns))

    def pool(self, data: Path) -> Sequence[Example]:
        return replace(self, split="train2014").examples(data)

    def from_submission(self, records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
        return [{"id": str(record["question_id"]), "text": record["answer"]} for record in records]

    def submission(self, predictions: Mapping[str, Prediction], data: Path) -> list[dict[str, Any]]:
        """`[{"question_id": int, "answer": str}]` for all questions of the split, as the server demands.

        Of test-dev the server wants all of test2015: where that file is there, the other answers are "".
        """
        answers = self.answers(predictions)
        ids = [example.id for example in self.loaded(data)]
        if missing := [id for id in ids if id not in answers]:
            raise UserError(f"{self.name}: {len(missing)} questions have no answer, first {missing[0]}")
        whole = replace(self, split="test2015")
        if self.split == "test-dev2015" and has_file(data, *whole._names(self.question_files)):
            questions = read_json(whole._find(data, self.question_files))["questions"]
            ids = [str(question["question_id"]) for question in questions]
        return [{"question_id": int(id), "answer": answers.get(id, "")} for id in ids]
