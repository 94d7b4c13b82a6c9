"""Bag-of-words F1 of short captions: the multiset overlap of lower-cased words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case, apostrophes inside a word kept."""
    return _WORD.findall(text.lower())


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """Best F1 over the references, a fraction; two texts without words agree (1).

    Raises ValueError without a reference, TypeError where the references are one string.
    """
    if isinstance(references, str):
        raise TypeError(f"references are the string {references!r}; wanted a list of strings")
    if not references:
        raise ValueError(f"prediction {prediction!r} has no reference")
    ours = Counter(words_of(prediction))
    return max(_f1(ours, Counter(words_of(reference))) for reference in references)


def _f1(ours: Counter[str], theirs: Counter[str]) -> float:
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0
