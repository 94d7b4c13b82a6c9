"""What VQAv2, OK-VQA and VizWiz share: short answers, ten human answers to each question, VQA accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.core import Benchmark, Decoding, Example, Prediction, Scores, mean_by, metric
from evaluation.metrics.postprocess import cut_answer
from evaluation.metrics.vqa import vqa_accuracy
from vlgpt.document import Part
from vlgpt.log import UserError


@dataclass(frozen=True, kw_only=True)
class ShortAnswers(Benchmark):
    """Open questions with short answers, cut from the reply by `cut` (emu | openflamingo | llava | none)."""

    primary: ClassVar[str] = "accuracy"
    default_decoding: ClassVar[Decoding] = Decoding(
        max_new_tokens=20, min_new_tokens=1, num_beams=5, length_penalty=-1.0
    )  # PAPER: not stated; Emu's settings (Emu1/mm_eval)

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
        ((best, _),) = self._candidates([example])
        return best

    def _candidates(self, examples: Sequence[Example]) -> list[tuple[str, dict[str, float]]]:
        """For each example its best human answer, and what each different cleaned human answer scores."""
        cleaned = {answer: self.clean(answer) for answer in {a for e in examples for a in e.truth}}
        ordered = [[answer for answer, _ in Counter(example.truth).most_common()] for example in examples]
        unique = [list(dict.fromkeys(cleaned[answer] for answer in answers)) for answers in ordered]
        truths = [example.truth for example, answers in zip(examples, unique) for _ in answers]
        scores = iter(self._accuracy([answer for answers in unique for answer in answers], truths))
        found = []
        for answers, different in zip(ordered, unique):
            score_of = {answer: next(scores) for answer in different}
            found.append((max(answers, key=lambda answer: score_of[cleaned[answer]]), score_of))
        return found

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        examples = [example for example in self.loaded(data) if example.id in predictions]
        if any(example.truth is None for example in examples):
            raise UserError(
                f"{self.name} {self.split} has no public answers; upload submission.json to the server"
            )
        answers = self.answers(predictions)
        per_example = dict(zip((e.id for e in examples), self._accuracy_of(examples, answers)))
        value = sum(per_example.values()) / len(examples)
        groups = [key for key in ("answer_type", "question_type") if key in examples[0].info]
        return Scores(
            metrics={"accuracy": metric(value, len(examples), chance=self.chance(examples))},
            per_example=per_example,
            breakdown={key: mean_by(per_example, {e.id: e.info[key] for e in examples}) for key in groups},
            notes={"mode": self.mode, "stem": self.stem, "cut": self.cut},
        )

    def chance(self, examples: Sequence[Example]) -> float:
        """Expected accuracy of the ideal answers of other questions, exactly: the sum over all pairs."""
        candidates = self._candidates(examples)
        ideals = [self.clean(best) for best, _ in candidates]
        frequency, num = Counter(ideals), len(examples)
        total = sum(
            score * (frequency[answer] - (answer == own))
            for own, (_, score_of) in zip(ideals, candidates)
            for answer, score in score_of.items()
        )
        return total / (num * (num - 1)) if num > 1 else 0.0

    def _accuracy_of(self, examples: Sequence[Example], answers: Mapping[str, str]) -> list[float]:
        return self._accuracy([answers[example.id] for example in examples], [e.truth for e in examples])

    def _accuracy(self, answers: Sequence[str], truths: Sequence[Any]) -> list[float]:
        return vqa_accuracy(answers, truths, mode=self.mode, stem=self.stem).per_question  # type: ignore[arg-type]
