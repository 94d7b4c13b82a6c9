"""CLIP score and CLIP similarity from embeddings, in the conventions that papers use.

torchmetrics  100 * cosine per pair; the mean is clipped at 0 (torchmetrics 1.9 CLIPScore)
hessel        2.5 * max(cosine, 0), averaged (Hessel et al. 2021)
similarity    100 * mean cosine, not clipped (GILL and SEED print it without the 100; VL-GPT Table 1 with it)
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Convention = Literal["torchmetrics", "hessel", "similarity"]


def clip_score(first: ArrayLike, second: ArrayLike, *, convention: Convention) -> float:
    """Score of pairs of embeddings (image and text, or two images): (pairs, width) x 2 -> number.

    Raises ValueError for shapes that differ, no pairs, a zero or non-finite embedding, an unknown convention.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention is {convention!r}; wanted one of {', '.join(get_args(Convention))}")
    cosine = pair_cosines(first, second)
    if convention == "hessel":
        return float(2.5 * np.maximum(cosine, 0.0).mean())
    mean = float(100.0 * cosine.mean())
    return max(mean, 0.0) if convention == "torchmetrics" else mean


def pair_cosines(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Cosine of every pair: (pairs, width) x 2 -> (pairs,)."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) == 0:
        raise ValueError(
            f"embeddings have shapes {a.shape} and {b.shape}; wanted the same (pairs, width), pairs > 0"
        )
    return (_unit(a, "first") * _unit(b, "second")).sum(axis=1)


def _unit(rows: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    is_bad = ~np.isfinite(length[:, 0]) | (length[:, 0] == 0)
    if is_bad.any():
        raise ValueError(f"row {int(np.argmax(is_bad))} of the {name} embeddings is zero or not finite")
    return rows / length
