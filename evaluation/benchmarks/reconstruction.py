"""Reconstruction similarity (paper, Table 1): an image through tokenizer and detokenizer, 100 x CLIP cosine.

The same definition as SEED's: cosine of the projected image embeddings of CLIP ViT-L/14, mean, not clipped.
Image sets: Karpathy's test split of COCO (5,000) and of Flickr30k (1,000).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from evaluation.benchmarks.coco import CaptionedImage, flickr30k, load_coco
from evaluation.benchmarks.images import count_without, drawn_image, load_clip, percent_chance
from evaluation.core import Benchmark, Example, ImageLike, Predictions, Scores, metric, read_image
from evaluation.metrics.clip_score import pair_cosines


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Benchmark):
    """`clip`: a CLIP ViT-L/14 folder. The decoder's conditions are chosen with `--decode use="image"` (Table 4)."""

    kind: ClassVar = "reconstruction"
    primary: ClassVar[str] = "clip_similarity"

    split: str = "test"
    prompt: str = "reconstruction"
    clip: str = ""

    @abstractmethod
    def _images(self, data: Path) -> Sequence[CaptionedImage]: ...

    def examples(self, data: Path) -> Sequence[Example]:
        """The images of the split; each is prompt and truth."""
        found = []
        for image in self._images(data):
            id = str(image.image_id)
            prompt = self.make_prompt(id, images=(image.path,))
            found.append(Example(id, prompt, image.path, {"image_id": image.image_id}))
        return found

    def ideal(self, example: Example) -> ImageLike:
        """The original image, as a path."""
        return example.truth

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """100 x CLIP cosine of original and drawn image, beside that of mismatched pairs."""
        clip = load_clip(self.clip)
        original = clip.images(read_image(example.truth) for example in examples)
        drawn = clip.images(drawn_image(predictions[example.id]) for example in examples)
        similarity, chance = 100 * pair_cosines(original, drawn), percent_chance(original, drawn)
        return Scores(
            metrics={"clip_similarity": metric(float(similarity.mean()), len(examples), chance=chance)},
            per_example={e.id: float(value) for e, value in zip(examples, similarity)},
            notes={"clip": clip.identity, "num_without_picture": count_without(examples, predictions)},
        )


@dataclass(frozen=True, kw_only=True)
class CocoReconstruction(Reconstruction):
    """COCO, Karpathy's split."""

    name: ClassVar[str] = "coco_reconstruction"

    def _images(self, data: Path) -> Sequence[CaptionedImage]:
        return load_coco(data, split=self.split)


@dataclass(frozen=True, kw_only=True)
class Flickr30kReconstruction(Reconstruction):
    """Flickr30k, Karpathy's split."""

    name: ClassVar[str] = "flickr30k_reconstruction"

    def _images(self, data: Path) -> Sequence[CaptionedImage]:
        return flickr30k(data, split=self.split)
