"""What the benchmarks of drawn pictures share: reading what was drawn, CLIP similarity, its chance level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from evaluation.core import Example, Prediction, read_image
from evaluation.metrics.clip_score import pair_cosines
from vlgpt.errors import UserError

if TYPE_CHECKING:
    from evaluation.features import ClipFeatures

GREY = (128, 128, 128)


def drawn_picture(prediction: Prediction) -> Image.Image:
    """The drawn picture; where the model gave none, a grey one (never left out: that would flatter the
    model)."""
    if "image" not in prediction:
        raise UserError(f"prediction {prediction['id']!r} has no picture (a path under `image`, or null)")
    return (
        read_image(Path(prediction["image"])) if prediction["image"] else Image.new("RGB", (256, 256), GREY)
    )


def count_without(examples: Sequence[Example], predictions: Mapping[str, Prediction]) -> int:
    """How many predictions have no picture."""
    return sum(not predictions[example.id].get("image") for example in examples)


def load_clip(path: str, *, option: str = "clip") -> ClipFeatures:
    """The CLIP of `--option clip=FOLDER`. Raises UserError when the option is missing."""
    if not path:
        raise UserError(f"CLIP similarity needs a CLIP folder: give --option {option}=FOLDER")
    from evaluation.features import ClipFeatures

    return ClipFeatures(Path(path), device=scoring_device())


def scoring_device() -> str:
    """Where pictures are scored: the first visible GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def percent_cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """100 x cosine of each pair: (n, dim) x 2 -> (n,)."""
    return 100 * pair_cosines(first, second)


def chance_cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean of 100 x cosine over all wrong pairs, what shuffled pictures score; None for one pair."""
    a = first / np.linalg.norm(first, axis=1, keepdims=True)
    b = second / np.linalg.norm(second, axis=1, keepdims=True)
    n = len(a)
    if n < 2:
        return None
    return float(100 * (a.sum(0) @ b.sum(0) - np.sum(a * b)) / (n * (n - 1)))
