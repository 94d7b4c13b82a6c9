"""GQA scores as in the official eval.py (D. Hudson): exact match, averages over the balanced questions only.

The data set's v1.2 has no choices files, so validity and plausibility are given only where `choices` is;
grounding, which needs attention maps, is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Normalise = Literal["llava", "raw"]
Group = dict[Hashable, tuple[float, int]]
"""Accuracy in percent and number of questions by type."""
Question = Mapping[str, Any]
Questions = Mapping[str, Question]
"""The official questions file: records by question id."""

_NOT_A_STEP = ("exist", "query: name", "choose name")
_COMMON_CHOICES = ("color", "material", "shape")


@dataclass(frozen=True)
class GqaResult:
    """`scores` by name in percent, except `distribution` (chi-square / 100, lower is better), with the number of
    questions; one whose input is missing is left out. `groups` has accuracy by type, `is_correct` every question.
    """

    scores: dict[str, tuple[float, int]]
    groups: dict[str, Group] = field(repr=False)
    is_correct: dict[str, bool] = field(repr=False)


def normalise_answer(text: str, normalise: Normalise = "llava") -> str:
    """`llava`: surrounding spaces and a final full stop off, lower case (LLaVA convert_gqa_for_eval); `raw`: unchanged.

    Raises ValueError for another mode.
    """
    if normalise == "raw":
        return text
    if normalise == "llava":
        return text.strip().rstrip(".").lower()
    raise ValueError(f"GQA normalise mode is {normalise!r}; wanted 'llava' or 'raw'")


def gqa_scores(
    questions: Questions,
    predictions: Mapping[str, str],
    *,
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    normalise: Normalise = "llava",
) -> GqaResult:
    """Score predictions by question id against the official questions file.

    Consistency is given where every entailed question of a rightly answered balanced one is among the
    questions and predictions (the "all" files), else it is None. Raises ValueError where a balanced
    question has no prediction or none is balanced.
    """
    answers = {question: normalise_answer(text, normalise) for question, text in predictions.items()}
    balanced = {name: question for name, question in questions.items() if question["isBalanced"]}
    missing = [name for name in balanced if name not in answers]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(balanced)} balanced questions have no prediction, first {missing[0]}"
        )
    if not balanced:
        raise ValueError(
            f"none of the {len(questions)} questions is balanced; GQA averages only over balanced ones"
        )
    is_correct = {name: answers[name] == questions[name]["answer"] for name in questions if name in answers}

    def mean(names: Sequence[str]) -> float:
        return 100 * (sum(is_correct[name] for name in names) / len(names)) if names else 0.0

    def grouped(keys: Mapping[str, Hashable]) -> Group:
        members: dict[Hashable, list[str]] = defaultdict(list)
        for name, key in keys.items():
            members[key].append(name)
        return {key: (mean(names), len(names)) for key, names in members.items()}

    def by_type(kind: str) -> Group:
        return grouped({name: question["types"].get(kind) for name, question in balanced.items()})

    binary = [name for name, question in balanced.items() if question["types"]["structural"] != "query"]
    others = [name for name, question in balanced.items() if question["types"]["structural"] == "query"]
    n = len(balanced)
    scores = {
        "accuracy": (mean(list(balanced)), n),
        "binary": (mean(binary), len(binary)),
        "open": (mean(others), len(others)),
        "consistency": (_consistency(balanced, is_correct), n),
        "validity": (_share_in_choices(balanced, answers, choices, "valid"), n),
        "plausibility": (_share_in_choices(balanced, answers, choices, "plausible"), n),
        "distribution": (_distribution(balanced, answers), n),
    }
    groups = {f"{kind}_type": by_type(kind) for kind in ("structural", "semantic", "detailed")}
    groups["steps"] = grouped({name: _num_steps(question) for name, question in balanced.items()})
    groups["length"] = grouped({name: len(q["question"].split()) for name, q in balanced.items()})
    found = {name: (value, num) for name, (value, num) in scores.items() if value is not None and num}
    return GqaResult(found, groups, is_correct)


def _num_steps(question: Question) -> int:
    """Reasoning steps, without the final look-up that every question has."""
    steps = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(name in step for name in _NOT_A_STEP) for step in steps)


def _consistency(balanced: Questions, is_correct: Mapping[str, bool]) -> float | None:
    """Accuracy on what a right answer entails, averaged over the right answers that entail another question."""
    shares = []
    for name, question in balanced.items():
        entailed = [other for other in question.get("entailed", ()) if other != name]
        if is_correct[name] and entailed:
            if any(other not in is_correct for other in entailed):
                return None
            shares.append(sum(is_correct[other] for other in entailed) / len(entailed))
    return 100 * (sum(shares) / len(shares)) if shares else 0.0


def _share_in_choices(
    balanced: Questions,
    answers: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None,
    kind: str,
) -> float | None:
    if choices is None:
        return None
    num_inside = 0
    for name, question in balanced.items():
        is_common = "Common" in question["types"]["detailed"]
        num_inside += answers[name] in (_COMMON_CHOICES if is_common else choices[name][kind])
    return 100 * (num_inside / len(balanced))


def _distribution(balanced: Questions, answers: Mapping[str, str]) -> float | None:
    """Chi-square distance of answer histograms per group, weighted by the size of the group."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            gold[group][question["answer"]] += 1
            given[group][answers[name]] += 1
    if not gold:
        return None
    weighted = sum(
        sum((given[group][answer] - expected) ** 2 / expected for answer, expected in histogram.items())
        * histogram.total()
        for group, histogram in gold.items()
    )
    return weighted / sum(histogram.total() for histogram in gold.values()) / 100
