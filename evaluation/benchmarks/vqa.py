"""What VQAv2, OK-VQA and VizWiz share: short answers, ten human answers to each question, VQA accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from evaluation.core import Benchmark, Decoding, Example, Prediction, Scores, mean_by, metric
from evaluation.metrics.postprocess import cut_answer
from evaluation.metrics.vqa import ScoredQuestion, question_scorer
from vlgpt.document import Part
from vlgpt.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ShortAnswers(Benchmark):
    """Open questions with short answers, cut from the reply by `cut` (emu | openflamingo | llava | none)."""

    primary: ClassVar[str] = "accuracy"
    default_decoding: ClassVar[Decoding] = Decoding(
        max_new_tokens=20, min_new_tokens=1, num_beams=5, length_penalty=-1.0
    )  # PAPER: not stated (table 5); Emu's settings (Emu1/mm_eval)

    prompt: str = "qa"
    cut: str = "emu"

    def clean(self, text: str) -> str:
        return cut_answer(text, self.cut)  # type: ignore[arg-type]

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        return self.template.parts(
            "demonstration",
            has_image=has_image,
            question=example.info["question"],
            answer=self.shown_answer(example),
        )

    def shown_answer(self, example: Example) -> str:
        """The answer that a demonstration shows."""
        return self.ideal(example)

    def answers(self, predictions: Mapping[str, Prediction]) -> dict[str, str]:
        """Cleaned answers by id. Raises UserError where a prediction has no text."""
        if without := [
            id for id, prediction in predictions.items() if not isinstance(prediction.get("text"), str)
        ]:
            raise UserError(f"{self.name}: predictions without a text answer: {', '.join(without[:10])}")
        return {id: self.clean(prediction["text"]) for id, prediction in predictions.items()}


@dataclass(frozen=True, kw_only=True)
class VqaBenchmark(ShortAnswers):
    """Open questions with ten human answers; an example's truth is the list of answers, None where not
    public."""

    mode: str = "official_2021"
    stem: str = "none"

    def ideal(self, example: Example) -> str:
        """The human answer that scores best, the most frequent one in a draw."""
        return _best_answer(example.truth, self.scorer(example.truth), self.clean)

    @cached_property
    def scorer(self) -> Callable[[Sequence[str]], ScoredQuestion]:
        """Annotators' answers of a question -> (cleaned prediction -> accuracy as a fraction)."""
        return question_scorer(mode=self.mode, stem=self.stem)  # type: ignore[arg-type]

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        examples = [example for example in self.loaded(data) if example.id in predictions]
        if any(example.truth is None for example in examples):
            raise UserError(
                f"{self.name} {self.split} has no public answers; upload submission.json to the server"
            )
        answers = self.answers(predictions)
        scored = [self.scorer(example.truth) for example in examples]
        per_example = {e.id: 100 * question(answers[e.id]) for e, question in zip(examples, scored)}
        value = sum(per_example.values()) / len(examples)
        groups = [key for key in ("answer_type", "question_type") if key in examples[0].info]
        return Scores(
            metrics={"accuracy": metric(value, len(examples), chance=self.chance(examples, scored))},
            per_example=per_example,
            breakdown={key: mean_by(per_example, {e.id: e.info[key] for e in examples}) for key in groups},
            notes={"mode": self.mode, "stem": self.stem, "cut": self.cut},
        )

    def chance(self, examples: Sequence[Example], scored: Sequence[ScoredQuestion]) -> float:
        """Expected accuracy in percent of the ideal answers of other questions, exactly: the sum over all pairs."""
        cleaned = {answer: self.clean(answer) for answer in {a for e in examples for a in e.truth}}
        clean = cleaned.__getitem__
        ideals = [cleaned[_best_answer(e.truth, question, clean)] for e, question in zip(examples, scored)]
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
    if 2 * answers.count(answers[0]) > len(answers) and question(clean(answers[0])) == 1.0:
        return answers[0]
    return max(dict.fromkeys(answers), key=lambda answer: (question(clean(answer)), answers.count(answer)))
