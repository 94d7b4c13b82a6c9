"""VQA accuracy for VQAv2, OK-VQA and VizWiz in the forms that published evaluators use.

Every form counts annotators: with m of n annotators giving the predicted answer, leaving each out in turn,
accuracy is (m * min(1, (m-1)/3) + (n-m) * min(1, m/3)) / n. The forms differ in what is normalised before
the comparison:

    official_2021     GT-Vision-Lab/VQA@a013f00: both sides, but only where the annotators do not all agree
    official_2016     GT-Vision-Lab/VQA@458a8b2 (also LAVIS, BLIP-2, Emu): prediction always; annotators only
                      punctuation and only where they do not all agree
    always            OpenFlamingo, VLMEvalKit, lmms-eval: both sides, always
    vizwiz            VizWiz API: prediction always, annotators never
    vizwiz_backtick   the same with the back-ticks that one copy of that API has in its contraction table

Normalising and stemming are in vqa_text.py. Which form the VQAv2 test server runs is not public.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

from evaluation.metrics.vqa_text import Stem, clean, normaliser, punctuation_step

Mode = Literal["official_2021", "official_2016", "always", "vizwiz", "vizwiz_backtick"]
Normalise = Callable[[str], str]


@dataclass(frozen=True)
class VqaResult:
    """Accuracies in percent; `per_question` is in input order and not rounded."""

    overall: float
    per_question: list[float] = field(repr=False)


def vqa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    mode: Mode = "official_2021",
    stem: Stem = "none",
) -> VqaResult:
    """Accuracy of one prediction per question against its annotators' answers.

    `stem="porter"` with mode official_2016 is the OK-VQA evaluator of Emu and LAVIS, whose stemmer sees the
    whole answer as one word and so changes only its end. Raises ValueError where lengths differ or there is no
    question; see `question_scorer` for the rest.
    """
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} questions; give one for each")
    if not predictions:
        raise ValueError("no questions to score")
    scorer = question_scorer(mode=mode, stem=stem)
    shares = [scorer(given)(prediction) for prediction, given in zip(predictions, answers)]
    return VqaResult(100 * sum(shares) / len(shares), [100 * share for share in shares])


class ScoredQuestion(NamedTuple):
    """A question whose annotators' answers are normalised and counted; call it with a prediction.

    `key` normalises a prediction before it is looked up; `shares` is the accuracy by number of matches.
    """

    num_matches: Mapping[str, int]
    key: Normalise
    shares: tuple[float, ...]

    def __call__(self, prediction: str) -> float:
        """The accuracy as a fraction."""
        return self.shares[self.num_matches.get(self.key(prediction), 0)]


def question_scorer(*, mode: Mode, stem: Stem = "none") -> Callable[[Sequence[str]], ScoredQuestion]:
    """A function: annotators' answers of a question -> `ScoredQuestion`.

    Raises ValueError for an unknown mode or stem. The function raises TypeError where the answers are one
    string, ValueError where there are none.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"VQA mode is {mode!r}; wanted one of {', '.join(get_args(Mode))}")
    full = normaliser(stem=stem, has_backticks=mode == "vizwiz_backtick")
    only_punctuation, plain = punctuation_step(stem=stem), lru_cache(maxsize=1 << 18)(clean)

    def prepared(given: Sequence[str]) -> ScoredQuestion:
        if isinstance(given, str):
            raise TypeError(f"answers of a question are the string {given!r}; wanted a list of strings")
        if not given:
            raise ValueError("a question has no annotators' answers")
        is_unanimous = given.count(given[0]) == len(given)
        key = full
        compared: Iterable[str] = map(full, given)
        if mode in ("vizwiz", "vizwiz_backtick"):
            compared = given
        elif mode == "official_2016":
            compared = given if is_unanimous else map(only_punctuation, given)
        elif mode == "official_2021" and (is_unanimous or len(set(map(plain, given))) == 1):
            # UPSTREAM: where all agree nothing is normalised, so "Yes" against ten times "yes" is wrong.
            key, compared = plain, map(plain, given)
        # A plain dict: `Counter` takes twice as long for ten answers, and VQAv2 has 214,354 questions.
        num_matches: dict[str, int] = {}
        for answer in compared:
            num_matches[answer] = num_matches.get(answer, 0) + 1
        return ScoredQuestion(num_matches, key, _shares(len(given)))

    return prepared


@cache
def _shares(num_annotators: int) -> tuple[float, ...]:
    """`leave_one_out` of 0 .. num_annotators matches."""
    return tuple(leave_one_out(num, num_annotators) for num in range(num_annotators + 1))


def leave_one_out(num_matches: int, num_annotators: int) -> float:
    """Mean over annotators of min(1, matches among the others / 3)."""
    others = num_annotators - num_matches
    with_one_out = num_matches * min(1.0, max(num_matches - 1, 0) / 3)
    return (with_one_out + others * min(1.0, num_matches / 3)) / num_annotators


@dataclass(frozen=True)
class UnanswerableResult:
    """Percentages for "this question cannot be answered", the positive class."""

    average_precision: float
    f1: float


def vizwiz_unanswerable(is_answerable: Sequence[int], scores: Sequence[float]) -> UnanswerableResult:
    """AP and F1 of the VizWiz answerability task from answerability scores in [0, 1].

    A question counts as called unanswerable where 1 - score > 0.5. Ties share one threshold, as in
    scikit-learn's `average_precision_score`. Without any unanswerable question both are 0 (scikit-learn: 0
    and a warning). Raises ValueError where the lengths differ.
    """
    if len(is_answerable) != len(scores):
        raise ValueError(f"{len(scores)} scores for {len(is_answerable)} labels; give one for each")
    labels = [1 - label for label in is_answerable]
    doubts = [1.0 - score for score in scores]
    num_positive = sum(labels)
    if num_positive == 0:
        return UnanswerableResult(0.0, 0.0)
    at_threshold: dict[float, Counter[int]] = defaultdict(Counter)
    for doubt, label in zip(doubts, labels):
        at_threshold[doubt][label] += 1
    found = seen = 0
    precision_sum = 0.0
    for doubt in sorted(at_threshold, reverse=True):
        found += at_threshold[doubt][1]
        seen += at_threshold[doubt].total()
        precision_sum += at_threshold[doubt][1] / num_positive * (found / seen)
    called = [doubt > 0.5 for doubt in doubts]
    num_right = sum(label for label, is_called in zip(labels, called) if is_called)
    f1 = 2 * num_right / (sum(called) + num_positive)
    return UnanswerableResult(100 * precision_sum, 100 * f1)


def vizwiz_answerable_from_answers(predictions: Sequence[str]) -> list[int]:
    """0 where the normalised answer is "unanswerable", else 1: the hard scores of a model that only answers."""
    full = normaliser()
    return [int(full(prediction) != "unanswerable") for prediction in predictions]


def answers_of(annotation: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """The answer strings of a VQA, OK-VQA or VizWiz annotation: their places count, not their ids."""
    return [entry["answer"] for entry in annotation["answers"]]
