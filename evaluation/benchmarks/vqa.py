"""Questions with short answers: VQAv2 and OK-VQA here, the base of GQA, VizWiz and easy-VQA.

VQAv2 (paper, Tables 2 and 3: test-dev, whose answers only the server knows) has the official files
`v2_OpenEnded_mscoco_{split}_questions.json` and `v2_mscoco_{split}_annotations.json`, OK-VQA (Table 2: val) the same
without "v2_".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.coco import coco_folder
from evaluation.core import (
    NO_PROMPT,
    Benchmark,
    DecodeSettings,
    Example,
    JsonObject,
    Metric,
    Predictions,
    Scores,
    find_file,
    has_file,
    mean_by,
    metric,
    read_json,
)
from evaluation.metrics.postprocess import Style, cut_answer
from evaluation.metrics.vqa import Mode, ScoredQuestion, answers_of, question_scorer, vqa_accuracy
from evaluation.metrics.vqa_text import Stem
from vlgpt.document import Part
from vlgpt.errors import UserError
from vlgpt.registry import dotted_name

GROUPS = ("answer_type", "question_type")


@dataclass(frozen=True, kw_only=True)
class ShortAnswers(Benchmark):
    """Questions with one right answer, `truth`: exact match after `cut` (emu | openflamingo | llava | none).

    Every `truth` must stay what it is when it is cut, or no reply could equal it (emu and llava write in lower case).
    A subclass with another rule overrides `clean`. `info` of an example has its "question", and "answer_type" or
    "question_type" where accuracy by type is wanted.
    """

    primary: ClassVar[str] = "accuracy"
    # PAPER: not stated (table 5); Emu's settings (Emu1/mm_eval)
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(
        max_new_tokens=20, min_new_tokens=1, num_beams=5, length_penalty=-1.0
    )

    prompt: str = "qa"
    cut: Style = "emu"

    def clean(self, text: str) -> str:
        """The answer without what the model wrote after it, by the rule `cut`."""
        return cut_answer(text, self.cut)

    @property
    def rule(self) -> str:
        """Who decides what counts of a reply: `cut`, or the class whose own `clean` does."""
        owner = next(cls for cls in type(self).__mro__ if "clean" in vars(cls))
        return self.cut if owner is ShortAnswers else f"{dotted_name(owner)}.clean"

    def ideal(self, example: Example) -> str:
        """The truth itself, a short text."""
        return example.truth

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        """The image and the question with the right answer."""
        question, answer = example.info["question"], self.ideal(example)
        return self.template.parts("demonstration", has_image=has_image, question=question, answer=answer)

    def require_truths(self, examples: Sequence[Example]) -> None:
        """Raises UserError for a split whose answers only the official server knows."""
        if any(example.truth is None for example in examples):
            raise UserError(
                f"{self.name} {self.split} has no public answers; upload submission.json to the server"
            )

    def _require_reachable(self, examples: Sequence[Example]) -> None:
        """Raises UserError for truths that cleaning changes: not even the oracle's reply would equal them."""
        cleaned = {truth: self.clean(truth) for truth in {example.truth for example in examples}}
        wrong = [example.truth for example in examples if cleaned[example.truth] != example.truth]
        if wrong:
            rule = f"cut={self.cut}" if self.rule == self.cut else self.rule
            raise UserError(
                f"{self.name}: {len(wrong)} of {len(examples)} truths can never be right: {rule} makes "
                f"{cleaned[wrong[0]]!r} of {wrong[0]!r}; give truths as `clean` leaves them, take another "
                "--option cut, or override `clean` (docs/extending.md)"
            )

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Exact-match accuracy in percent, beside that of answers to other questions."""
        self.require_truths(examples)
        self._require_reachable(examples)
        answers = self.answers(predictions)
        per_example = {e.id: 100.0 * (answers[e.id] == e.truth) for e in examples}
        chance = chance_of_equal([example.truth for example in examples], self.clean)
        accuracy = metric(sum(per_example.values()) / len(examples), len(examples), chance=chance)
        breakdown = by_type(examples, per_example)
        return Scores({"accuracy": accuracy}, per_example, breakdown, notes={"cut": self.rule})


def by_type(examples: Sequence[Example], per_example: Mapping[str, float]) -> dict[str, dict[str, Metric]]:
    """Mean score by answer type and question type, where the examples have them."""
    groups = [key for key in GROUPS if key in examples[0].info]
    return {key: mean_by(per_example, {e.id: e.info[key] for e in examples}) for key in groups}


def chance_of_equal(truths: Sequence[str], clean: Callable[[str], str]) -> float:
    """What other questions' answers score: percent of question pairs with the same answer, exactly.

    An answer that cleaning would change is never right.
    """
    n, counts = len(truths), Counter(truths)
    num_pairs = sum(count * (count - 1) for answer, count in counts.items() if clean(answer) == answer)
    return 100 * num_pairs / max(n * (n - 1), 1)


@dataclass(frozen=True, kw_only=True)
class VqaBenchmark(ShortAnswers):
    """Questions with ten human answers: `truth` is their list, None where it is not public."""

    mode: Mode = "official_2021"
    stem: Stem = "none"

    def ideal(self, example: Example) -> str:
        """The human answer that scores best, the most frequent one in a draw."""
        return _best_answer(example.truth, self.scorer(example.truth), self.clean)

    @cached_property
    def scorer(self) -> Callable[[Sequence[str]], ScoredQuestion]:
        """Annotators' answers of a question -> (cleaned prediction -> accuracy as a fraction)."""
        return question_scorer(mode=self.mode, stem=self.stem)

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """VQA accuracy in percent (Antol et al. 2015): the mean over questions, each with ten human answers."""
        self.require_truths(examples)
        answers = self.answers(predictions)
        scored = [self.scorer(example.truth) for example in examples]
        per_example = {e.id: 100 * question(answers[e.id]) for e, question in zip(examples, scored)}
        value = sum(per_example.values()) / len(examples)
        return Scores(
            metrics={"accuracy": metric(value, len(examples), chance=self._chance(examples, scored))},
            per_example=per_example,
            breakdown=by_type(examples, per_example),
            notes={"mode": self.mode, "stem": self.stem, "cut": self.rule},
        )

    def _chance(self, examples: Sequence[Example], scored: Sequence[ScoredQuestion]) -> float:
        """Expected accuracy in percent of the ideal answers of other questions, exactly: the sum over all pairs."""
        cleaned = {answer: self.clean(answer) for answer in {a for e in examples for a in e.truth}}
        clean = cleaned.__getitem__
        ideals = [cleaned[_best_answer(e.truth, question, clean)] for e, question in zip(examples, scored)]
        # All pairs of 214,354 questions are too many. A question scores only its own ten answers, so it is enough
        # to know how many questions have each answer as their ideal, after the question's own normalising.
        frequency = {key: Counter(map(key, ideals)) for key in {question.key for question in scored}}
        total = 0.0
        for own, question in zip(ideals, scored):
            num_ideals = frequency[question.key]
            total -= question(own)
            for answer, num_matches in question.num_matches.items():
                if answer in num_ideals:
                    total += question.shares[num_matches] * num_ideals[answer]
        num = len(examples)
        return 100 * total / (num * (num - 1)) if num > 1 else 0.0


def _best_answer(answers: Sequence[str], question: ScoredQuestion, clean: Callable[[str], str]) -> str:
    """The human answer that scores best once cleaned, the most frequent one in a draw."""
    # Most questions have a majority, whose answer need not be compared with the others.
    if 2 * answers.count(answers[0]) > len(answers) and question(clean(answers[0])) == 1.0:
        return answers[0]
    return max(dict.fromkeys(answers), key=lambda answer: (question(clean(answer)), answers.count(answer)))


@dataclass(frozen=True, kw_only=True)
class Vqav2(VqaBenchmark):
    """Splits: val2014 (scored here), test-dev2015 and test2015 (submission.json for EvalAI), train2014 (shots)."""

    name: ClassVar[str] = "vqav2"
    file_prefix: ClassVar[str] = "v2_"
    train_split: ClassVar[str] = "train2014"
    submission_keys: ClassVar = ("question_id", "answer")
    has_integer_ids: ClassVar[bool] = True

    split: str = "val2014"

    def examples(self, data: Path) -> Sequence[Example]:
        """Questions of the split with their ten human answers, in file order."""
        return self._read(data, has_prompts=True)

    def truths(self, data: Path) -> Sequence[Example]:
        """The same examples without prompts: half a million of them would take seconds and gigabytes."""
        return self._read(data, has_prompts=False)

    def _read(self, data: Path, *, has_prompts: bool) -> Sequence[Example]:
        annotations = self._annotations(data)
        subset = "test2015" if self.split.startswith("test") else self.split
        folder = coco_folder(data, subset)
        found = []
        for record in read_json(find_file(data, self._question_file(self.split)))["questions"]:
            id, question, image_id = str(record["question_id"]), record["question"], record["image_id"]
            prompt, truth, info = NO_PROMPT, None, {"question": question, "image_id": image_id}
            if has_prompts:
                image = folder / f"COCO_{subset}_{image_id:012d}.jpg"
                prompt = self.make_prompt(id, images=(image,), question=question)
            if annotations is not None:
                if id not in annotations:
                    raise UserError(
                        f"{self.name}: question {id} has no annotation; the two files are not a pair"
                    )
                truth, types = annotations[id]
                info |= types
            found.append(Example(id, prompt, truth, info))
        return found

    def _question_file(self, split: str) -> str:
        return f"{self.name}/{self.file_prefix}OpenEnded_mscoco_{split}_questions.json"

    def _annotations(self, data: Path) -> dict[str, tuple[list[str], dict[str, str]]] | None:
        """Human answers and types by question; None for a split whose answers are not public."""
        name = f"{self.name}/{self.file_prefix}mscoco_{self.split}_annotations.json"
        if not has_file(data, name) and self.split.startswith("test"):
            return None
        records = read_json(find_file(data, name))["annotations"]
        found = {}
        # Each record is given up once it is read: the file has 190 MB, its objects more than 1 GB.
        while records:
            record = records.pop()
            types = {key: record[key] for key in GROUPS if key in record}
            found[str(record["question_id"])] = (answers_of(record), types)
        return found

    def submission(self, predictions: Predictions, data: Path) -> list[JsonObject]:
        """`[{"question_id": int, "answer": str}]` for all questions of the split, as the server demands.

        Of test-dev the server wants all of test2015: where that file is there, the other answers are "".
        """
        answers = self.answers(predictions)
        ids = [example.id for example in self.truths(data)]
        if missing := [id for id in ids if id not in answers]:
            raise UserError(f"{self.name}: {len(missing)} questions have no answer, first {missing[0]}")
        whole = self._question_file("test2015")
        if self.split == "test-dev2015" and has_file(data, whole):
            ids = [
                str(question["question_id"]) for question in read_json(find_file(data, whole))["questions"]
            ]
        return [{"question_id": int(id), "answer": answers.get(id, "")} for id in ids]


@dataclass(frozen=True, kw_only=True)
class Okvqa(Vqav2):
    """Splits val2014 and train2014 (shots). The questions need outside knowledge, the human answers are stemmed.

    The main number stems the prediction too (Porter, as Emu and LAVIS do); `accuracy_unstemmed` is the plain VQA
    formula on the same answers.
    """

    name: ClassVar[str] = "okvqa"
    file_prefix: ClassVar[str] = ""

    mode: Mode = "official_2016"
    stem: Stem = "porter"

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """VQA accuracy with stemmed answers, and `accuracy_unstemmed` beside it."""
        scores = super().score(examples, predictions, data)
        answers = self.answers(predictions)
        plain = vqa_accuracy([answers[e.id] for e in examples], [e.truth for e in examples])
        scores.metrics["accuracy_unstemmed"] = metric(plain.overall, len(examples))
        return scores
