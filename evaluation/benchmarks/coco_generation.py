"""COCO text to image: FID of 30,000 images drawn from captions of val2014 (paper, Table 2), KID and CLIP score.

There is no official script. Ours draws `num_samples` images of val2014 without repetition and one caption
of each, both addressed by `sample_seed`, and writes the list as prompts.jsonl. Every choice that moves the
number (reference set, crop, resize before Inception, weights) is in the result's notes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
from PIL import Image

from evaluation.benchmarks.coco import load_coco
from evaluation.benchmarks.images import (
    count_without,
    drawn_image,
    load_clip,
    percent_chance,
    scoring_device,
)
from evaluation.core import (
    Benchmark,
    Example,
    ImageLike,
    JsonObject,
    Metric,
    Predictions,
    Scores,
    metric,
    read_image,
)
from evaluation.features import crop_and_resize
from evaluation.metrics.clip_score import pair_cosines
from evaluation.metrics.fid import frechet_distance, frechet_distance_of_features, kernel_distance, moments
from evaluation.metrics.resize import ResizeMode
from vlgpt import seeds
from vlgpt.errors import UserError

KID_SUBSET = 1000
KID_SEED = 2020


class Extractor(Protocol):
    """Images -> (n, dim) features; `identity` goes into the notes."""

    identity: dict[str, str]

    def images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Features of images, in their order: -> (N, D)."""


@dataclass(frozen=True, kw_only=True)
class CocoGeneration(Benchmark):
    """`inception` (weights file) and/or `fd_clip` (CLIP folder used as extractor, reported as FD_clip: for
    small models without Inception) give the distances, `clip` the CLIP score. `reference`: all images of
    the split | matched (those that the captions belong to); `reference_stats`: an .npz with mu and sigma
    instead of images."""

    name: ClassVar[str] = "coco_generation"
    kind: ClassVar = "image"
    primary: ClassVar[str] = "FID"
    higher_is_better: ClassVar[bool] = False

    split: str = "val2014"
    prompt: str = "generation"
    num_samples: int = 30_000
    sample_seed: int = 42
    size_px: int = 256
    reference: Literal["all", "matched"] = "all"
    reference_stats: str = ""
    inception: str = ""
    resize: ResizeMode = "pytorch_fid"
    fd_clip: str = ""
    clip: str = ""

    def examples(self, data: Path) -> Sequence[Example]:
        """`num_samples` random images, each with one random caption; the sample depends on `sample_seed` alone."""
        images = load_coco(data, split=self.split)
        random = seeds.generator(self.sample_seed, self.name)
        found = []
        for number, at in enumerate(random.permutation(len(images))[: self.num_samples]):
            image = images[at]
            caption_id, caption = image.captions[int(random.integers(len(image.captions)))]
            id = f"{number:05d}"
            info = {"image_id": image.image_id, "caption_id": caption_id, "caption": caption}
            found.append(Example(id, self.make_prompt(id, caption=caption), image.path, info))
        return found

    def ideal(self, example: Example) -> ImageLike:
        """The real image, as a path."""
        return example.truth

    def extra_files(self, examples: Sequence[Example]) -> dict[str, str]:
        """prompts.jsonl: which caption each image is drawn from."""
        lines = [json.dumps({"id": int(e.id), **e.info}, ensure_ascii=False) + "\n" for e in examples]
        return {"prompts.jsonl": "".join(lines)}

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """FID and KID by extractor, and CLIP score. Raises UserError when no extractor and no CLIP is given."""
        extractors = self._extractors()
        if not (extractors or self.clip):
            raise UserError(
                "give --option inception=FILE (FID, KID) and/or clip=FOLDER (CLIP score), fd_clip=FOLDER"
            )
        metrics: dict[str, Metric] = {}
        per_example: dict[str, float] = {}
        notes: JsonObject = {
            "num_without_picture": count_without(examples, predictions),
            "reference": self.reference_stats or self.reference,
            "picture_preparation": f"shorter side to {self.size_px} (PIL bicubic, antialiased), centre crop",
        }
        for label, extractor in extractors.items():
            metrics |= self._distances(label, extractor, examples, predictions, data, notes)
            notes[f"{label}_extractor"] = extractor.identity
        if self.clip:
            clip = load_clip(self.clip)
            drawn = clip.images(drawn_image(predictions[example.id]) for example in examples)
            texts = clip.texts([example.info["caption"] for example in examples])
            cosines = 100 * pair_cosines(drawn, texts)
            score, chance = max(float(cosines.mean()), 0.0), percent_chance(drawn, texts)
            metrics["CLIP_score"] = metric(score, len(examples), chance=chance)
            per_example = {example.id: float(value) for example, value in zip(examples, cosines)}
            notes["clip"] = clip.identity
        return Scores(metrics, per_example, notes=notes)

    def _extractors(self) -> dict[str, Extractor]:
        """By the name of the distance that they give."""
        found: dict[str, Extractor] = {}
        if self.inception:
            from evaluation.inception import InceptionFeatures

            path, device = Path(self.inception), scoring_device()
            found["FID"] = InceptionFeatures(path, resize_mode=self.resize, device=device)
        if self.fd_clip:
            found["FD_clip"] = load_clip(self.fd_clip, option="fd_clip")
        return found

    def _distances(
        self,
        label: str,
        extractor: Extractor,
        examples: Sequence[Example],
        predictions: Predictions,
        data: Path,
        notes: JsonObject,
    ) -> dict[str, Metric]:
        """Frechet and kernel distance of the drawn images from the reference; adds how to `notes`."""

        def features(images: Iterable[Image.Image]) -> np.ndarray:
            return extractor.images(crop_and_resize(image, self.size_px) for image in images)

        fake = features(drawn_image(predictions[example.id]) for example in examples)
        if self.reference_stats:
            value = frechet_distance(*_read_stats(Path(self.reference_stats)), *moments(fake))
            return {label: metric(value, len(examples))}
        paths = [example.truth for example in examples]
        if self.reference == "all":
            paths = [image.path for image in load_coco(data, split=self.split)]
        real = features(read_image(path) for path in paths)
        notes["num_reference"] = len(paths)
        size = min(KID_SUBSET, len(real), len(fake))
        kid = kernel_distance(real, fake, seed=KID_SEED, subset_size=size)
        notes["kid"] = {"subset_size": size, "num_subsets": kid.num_subsets, "std": kid.std, "seed": KID_SEED}
        distance = frechet_distance_of_features(real, fake)
        kid_label = "KID" if label == "FID" else "KD_clip"
        return {label: metric(distance, len(examples)), kid_label: metric(kid.mean, len(examples))}


def _read_stats(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`mu` and `sigma` of an .npz as pytorch-fid writes it; nothing in the file is unpickled."""
    if not path.is_file():
        raise UserError(f"reference statistics {path} not found")
    with np.load(path, allow_pickle=False) as file:
        if missing := {"mu", "sigma"} - set(file.files):
            raise UserError(
                f"{path} has no {', '.join(sorted(missing))}; wanted mu and sigma (pytorch-fid's format)"
            )
        return file["mu"], file["sigma"]
