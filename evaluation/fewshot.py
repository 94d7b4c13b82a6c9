"""Demonstrations before the question: k training examples with their answers, chosen at random or by likeness.

Random choice is addressed by (seed, example id): it depends on neither order, batch nor number of
processes, and the first two of k = 4 are those of k = 2. RICES takes the training images nearest to the
question's image (cosine of CLIP features), the nearest one last, next to the question. The paper does not
say which of the two it used.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image

from evaluation import prompts
from evaluation.core import Benchmark, DataNotFound, Example, JsonObject, Prompt, Record, read_image
from vlgpt import seeds
from vlgpt.document import join
from vlgpt.errors import UserError

Selection = Literal["random", "rices"]
ImageFeatures = Callable[[Iterable[Image.Image]], np.ndarray]
"""Images -> (num_images, dim) features."""
DAGGER_SHOTS = 2
"""The rows marked with a dagger in the paper: two demonstrations whose images are left out."""
MAX_SHUFFLED = 4096
NUM_SPARE = 1024


@dataclass(frozen=True)
class FewShot:
    """What demonstrations a run has. `is_text_only` leaves their images out."""

    shots: int = 0
    seed: int = 0
    selection: Selection = "random"
    is_text_only: bool = False

    @staticmethod
    def dagger(*, seed: int = 0) -> FewShot:
        """The demonstrations of the paper's dagger rows."""
        return FewShot(DAGGER_SHOTS, seed=seed, is_text_only=True)


def label_of(shots: Record) -> str:
    """A short name of a manifest's `shots`: "0", "dagger", "4", "4-rices"."""
    if not shots.get("k"):
        return "0"
    if shots["is_text_only"]:
        return "dagger"
    return str(shots["k"]) if shots["selection"] == "random" else f"{shots['k']}-{shots['selection']}"


class Demonstrator:
    """Builds few-shot prompts of one benchmark.

    Args: pool: training examples. features: for RICES, image features.
    Raises DataNotFound when the pool is too small, UserError when RICES has no features.
    """

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
                    "RICES needs image features: give --clip a CLIP folder, or --selection random"
                )
            self._pool_features = self._features_of(pool)

    def prompt(self, example: Example) -> tuple[Prompt, list[str]]:
        """An example's prompt with its demonstrations in front, and their ids."""
        shots, has_images = self.choose(example), not self.few_shot.is_text_only
        document = example.prompt.document
        pieces = [self.benchmark.demonstration(shot, has_image=has_images) for shot in shots]
        joined = join(document.id, document.source, [*pieces, document.parts], document.info)
        joined = dataclasses.replace(joined, parts=prompts.merge_text(joined.parts))
        images = [image for shot in shots for image in shot.prompt.images] if has_images else []
        prompt = Prompt(joined, (*images, *example.prompt.images), example.prompt.id)
        return prompt, [shot.id for shot in shots]

    def choose(self, example: Example) -> list[Example]:
        """The demonstrations of an example, never one with its own image or id."""
        if not self.few_shot.shots:
            return []
        order = self._nearest(example) if self.few_shot.selection == "rices" else self._random(example)
        others = (self.pool[at] for at in order if not _is_same(self.pool[at], example))
        chosen = list(islice(others, self.few_shot.shots))
        if len(chosen) < self.few_shot.shots:
            raise UserError(
                f"{example.id}: fewer than {self.few_shot.shots} training examples with another image"
            )
        return chosen[::-1] if self.few_shot.selection == "rices" else chosen

    def _random(self, example: Example) -> list[int]:
        """Different pool positions in random order."""
        random = seeds.generator(self.few_shot.seed, "few-shot", self.benchmark.name, example.id)
        if len(self.pool) <= MAX_SHUFFLED:
            return [int(at) for at in random.permutation(len(self.pool))]
        # VQAv2 has 443,757 training questions: shuffling them for every example would be wasted work. More than
        # needed are drawn, since some may show the example's own image.
        drawn: dict[int, None] = {}
        while len(drawn) < min(len(self.pool), self.few_shot.shots + NUM_SPARE):
            drawn[int(random.integers(len(self.pool)))] = None
        return list(drawn)

    def _nearest(self, example: Example) -> list[int]:
        similarity = self._pool_features @ self._features_of([example])[0]
        return [int(at) for at in np.argsort(-similarity, kind="stable")]

    def _features_of(self, examples: Sequence[Example]) -> np.ndarray:
        """Unit features of each example's image: -> (num_examples, dim)."""
        assert self.features is not None
        images = (read_image(example.prompt.images[0]) for example in examples)
        features = np.asarray(self.features(images), np.float64)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def manifest(self) -> JsonObject:
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
