"""Emoji benchmarks that are answered in words: captions, questions, and label pages read from context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from demo.benchmarks.data import (
    SPLITS,
    EmojiBenchmark,
    Item,
    ask,
    best_constant,
    by_split,
    chats,
    load,
    named,
    shuffled_score,
    subset,
)
from demo.word_f1 import word_f1
from evaluation.core import Example, Predictions, Scores, mean_by, metric
from evaluation.metrics.captions import score_captions
from vlgpt import seeds
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError

FAMILIES = ("tone", "gender", "category", "subcategory", "flag", "style", "is_a")
ATTRIBUTES = ("category", "tone", "gender", "style", "subcategory")
SHOTS = (0, 2, 4, 8)


class WordAnswers(EmojiBenchmark):
    """Replies are compared as lower-case text without a final full stop."""

    def ideal(self, example: Example) -> str:
        """The true words as a sentence."""
        return f"{example.truth}."

    def clean(self, text: str) -> str:
        """The reply in lower case, without a final full stop and repeated spaces."""
        return " ".join(text.split()).rstrip(". ").lower()


@dataclass(frozen=True, kw_only=True)
class EmojiCaption(WordAnswers):
    """Word F1 and CIDEr (one reference) of captions written for held-out images."""

    name: ClassVar[str] = "emoji_caption"
    primary: ClassVar[str] = "caption/word_f1"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=24)

    limit: int = 440

    def examples(self, data: Path) -> Sequence[Example]:
        """Description chats of every split, with the lower-case caption as truth."""
        return [
            Example(
                item.document.id,
                ask(item),
                item.info["picture"]["caption"].lower(),
                {"split": split, "picture": item.info["picture"]["id"]},
            )
            for split in SPLITS
            for item in chats(data, split, kind="describe", limit=self.limit)
        ]

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Word F1 and CIDEr by split, beside the score of shuffled captions."""
        answers = self.answers(predictions)
        metrics: dict[str, dict[str, float]] = {}
        per_example: dict[str, float] = {}
        for split, chosen in by_split(examples):
            texts, truths = [answers[e.id] for e in chosen], [e.truth for e in chosen]

            def f1(order: np.ndarray, texts: list[str] = texts, truths: list[str] = truths) -> float:
                return float(np.mean([word_f1(texts[i], [truth]) for i, truth in zip(order, truths)]))

            def cider(order: np.ndarray, texts: list[str] = texts, truths: list[str] = truths) -> float:
                found = {row: texts[i] for row, i in enumerate(order)}
                return score_captions(found, {row: [t] for row, t in enumerate(truths)}).corpus["CIDEr"]

            straight = np.arange(len(chosen))
            for name, measure, main in (("word_f1", f1, "unseen"), ("cider", cider, "seen")):
                chance = shuffled_score(measure, len(chosen), name, split)
                full_name = named(f"caption/{name}", split, main=main)
                metrics[full_name] = metric(measure(straight), len(chosen), chance=chance)
            per_example |= {e.id: word_f1(answers[e.id], [e.truth]) for e in chosen}
        return Scores(metrics, per_example)


@dataclass(frozen=True, kw_only=True)
class EmojiVqa(WordAnswers):
    """Exact match of short answers; the chance is the most frequent right answer of each family."""

    name: ClassVar[str] = "emoji_vqa"
    primary: ClassVar[str] = "vqa/tone"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=12)

    limit: int = 250

    def examples(self, data: Path) -> Sequence[Example]:
        """Question chats of every family, with the lower-case answer as truth."""
        return [
            Example(
                item.document.id,
                ask(item),
                item.info["answer"].lower(),
                {
                    "split": split,
                    "family": family,
                    "level": item.info.get("level", ""),
                    "picture": item.info["picture"]["id"],
                    "question": next(part.text for part in item.document.parts if isinstance(part, TextPart)),
                },
            )
            for split in ("unseen", "seen")
            for family in FAMILIES
            for item in chats(data, split, kind="question", family=family, limit=self.limit)
        ]

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Exact-match accuracy by family and split, beside the best constant answer."""
        answers = self.answers(predictions)
        per_example = {e.id: float(answers[e.id] == e.truth) for e in examples}
        groups: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            family, split = example.info["family"], example.info["split"]
            main = "seen" if family == "subcategory" else "unseen"
            groups[named(f"vqa/{family}", split, main=main)].append(example)
        metrics = {
            name: metric(
                float(np.mean([per_example[e.id] for e in group])),
                len(group),
                chance=best_constant([e.truth for e in group]),
            )
            for name, group in groups.items()
        }
        levels = {e.id: e.info["level"] for e in examples if e.info["level"]}
        by_level = mean_by({id: per_example[id] for id in levels}, levels)
        return Scores(metrics, per_example, breakdown={"is_a": by_level})


@dataclass(frozen=True, kw_only=True)
class EmojiLabelPages(WordAnswers):
    """In-context learning: k training images, each with one attribute word, then a held-out image.

    Which attribute is asked for can only be read from the page. Meant for the pre-trained model (stage 2). With
    `has_random_labels` every shown image gets a random word of the attribute: a model that still answers well reads
    which words are wanted, not which image has which (Min et al. 2022, arXiv 2202.12837).
    """

    name: ClassVar[str] = "emoji_label_pages"
    primary: ClassVar[str] = "fewshot/label_gain"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=12, stop=(".",))

    prompt: str = "label_page"
    limit: int = 200
    max_shots: int = 4
    has_random_labels: bool = False
    seed: int = 0

    @property
    def shots(self) -> tuple[int, ...]:
        """How many images the pages show. Without any there are no labels to be random."""
        return tuple(k for k in SHOTS if k <= self.max_shots and (k > 0 or not self.has_random_labels))

    def examples(self, data: Path) -> Sequence[Example]:
        """Queries after 0 to k labelled images, with the label of the last image as truth."""
        pools = _pictures_by_word(load(data / "pairs-train"))
        result = []
        for item, attribute in _queries(subset(load(data / "pairs-seen"), self.limit)):
            shots = self._shots(item, pools[attribute], attribute)
            words = [shot.info["labels"][attribute] for shot in shots]
            if self.has_random_labels:
                random = seeds.generator(self.seed, "emoji-random-label", item.document.id)
                words = random.choice(sorted(pools[attribute]), size=len(words)).tolist()
            result += [self._example(item, attribute, shots[:k], words[:k]) for k in self.shots]
        return result

    def _shots(self, query: Item, words: Mapping[str, list[Item]], attribute: str) -> list[Item]:
        """As label pages are made: a word at random, then an image with it; smaller k are the start of larger ones."""
        random = seeds.generator(self.seed, "emoji-label-page", query.document.id)
        shots: dict[str, Item] = {}
        names = sorted(words)
        for _ in range(100 * self.max_shots):
            candidates = words[names[int(random.integers(len(names)))]]
            item = candidates[int(random.integers(len(candidates)))]
            shots.setdefault(item.document.id, item)
            if len(shots) == self.max_shots:
                return list(shots.values())
        raise UserError(
            f"pairs-train has only {len(shots)} pictures with the attribute {attribute}; wanted {self.max_shots}"
        )

    def _example(self, query: Item, attribute: str, shots: Sequence[Item], words: Sequence[str]) -> Example:
        parts: list[Part] = []
        for number, word in enumerate(words):
            parts += [ImagePart(number), TextPart(f"{word}.")]
        id = f"k{len(shots)}/{attribute}/{query.document.id}"
        document = Document(id, self.name, (*parts, ImagePart(len(shots))))
        images = tuple(item.images[0] for item in (*shots, query))
        info = {
            "shots": len(shots),
            "attribute": attribute,
            "picture": query.document.id,
            "shown": [shot.document.id for shot in shots],
            "words": list(words),
        }
        return Example(id, Prompt(document, images, id), query.info["labels"][attribute], info)

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Exact-match accuracy by number of shots, and the gain of two shots over none."""
        answers = self.answers(predictions)
        right = {e.id: float(answers[e.id] == e.truth) for e in examples}
        metrics: dict[str, dict[str, float]] = {}
        kind = "random_label" if self.has_random_labels else "label"
        for k in self.shots:
            chosen = [e for e in examples if e.info["shots"] == k]
            if chosen:
                value = float(np.mean([right[e.id] for e in chosen]))
                metrics[f"fewshot/{kind}_k{k}"] = metric(value, len(chosen), chance=_guess(chosen))
        if {"fewshot/label_k0", "fewshot/label_k2"} <= set(metrics):
            gain = metrics["fewshot/label_k2"]["value"] - metrics["fewshot/label_k0"]["value"]
            n = int(metrics["fewshot/label_k2"]["n"])
            metrics = {"fewshot/label_gain": metric(gain, n, chance=0.0), **metrics}
        return Scores(metrics, {id: value for id, value in right.items() if id.startswith("k2/")})

    def clean(self, text: str) -> str:
        """The first sentence of a continuation, since a page goes on after its label."""
        return super().clean(text.split(".")[0])


def _guess(examples: Sequence[Example]) -> float:
    """Accuracy without looking: the best constant word for k = 0, else one of the shown words at random."""
    if not examples[0].info["shots"]:
        return best_constant([example.truth for example in examples])
    return float(np.mean([np.mean([word == e.truth for word in e.info["words"]]) for e in examples]))


def _pictures_by_word(items: Sequence[Item]) -> dict[str, dict[str, list[Item]]]:
    pools: dict[str, dict[str, list[Item]]] = {attribute: defaultdict(list) for attribute in ATTRIBUTES}
    for item in items:
        labels: Mapping[str, Any] = item.info["labels"]
        for attribute in set(labels) & set(ATTRIBUTES):
            pools[attribute][labels[attribute]].append(item)
    return pools


def _queries(items: Sequence[Item]) -> list[tuple[Item, str]]:
    """Each image with one attribute that it has, all attributes about equally often."""
    counts = dict.fromkeys(ATTRIBUTES, 0)
    result = []
    for item in sorted(items, key=lambda item: seeds.address("emoji-query", item.document.id)):
        attribute = min((a for a in ATTRIBUTES if a in item.info["labels"]), key=lambda a: counts[a])
        counts[attribute] += 1
        result.append((item, attribute))
    return result
