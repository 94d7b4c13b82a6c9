"""Judges of drawn images: a CLIP that nothing else uses, and probes for attributes such as skin tone.

A probe is a ridge classifier on simple features of an image. It is trained on the images of the training
split only, as they are and blurred (drawn images are soft); how often it is right on real held-out images
is reported beside every score that it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from evaluation.benchmarks.images import load_clip
from vlgpt.batch import to_pixels
from vlgpt.images import read_square

Pictures = NDArray[np.uint8]  # (n, S, S, 3)
Floats = NDArray[np.float32]

BATCH_SIZE = 128
HISTOGRAM_BINS = 6
THUMBNAIL_PX = 16
BLUR_FACTOR = 3


class Judge:
    """A frozen CLIP: images -> unit embeddings. `size_px` is the size at which images are compared."""

    def __init__(self, folder: Path):
        clip = load_clip(str(folder), option="judge")
        self._encoder = clip.encoder
        self.identity = clip.identity
        self.size_px = self._encoder.image_size_px

    @torch.no_grad()
    def embed(self, pictures: Pictures) -> Floats:
        """(n, S, S, 3) uint8 -> (n, E) float32, unit length."""
        rows = [
            F.normalize(self._encoder.embed_images(to_pixels(np.ascontiguousarray(batch))).float(), dim=-1)
            for batch in np.split(pictures, range(BATCH_SIZE, len(pictures), BATCH_SIZE))
        ]
        return torch.cat(rows).numpy()

    def squares(self, images: Sequence[bytes]) -> Pictures:
        """Encoded images at the judge's size: -> (n, S, S, 3) uint8."""
        return np.stack([read_square(data, size_px=self.size_px, decoder="pillow") for data in images])


@lru_cache(maxsize=4)
def load_judge(folder: str) -> Judge:
    """The judge of `--option judge=FOLDER`, loaded once. Raises UserError when the option is missing."""
    return Judge(Path(folder)) if folder else load_clip(folder, option="judge")  # type: ignore[return-value]


def blur(pictures: Pictures) -> Pictures:
    """As soft as a drawn image: (n, S, S, 3) -> (n, S, S, 3)."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, scale_factor=1 / BLUR_FACTOR, mode="area")
    soft = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return soft.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def histogram(pictures: Pictures) -> Floats:
    """Square roots of the shares of 6 x 6 x 6 colours: (n, S, S, 3) -> (n, 216)."""
    bins = pictures.astype(np.int64) * HISTOGRAM_BINS // 256
    number = (bins[..., 0] * HISTOGRAM_BINS + bins[..., 1]) * HISTOGRAM_BINS + bins[..., 2]
    n, num_bins = len(pictures), HISTOGRAM_BINS**3
    number = number.reshape(n, -1)
    flat = (number + np.arange(n)[:, None] * num_bins).ravel()
    counts = np.bincount(flat, minlength=n * num_bins).reshape(n, num_bins)
    return np.sqrt(counts / number.shape[1]).astype(np.float32)


def thumbnail(pictures: Pictures) -> Floats:
    """Coarse layout in [-1, 1]: (n, S, S, 3) -> (n, 16 * 16 * 3)."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, size=(THUMBNAIL_PX, THUMBNAIL_PX), mode="area").flatten(1).numpy()


@dataclass(frozen=True)
class RidgeClassifier:
    """One-against-all ridge regression with classes weighted alike."""

    classes: tuple[str, ...]
    mean: Floats
    scale: Floats
    weights: NDArray[np.float64]

    @classmethod
    def fit(cls, features: Floats, labels: Sequence[str], *, ridge: float = 0.1) -> RidgeClassifier:
        """(n, D) features and n labels. Raises ValueError with fewer than two classes."""
        classes = tuple(sorted(set(labels)))
        if len(classes) < 2:
            raise ValueError(f"a probe needs at least two classes, found {classes}")
        truth = np.array([classes.index(label) for label in labels])
        weight = 1 / np.bincount(truth)[truth]
        weight *= len(truth) / weight.sum()
        mean, scale = features.mean(0), features.std(0) + 0.1
        inputs = _with_constant((features - mean) / scale)
        targets = 2.0 * np.eye(len(classes))[truth] - 1
        weighted = inputs * weight[:, None]
        gram = weighted.T @ inputs + ridge * len(truth) * np.eye(inputs.shape[1])
        return cls(classes, mean, scale, np.linalg.solve(gram, weighted.T @ targets))

    def predict(self, features: Floats) -> list[str]:
        """(n, D) -> n labels."""
        scores = _with_constant((features - self.mean) / self.scale) @ self.weights
        return [self.classes[i] for i in scores.argmax(1)]


def _with_constant(inputs: Floats) -> NDArray[np.float64]:
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1, dtype=np.float64)


class Probe:
    """Tells one attribute of an image.

    Skin tone is judged by colour alone; everything else by colour, layout and the judge's embedding.
    """

    def __init__(self, attribute: str, judge: Judge):
        self.attribute, self.judge = attribute, judge
        self._classifier: RidgeClassifier | None = None

    def fit(self, pictures: Pictures, labels: Sequence[str]) -> Probe:
        """Train on real images, sharp and blurred; returns itself."""
        features = np.concatenate([self._features(pictures), self._features(blur(pictures))])
        self._classifier = RidgeClassifier.fit(features, [*labels, *labels])
        return self

    def predict(self, pictures: Pictures) -> list[str]:
        """(n, S, S, 3) -> n labels. Raises RuntimeError before `fit`."""
        if self._classifier is None:
            raise RuntimeError(f"the probe for {self.attribute} is not trained")
        return self._classifier.predict(self._features(pictures))

    def accuracy(self, pictures: Pictures, labels: Sequence[str]) -> float:
        """Share of right labels."""
        return float(np.mean([found == label for found, label in zip(self.predict(pictures), labels)]))

    def _features(self, pictures: Pictures) -> Floats:
        if self.attribute == "tone":
            return histogram(pictures)
        # Weights bring the three to like spread; on real held-out images they beat each one alone.
        return np.concatenate(
            [3 * histogram(pictures), thumbnail(pictures), 5 * self.judge.embed(pictures)], axis=1
        )


def has_label(info: Mapping[str, object], attribute: str) -> bool:
    """Whether the attribute applies to an image and names one thing (a group may have several tones)."""
    return info[attribute] not in ("", "several")
