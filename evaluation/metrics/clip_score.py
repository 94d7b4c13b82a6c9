"""Cosines of CLIP embeddings: of the right pairs, and of all wrong ones, which is what chance scores.

Papers print them in three conventions: 100 x the mean (VL-GPT, Table 1; GILL and SEED without the 100), the same
cut at 0 (torchmetrics 1.9 `CLIPScore`), and 2.5 x the mean of max(cosine, 0) (Hessel et al. 2021).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pair_cosines(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Cosine of every pair: (pairs, width) x 2 -> (pairs,).

    Raises ValueError for shapes that differ, no pairs, or an embedding that is zero or not finite.
    """
    a, b = _unit_pairs(first, second)
    return (a * b).sum(axis=1)


def mean_wrong_cosine(first: ArrayLike, second: ArrayLike) -> float | None:
    """Mean cosine over all wrong pairs (i, j), i != j: (pairs, width) x 2 -> number; None for one pair."""
    a, b = _unit_pairs(first, second)
    num_pairs = len(a)
    if num_pairs < 2:
        return None
    # The sum over all pairs is one product of two sums, so no (pairs, pairs) matrix is formed.
    return float((a.sum(0) @ b.sum(0) - np.sum(a * b)) / (num_pairs * (num_pairs - 1)))


def _unit_pairs(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"embeddings have shapes {a.shape} and {b.shape}; wanted the same (pairs, width), pairs > 0"
        )
    return _unit(a, "first"), _unit(b, "second")


def _unit(rows: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    is_bad = ~np.isfinite(length[:, 0]) | (length[:, 0] == 0)
    if is_bad.any():
        raise ValueError(f"row {int(np.argmax(is_bad))} of the {name} embeddings is zero or not finite")
    return rows / length
