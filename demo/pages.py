"""Interleaved documents of emoji: pages of a picture dictionary, and label pages that only make sense as a
whole.

A dictionary page shows 3 to 8 images of one sub-category in Unicode order, each beside its name. On a label
page every image is followed by one attribute word (category, tone, gender, style or sub-category): which
attribute it is can only be read from the page, so it teaches learning from context.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from demo.catalogue import Emoji
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.seeds import generator

ATTRIBUTES = ("category", "tone", "gender", "style", "subcategory")
MIN_PICTURES, MAX_PICTURES = 3, 8


@dataclass(frozen=True)
class Page:
    """Images in reading order; `attribute` is `name` on dictionary pages."""

    id: str
    attribute: str
    pictures: tuple[Emoji, ...]
    is_text_first: bool = False

    def document(self) -> Document:
        """`[IMG] monkey face. [IMG] monkey.` or, text first, `monkey face: [IMG] monkey: [IMG]`."""
        parts: list[Part] = []
        for number, picture in enumerate(self.pictures):
            word = picture.caption if self.attribute == "name" else picture.labels[self.attribute]
            image = ImagePart(number)
            parts += [TextPart(f"{word}:"), image] if self.is_text_first else [image, TextPart(f"{word}.")]
        info = {"page": self.attribute, "pictures": [picture.info() for picture in self.pictures]}
        return Document(self.id, "emoji", tuple(parts), info)


def plan_pages(pictures: Sequence[Emoji], *, passes: int, seed: int) -> list[Page]:
    """Dictionary pages over all images, then as many label pages, mixed in a fixed random order.

    The first pass takes every image; each further one takes one random tone of every concept, so that a
    page shows more concepts.
    """
    pages = [page for number in range(passes) for page in _dictionary_pages(pictures, number, seed=seed)]
    pages += _label_pages(pictures, count=len(pages), seed=seed)
    order = generator(seed, "emoji", "page order").permutation(len(pages))
    return [pages[position] for position in order]


def _dictionary_pages(pictures: Sequence[Emoji], number: int, *, seed: int) -> Iterator[Page]:
    chapters: dict[tuple[str, str], list[Emoji]] = defaultdict(list)
    for picture in pictures:
        chapters[picture.subcategory, picture.style].append(picture)
    for (subcategory, style), chapter in sorted(chapters.items()):
        draw = generator(seed, "emoji", "dictionary", number, subcategory, style)
        chosen = chapter if number == 0 else _one_tone_each(chapter, draw)
        start = 0
        while len(chosen) - start >= MIN_PICTURES:
            length = int(draw.integers(MIN_PICTURES, MAX_PICTURES + 1))
            name = f"dictionary/{style}/{subcategory}/{number}/{start}"
            yield Page(name, "name", tuple(chosen[start : start + length]), bool(draw.integers(2)))
            start += length


def _one_tone_each(chapter: Sequence[Emoji], draw: np.random.Generator) -> list[Emoji]:
    concepts: dict[str, list[Emoji]] = defaultdict(list)
    for picture in chapter:
        concepts[picture.base].append(picture)
    return [tones[int(draw.integers(len(tones)))] for tones in concepts.values()]


def _label_pages(pictures: Sequence[Emoji], *, count: int, seed: int) -> Iterator[Page]:
    by_word: dict[str, dict[str, list[Emoji]]] = {attribute: defaultdict(list) for attribute in ATTRIBUTES}
    for picture in pictures:
        for attribute, word in picture.labels.items():
            by_word[attribute][word].append(picture)
    usable = [attribute for attribute in ATTRIBUTES if len(by_word[attribute]) > 1]
    for number in range(count if usable else 0):
        draw = generator(seed, "emoji", "label page", number)
        attribute = usable[number % len(usable)]
        words = sorted(by_word[attribute])
        chosen = []
        for _ in range(int(draw.integers(MIN_PICTURES, MAX_PICTURES + 1))):
            candidates = by_word[attribute][words[int(draw.integers(len(words)))]]
            chosen.append(candidates[int(draw.integers(len(candidates)))])
        yield Page(f"labels/{attribute}/{number}", attribute, tuple(chosen))
