"""What the emoji benchmarks share: they read the held-out shards of data_prep's emoji source, nothing else.

    DATA/instructions-{unseen,seen,combination,target}    chats that are true by construction
    DATA/pairs-{train,seen}                               images with their attributes

A prompt is the chat itself without its reply, so prompts cannot drift from what was trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.core import Benchmark, DataNotFound, Example
from evaluation.prompts import PromptTemplate
from vlgpt import seeds
from vlgpt.decoding.api import Prompt
from vlgpt.document import Document
from vlgpt.shards import ShardSet

SPLITS = ("unseen", "seen", "combination")
"""The concept was never trained; its caption was trained in the other drawing style; its skin tone was
not."""
NUM_SHUFFLES = 5


@dataclass(frozen=True)
class Item:
    """One record of a shard folder; its images are read when they are needed."""

    document: Document
    folder: Path
    shard: int
    sample: int

    @property
    def info(self) -> Mapping[str, Any]:
        return self.document.info

    @property
    def images(self) -> tuple[bytes, ...]:
        """The encoded images, in document order."""
        return _open(self.folder).read(self.shard, self.sample).images


@lru_cache(maxsize=32)
def _open(folder: Path) -> ShardSet:
    return ShardSet.open(folder)


@lru_cache(maxsize=32)
def load(folder: Path) -> tuple[Item, ...]:
    """All records of a folder, in shard order. Raises DataNotFound that says how to build it."""
    if not folder.is_dir():
        kind, _, split = folder.name.partition("-")
        command = f"python -m data_prep.build demo.source:EmojiSource --kind {kind} --split {split} --output {folder}"
        raise DataNotFound(f"data set {folder} does not exist; build it: {command}")
    shards = _open(folder)
    return tuple(
        Item(shards.read(shard, sample, with_images=False).document, folder, shard, sample)
        for shard in range(len(shards.shards))
        for sample in range(shards.index(shard).num_samples)
    )


def chats(data: Path, split: str, *, kind: str, family: str = "", limit: int = 0) -> list[Item]:
    """Held-out chats of one kind (question, describe, draw, edit) and family; `limit` 0 takes all."""
    items = load(data / f"instructions-{split}")
    chosen = [
        item for item in items if item.info["kind"] == kind and (not family or item.info["family"] == family)
    ]
    return subset(chosen, limit)


def subset(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items, chosen by their ids and kept in order; 0 takes all."""
    if not limit or len(items) <= limit:
        return list(items)
    ids = sorted((seeds.address("emoji-subset", item.document.id), item.document.id) for item in items)
    chosen = {id for _, id in ids[:limit]}
    return [item for item in items if item.document.id in chosen]


def ask(item: Item, *, id: str = "") -> Prompt:
    """The chat without its reply, and the images that the user shows."""
    id = id or item.document.id
    parts = tuple(part for part in item.document.parts if part.role != "assistant")
    document = Document(id, item.document.source, parts, {})
    return Prompt(document, item.images[: document.num_images], id)


@dataclass(frozen=True, kw_only=True)
class EmojiBenchmark(Benchmark):
    """Options of all emoji benchmarks. `judge`: folder of a CLIP that nothing else uses (images only)."""

    split: str = "held-out"
    prompt: str = "chat"
    limit: int = 300
    """Examples of each kind and split at most; 0 takes all."""
    judge: str = ""

    @property
    def template(self) -> PromptTemplate:
        """Stands for the chats of the shards, whose content is hashed in the manifest's `questions`."""
        text = {"prompt": "the held-out chat without its reply"}
        return PromptTemplate(kind="emoji", name=self.prompt, text=text, source="data_prep emoji")


def named(name: str, split: str, *, main: str) -> str:
    """The metric of the main split has the plain name, others end with their split."""
    return name if split == main else f"{name}_{split}"


def by_split(examples: Sequence[Example]) -> Iterator[tuple[str, list[Example]]]:
    """Examples of each split that has any, by `info["split"]`."""
    for split in SPLITS:
        if chosen := [example for example in examples if example.info["split"] == split]:
            yield split, chosen


def best_constant(truths: Sequence[str]) -> float:
    """Accuracy of the most frequent answer."""
    return Counter(truths).most_common(1)[0][1] / len(truths)


def shuffled_score(score: Callable[[np.ndarray], float], num: int, *names: str) -> float:
    """Mean score over permutations without fixed points: what right answers to wrong questions are worth."""
    if num < 2:
        return 0.0
    values = []
    for attempt in range(NUM_SHUFFLES):
        order = seeds.generator("emoji-shuffled", *names, attempt).permutation(num)
        other = np.empty(num, np.int64)
        other[order] = np.roll(order, 1)
        values.append(score(other))
    return float(np.mean(values))
