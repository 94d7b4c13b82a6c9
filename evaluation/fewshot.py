"""Demonstrations before the question: k training examples with their answers, chosen at random or by
likeness.

Random choice is addressed by (seed, example id): it depends on neither order, batch nor number of
processes, and the first two of k = 4 are those of k = 2. RICES takes the training pictures nearest to the
question's picture (cosine of CLIP features), the nearest one last, next to the question. The paper does not
say which of the two it used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from evaluation.core import Benchmark, DataNotFound, Example, Prompt, read_image, with_demonstrations
from vlgpt import seeds
from vlgpt.errors import UserError

ImageFeatures = Callable[[Sequence[Image.Image]], np.ndarray]
"""Pictures -> (num_pictures, dim) features."""
DAGGER_SHOTS = 2
"""The rows marked with a dagger in the paper: two demonstrations whose pictures are left out."""


@dataclass(frozen=True)
class FewShot:
    """What demonstrations a run has. `is_text_only` leaves their pictures out."""

    shots: int = 0
    seed: int = 0
    selection: Literal["random", "rices"] = "random"
    is_text_only: bool = False

    @staticmethod
    def dagger(*, seed: int = 0) -> FewShot:
        return FewShot(DAGGER_SHOTS, seed=seed, is_text_only=True)


def label_of(shots: Mapping[str, Any]) -> str:
    """A short name of a manifest's `shots`: "0", "dagger", "4", "4-rices"."""
    if not shots.get("k"):
        return "0"
    if shots["is_text_only"]:
        return "dagger"
    return str(shots["k"]) if shots["selection"] == "random" else f"{shots['k']}-{shots['selection']}"


class Demonstrator:
    """Builds few-shot prompts of one benchmark.

    Args: pool: training examples. features: for RICES, picture features (batches of `BATCH_SIZE`).
    Raises UserError when the pool is too small or RICES has no features.
    """

    BATCH_SIZE = 64

    def __init__(
        self,
        benchmark: Benchmark,
        pool: Sequence[Example],
        few_shot: FewShot,
        *,
        features: ImageFeatures | None = None,
    ):
        if few_shot.shots > len(pool):
            raise DataNotFound(
                f"{few_shot.shots} shots wanted, but {benchmark.name} has {len(pool)} training examples"
            )
        self.benchmark, self.pool, self.few_shot, self.features = benchmark, pool, few_shot, features
        if few_shot.shots and few_shot.selection == "rices":
            if features is None:
                raise UserError(
                    "RICES needs picture features: give --clip a CLIP folder, or --selection random"
                )
            self._pool_features = self._features_of(pool)

    def prompt(self, example: Example) -> tuple[Prompt, list[str]]:
        """An example's prompt with its demonstrations in front, and their ids."""
        chosen = self.choose(example)
        has_image = not self.few_shot.is_text_only
        pieces = [
            (self.benchmark.demonstration(shot, has_image=has_image), shot.prompt.images if has_image else ())
            for shot in chosen
        ]
        return with_demonstrations(example.prompt, pieces), [shot.id for shot in chosen]

    def choose(self, example: Example) -> list[Example]:
        """The demonstrations of an example, never one with its own picture or id."""
        if not self.few_shot.shots:
            return []
        order = self._nearest(example) if self.few_shot.selection == "rices" else self._random(example)
        chosen: list[Example] = []
        for at in order:
            if len(chosen) < self.few_shot.shots and not _is_same(self.pool[at], example):
                chosen.append(self.pool[at])
            if len(chosen) == self.few_shot.shots:
                break
        else:
            raise UserError(
                f"{example.id}: fewer than {self.few_shot.shots} training examples with another picture"
            )
        return chosen[::-1] if self.few_shot.selection == "rices" else chosen

    def _random(self, example: Example) -> list[int]:
        """Different pool positions in random order; a few more than needed, since some may show the same
        picture."""
        random = seeds.generator(self.few_shot.seed, "few-shot", self.benchmark.name, example.id)
        if len(self.pool) <= 4096:
            return [int(at) for at in random.permutation(len(self.pool))]
        drawn: dict[int, None] = {}
        while len(drawn) < min(len(self.pool), self.few_shot.shots + 1024):
            drawn[int(random.integers(len(self.pool)))] = None
        return list(drawn)

    def _nearest(self, example: Example) -> list[int]:
        similarity = self._pool_features @ self._features_of([example])[0]
        return [int(at) for at in np.argsort(-similarity, kind="stable")]

    def _features_of(self, examples: Sequence[Example]) -> np.ndarray:
        """Unit features of each example's picture `-> (num_examples, dim)`."""
        assert self.features is not None
        rows = []
        for start in range(0, len(examples), self.BATCH_SIZE):
            batch = examples[start : start + self.BATCH_SIZE]
            rows.append(
                np.asarray(self.features([read_image(item.prompt.images[0]) for item in batch]), np.float64)
            )
        features = np.concatenate(rows)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def manifest(self) -> dict[str, Any]:
        """For the manifest: how demonstrations were chosen, and from what."""
        few_shot = self.few_shot
        if not few_shot.shots:
            return {"k": 0}
        pool_ids = hashlib.blake2b("\n".join(item.id for item in self.pool).encode(), digest_size=8)
        return {
            "k": few_shot.shots,
            "seed": few_shot.seed,
            "selection": few_shot.selection,
            "is_text_only": few_shot.is_text_only,
            "pool": {"n": len(self.pool), "hash": pool_ids.hexdigest()},
        }


def _is_same(shot: Example, example: Example) -> bool:
    image = shot.info.get("image_id")
    return shot.id == example.id or (image is not None and image == example.info.get("image_id"))
