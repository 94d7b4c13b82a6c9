"""What benchmarks of generated images share: reading what was drawn, and CLIP as a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.core import Example, Prediction, Predictions, read_image
from evaluation.features import ClipFeatures
from evaluation.metrics.clip_score import mean_wrong_cosine
from vlgpt.errors import UserError

GREY = (128, 128, 128)


def drawn_image(prediction: Prediction) -> Image.Image:
    """The drawn image, a grey one where the model gave none: leaving it out would flatter the model."""
    if "image" not in prediction:
        raise UserError(f"prediction {prediction['id']!r} has no image (a path under `image`, or null)")
    path = prediction["image"]
    return read_image(Path(path)) if path else Image.new("RGB", (256, 256), GREY)


def count_without(examples: Sequence[Example], predictions: Predictions) -> int:
    """How many predictions have no image."""
    return sum(not predictions[example.id].get("image") for example in examples)


def load_clip(path: str, *, option: str = "clip") -> ClipFeatures:
    """The CLIP of `--option clip=FOLDER`. Raises UserError when the option is missing."""
    if not path:
        raise UserError(f"CLIP similarity needs a CLIP folder: give --option {option}=FOLDER")
    return ClipFeatures(Path(path), device=scoring_device())


def scoring_device() -> str:
    """Where images are scored: the first visible GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def percent_chance(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean of 100 x cosine over all wrong pairs, what shuffled images score; None for one pair."""
    chance = mean_wrong_cosine(first, second)
    return None if chance is None else 100 * chance
