"""What the demos must reach. `make demo`: floors measured on a prototype; `make demo-lm`: what `make demo` reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PassMark:
    """`value` is a bound of the metric or, `per_chance`, of its ratio to the chance level."""

    sign: Literal[">=", "<="]
    value: float
    per_chance: bool = False

    @property
    def text(self) -> str:
        return f"{self.sign} {self.value:g}{' x chance' if self.per_chance else ''}"

    def is_met(self, entry: Mapping[str, float]) -> bool:
        """Whether a metric {"value", "chance", "n"} reaches the mark."""
        bound = self.value * (entry["chance"] if self.per_chance else 1.0)
        return entry["value"] >= bound if self.sign == ">=" else entry["value"] <= bound


PASS_MARKS: Mapping[str, PassMark] = {
    "reconstruction/pixel_mse": PassMark("<=", 0.11),
    "reconstruction/clip_similarity": PassMark(">=", 0.25),
    "caption/word_f1": PassMark(">=", 2.0, per_chance=True),
    "caption/cider": PassMark(">=", 0.9),
    "vqa/tone": PassMark(">=", 0.55),
    "vqa/gender": PassMark(">=", 0.58),
    "vqa/subcategory": PassMark(">=", 0.30),
    "draw/real_r5": PassMark(">=", 0.15),
    "draw/real_r5_seen": PassMark(">=", 0.25),
    "draw/pixel_mse_ratio": PassMark("<=", 0.75),
    "edit/tone_accuracy": PassMark(">=", 0.35),
    "edit/concept_kept": PassMark(">=", 0.40),
    "edit/gender_accuracy": PassMark(">=", 0.55),
    "fewshot/label_gain": PassMark(">=", 0.25),
}


def marks_beside(demo: Mapping[str, Mapping[str, float]]) -> dict[str, PassMark]:
    """The marks of a pre-trained language model on the same data, from the metrics of `make demo`, to three digits."""

    def at_least(name: str, share: float = 1.0) -> PassMark:
        return PassMark(">=", round(share * demo[name]["value"], 3))

    return {
        "caption/word_f1": PassMark(">=", 0.45),
        "vqa/tone": at_least("vqa/tone"),
        "vqa/gender": at_least("vqa/gender"),
        "draw/real_r5": at_least("draw/real_r5", 0.8),
        "text/nll_ratio": PassMark("<=", 1.05),
    }
