"""Images of a web page and the sentences that they belong to (MMC4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.sources.assignment import best_assignment
from data_prep.sources.base import BadRecord, Columns, number
from vlgpt.document import ImagePart, Part, TextPart
from vlgpt.shards.samples import visible

Matching = Literal["recomputed", "stored"]


@dataclass(frozen=True, slots=True)
class Match:
    """An image and its sentence."""

    sentence: int
    image: int
    similarity: float


def match_images(value: Columns, images: Sequence[int], *, matching: Matching) -> list[Match]:
    """A sentence for each of these images, sorted by sentence; the largest sum of similarities wins.

    `stored` takes the published `matched_text_index`, and so do pages without a matrix. Raises
    BadRecord(`bad_matrix`) or BadRecord(`bad_match`).
    """
    if matching == "recomputed" and value.get("similarity_matrix") is not None:
        scores = _matrix(value)[list(images)]
        pairs = best_assignment(scores)
        matches = [Match(sentence, images[row], float(scores[row, sentence])) for row, sentence in pairs]
    else:
        matches = [_stored(value, image) for image in images]
    return sorted(matches, key=lambda match: (match.sentence, match.image))


def _stored(value: Columns, image: int) -> Match:
    entry = value["image_info"][image]
    sentence, similarity = entry.get("matched_text_index"), number(entry, "matched_sim")
    if type(sentence) is not int or not 0 <= sentence < len(value["text_list"]) or similarity is None:
        raise BadRecord("bad_match")
    return Match(sentence, image, similarity)


def page_parts(sentences: Sequence[str], matches: Sequence[Match]) -> tuple[Part, ...]:
    """The sentences as parts, each image before its own. `matches` are sorted by sentence."""
    parts: list[Part] = []
    pending = list(matches)
    num_images = 0
    for place, sentence in enumerate(sentences):
        while pending and pending[0].sentence == place:
            parts.append(ImagePart(num_images))
            num_images += 1
            pending.pop(0)
        if shown := visible(sentence):
            parts.append(TextPart(shown))
    return tuple(parts)


def _matrix(value: Columns) -> np.ndarray:
    """(images, sentences). Raises BadRecord(`bad_matrix`)."""
    try:
        scores = np.array(value["similarity_matrix"], np.float64)
    except (TypeError, ValueError) as error:
        raise BadRecord("bad_matrix") from error
    if scores.shape != (len(value["image_info"]), len(value["text_list"])) or not np.isfinite(scores).all():
        raise BadRecord("bad_matrix")
    return scores
