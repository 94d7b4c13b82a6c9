"""COCO text to image: FID of 30,000 pictures drawn from captions of val2014 (paper, Table 2), KID and CLIP
score.

There is no official script. Ours draws `num_samples` pictures of val2014 without repetition and one caption
of each, both addressed by `sample_seed`, and writes the list as prompts.jsonl. Every choice that moves the
number (reference set, crop, resize before Inception, weights) is in the result's notes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from evaluation.benchmarks.coco import CaptionedImage, load_coco
from evaluation.benchmarks.pictures import (
    chance_cosine,
    count_without,
    drawn_picture,
    load_clip,
    percent_cosines,
    scoring_device,
)
from evaluation.core import Benchmark, Example, ImageSource, Prediction, Scores, metric, read_image
from evaluation.metrics.fid import Moments, frechet_distance, frechet_distance_of_features, kernel_distance
from vlgpt import seeds
from vlgpt.errors import UserError

KID_SUBSET = 1000
KID_SEED = 2020


@dataclass(frozen=True, kw_only=True)
class CocoGeneration(Benchmark):
    """`inception` (weights file) and/or `fd_clip` (CLIP folder used as extractor, reported as FD_clip: for
    small models without Inception) give the distances, `clip` the CLIP score. `reference`: all pictures of
    the split | matched (those that the captions belong to); `reference_stats`: an .npz with mu and sigma
    instead of pictures."""

    name: ClassVar[str] = "coco_generation"
    kind: ClassVar = "image"
    primary: ClassVar[str] = "FID"
    higher_is_better: ClassVar[bool] = False

    split: str = "val2014"
    prompt: str = "generation"
    num_samples: int = 30_000
    sample_seed: int = 42
    size_px: int = 256
    reference: str = "all"
    reference_stats: str = ""
    inception: str = ""
    resize: str = "pytorch_fid"
    fd_clip: str = ""
    clip: str = ""

    def examples(self, data: Path) -> Sequence[Example]:
        images = load_coco(data, split=self.split)
        random = seeds.generator(self.sample_seed, self.name)
        chosen = random.permutation(len(images))[: self.num_samples]
        return [self._example(number, images[at], random) for number, at in enumerate(chosen)]

    def _example(self, number: int, image: CaptionedImage, random: np.random.Generator) -> Example:
        caption_id, caption = image.captions[int(random.integers(len(image.captions)))]
        id = f"{number:05d}"
        info = {"image_id": image.image_id, "caption_id": caption_id, "caption": caption}
        return Example(id, self.make_prompt(id, caption=caption), image.path, info)

    def ideal(self, example: Example) -> ImageSource:
        return example.truth

    def extra_files(self, examples: Sequence[Example]) -> dict[str, str]:
        """prompts.jsonl: which caption each picture is drawn from."""
        keys = ("image_id", "caption_id", "caption")
        lines = [
            json.dumps({"id": int(e.id), **{key: e.info[key] for key in keys}}, ensure_ascii=False)
            for e in examples
        ]
        return {"prompts.jsonl": "\n".join(lines) + "\n"}

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        if not (self.inception or self.fd_clip or self.clip):
            raise UserError(
                "give --option inception=FILE (FID, KID) and/or clip=FOLDER (CLIP score), fd_clip=FOLDER"
            )
        examples = [example for example in self.loaded(data) if example.id in predictions]
        metrics: dict[str, dict[str, float]] = {}
        notes: dict[str, Any] = {
            "num_without_picture": count_without(examples, predictions),
            "reference": self.reference_stats or self.reference,
            "picture_preparation": f"shorter side to {self.size_px} (PIL bicubic, antialiased), centre crop",
        }
        for label, extractor in self._extractors():
            metrics |= self._distances(label, extractor.images, examples, predictions, data, notes)
            notes[f"{label}_extractor"] = dict(extractor.identity)
        per_example: dict[str, float] = {}
        if self.clip:
            score, chance, per_example, notes["clip"] = self._clip_score(examples, predictions)
            metrics["CLIP_score"] = metric(max(score, 0.0), len(examples), chance=chance)
        return Scores(metrics, per_example, notes=notes)

    def _extractors(self) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        if self.inception:
            from evaluation.inception import InceptionFeatures

            extractor = InceptionFeatures(
                Path(self.inception),
                resize_mode=self.resize,  # type: ignore[arg-type]
                device=scoring_device(),
            )
            found.append(("FID", extractor))
        if self.fd_clip:
            found.append(("FD_clip", load_clip(self.fd_clip, option="fd_clip")))
        return found

    def _distances(
        self,
        label: str,
        extract: Callable[[Sequence[Image.Image]], np.ndarray],
        examples: Sequence[Example],
        predictions: Mapping[str, Prediction],
        data: Path,
        notes: dict[str, Any],
    ) -> dict[str, dict[str, float]]:
        from evaluation.features import crop_and_resize, in_batches

        def drawn(i: int) -> Image.Image:
            return crop_and_resize(drawn_picture(predictions[examples[i].id]), self.size_px)

        fake = in_batches(extract, drawn, len(examples))
        if self.reference_stats:
            mean, covariance = _read_stats(Path(self.reference_stats))
            moments = Moments(fake.shape[1])
            moments.update(fake)
            value = frechet_distance(mean, covariance, moments.mean(), moments.covariance())
            return {label: metric(value, len(examples))}
        paths = self._reference(examples, data)
        real = in_batches(extract, lambda i: crop_and_resize(read_image(paths[i]), self.size_px), len(paths))
        notes["num_reference"] = len(paths)
        size = min(KID_SUBSET, len(real), len(fake))
        kid = kernel_distance(real, fake, seed=KID_SEED, subset_size=size)
        notes["kid"] = {"subset_size": size, "num_subsets": kid.num_subsets, "std": kid.std, "seed": KID_SEED}
        distance = frechet_distance_of_features(real, fake)
        kid_label = "KID" if label == "FID" else "KD_clip"
        return {label: metric(distance, len(examples)), kid_label: metric(kid.mean, len(examples))}

    def _reference(self, examples: Sequence[Example], data: Path) -> list[Path]:
        if self.reference == "matched":
            return [example.truth for example in examples]
        if self.reference == "all":
            return [image.path for image in load_coco(data, split=self.split)]
        raise UserError(f"option reference is {self.reference!r}; wanted all or matched")

    def _clip_score(
        self, examples: Sequence[Example], predictions: Mapping[str, Prediction]
    ) -> tuple[float, float | None, dict[str, float], dict[str, Any]]:
        from evaluation.features import in_batches

        clip = load_clip(self.clip)
        drawn = in_batches(clip.images, lambda i: drawn_picture(predictions[examples[i].id]), len(examples))
        texts = clip.texts([example.info["caption"] for example in examples])
        cosines = percent_cosines(drawn, texts)
        per_example = {example.id: float(value) for example, value in zip(examples, cosines)}
        return float(cosines.mean()), chance_cosine(drawn, texts), per_example, dict(clip.identity)


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
