"""Reconstruction similarity (paper, Table 1): a picture through tokenizer and detokenizer, 100 x CLIP cosine.

The same definition as SEED's: cosine of the projected image embeddings of CLIP ViT-L/14, mean, not clipped.
Picture sets: Karpathy's test split of COCO (5,000) and of Flickr30k (1,000).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.coco import CaptionedImage, flickr30k, load_coco
from evaluation.benchmarks.pictures import (
    chance_cosine,
    count_without,
    drawn_picture,
    load_clip,
    percent_cosines,
)
from evaluation.core import Benchmark, Example, ImageSource, Prediction, Scores, metric, read_image


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Benchmark):
    """`clip`: a CLIP ViT-L/14 folder. The decoder's conditions are chosen with `--decode use="image"`
    (Table 4)."""

    kind: ClassVar = "reconstruction"
    primary: ClassVar[str] = "clip_similarity"

    split: str = "test"
    prompt: str = "reconstruction"
    clip: str = ""

    @abstractmethod
    def _images(self, data: Path) -> Sequence[CaptionedImage]: ...

    def examples(self, data: Path) -> Sequence[Example]:
        return [
            Example(
                str(i.image_id),
                self.make_prompt(str(i.image_id), images=(i.path,)),
                i.path,
                {"image_id": i.image_id},
            )
            for i in self._images(data)
        ]

    def ideal(self, example: Example) -> ImageSource:
        return example.truth

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        from evaluation.features import in_batches

        examples = [example for example in self.loaded(data) if example.id in predictions]
        clip = load_clip(self.clip)
        original = in_batches(clip.images, lambda i: read_image(examples[i].truth), len(examples))
        drawn = in_batches(clip.images, lambda i: drawn_picture(predictions[examples[i].id]), len(examples))
        similarity = percent_cosines(original, drawn)
        chance = chance_cosine(original, drawn)
        return Scores(
            metrics={"clip_similarity": metric(float(similarity.mean()), len(examples), chance=chance)},
            per_example={e.id: float(value) for e, value in zip(examples, similarity)},
            notes={"clip": dict(clip.identity), "num_without_picture": count_without(examples, predictions)},
        )


@dataclass(frozen=True, kw_only=True)
class CocoReconstruction(Reconstruction):
    name: ClassVar[str] = "coco_reconstruction"

    def _images(self, data: Path) -> Sequence[CaptionedImage]:
        return load_coco(data, split=self.split)


@dataclass(frozen=True, kw_only=True)
class Flickr30kReconstruction(Reconstruction):
    name: ClassVar[str] = "flickr30k_reconstruction"

    def _images(self, data: Path) -> Sequence[CaptionedImage]:
        return flickr30k(data, split=self.split)
