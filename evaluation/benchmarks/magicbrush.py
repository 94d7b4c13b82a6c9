"""MagicBrush: edits of an image by an instruction (dev split, 528 turns), each turn from the true previous image.

Parquet files of the data set's Hugging Face form. CLIP-I: cosine of drawn and true image; L1: mean absolute
difference on 0..1; CLIP-T: cosine with the target's description where `global_descriptions.json` is there, else
with the instruction (`clip_t_text` in the notes says which; only the first is comparable with published numbers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from evaluation.benchmarks.images import count_without, drawn_image, load_clip
from evaluation.core import (
    Benchmark,
    DataNotFound,
    Example,
    ImageLike,
    Predictions,
    Record,
    Scores,
    find_file,
    find_folder,
    has_file,
    metric,
    read_image,
    read_json,
)
from evaluation.metrics.clip_score import mean_wrong_cosine, pair_cosines
from vlgpt.errors import UserError

COLUMNS = ["img_id", "turn_index", "source_img", "instruction", "target_img"]
DESCRIPTIONS = "magicbrush/global_descriptions.json"


@dataclass(frozen=True, kw_only=True)
class MagicBrush(Benchmark):
    """`clip`: a CLIP folder (published numbers use ViT-B/32)."""

    name: ClassVar[str] = "magicbrush"
    kind: ClassVar = "image"
    primary: ClassVar[str] = "CLIP-I"

    split: str = "dev"
    prompt: str = "edit"
    clip: str = ""

    def examples(self, data: Path) -> Sequence[Example]:
        """Every turn of every session, ordered by image and turn; source and target are the files' image bytes."""
        found = []
        records = self._records(data)
        for record in sorted(records, key=lambda record: (str(record["img_id"]), record["turn_index"])):
            image_id, turn, instruction = str(record["img_id"]), record["turn_index"], record["instruction"]
            id = f"{image_id}-{turn}"
            info = {"image_id": image_id, "turn": turn, "instruction": instruction}
            prompt = self.make_prompt(id, images=(record["source_img"]["bytes"],), instruction=instruction)
            found.append(Example(id, prompt, record["target_img"]["bytes"], info))
        return found

    def _records(self, data: Path) -> list[Record]:
        import pyarrow.parquet

        folder = find_folder(data, "magicbrush/data", "magicbrush", "data", ".")
        paths = sorted(folder.glob(f"{self.split}-*.parquet")) or sorted(
            folder.glob(f"{self.split}*.parquet")
        )
        if not paths:
            raise DataNotFound(f"no {self.split}-*.parquet of MagicBrush in {folder}; see docs/evaluation.md")
        return [
            row for path in paths for row in pyarrow.parquet.read_table(path, columns=COLUMNS).to_pylist()
        ]

    def ideal(self, example: Example) -> ImageLike:
        """The target image of the turn, as encoded bytes."""
        return example.truth

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """CLIP-I, CLIP-T and L1 of the drawn images, beside those of wrong pairs or of the unedited image."""
        n, clip = len(examples), load_clip(self.clip)
        target = clip.images(read_image(example.truth) for example in examples)
        source = clip.images(read_image(example.prompt.images[0]) for example in examples)
        drawn = clip.images(drawn_image(predictions[example.id]) for example in examples)
        texts, kind = self._texts(examples, data)
        described = clip.texts(texts)
        similarity = pair_cosines(drawn, target)
        distances, unedited = [], []
        for example in examples:
            true = read_image(example.truth)
            distances.append(l1_distance(drawn_image(predictions[example.id]), true))
            unedited.append(l1_distance(read_image(example.prompt.images[0]), true))
        clip_t = pair_cosines(drawn, described).mean()
        return Scores(
            metrics={
                "CLIP-I": metric(similarity.mean(), n, chance=mean_wrong_cosine(drawn, target)),
                "CLIP-T": metric(clip_t, n, chance=mean_wrong_cosine(drawn, described)),
                "L1": metric(float(np.mean(distances)), n),
                "CLIP-I_unedited": metric(pair_cosines(source, target).mean(), n),
                "L1_unedited": metric(float(np.mean(unedited)), n),
            },
            per_example={e.id: float(value) for e, value in zip(examples, similarity)},
            notes={
                "clip": clip.identity,
                "clip_t_text": kind,
                "l1_size": "the drawn picture resized (bicubic) to the target's size",
                "num_without_picture": count_without(examples, predictions),
            },
        )

    def _texts(self, examples: Sequence[Example], data: Path) -> tuple[list[str], str]:
        """The texts that CLIP-T compares with, and what they are."""
        if not has_file(data, DESCRIPTIONS):
            return [example.info["instruction"] for example in examples], "instruction"
        descriptions = read_json(find_file(data, DESCRIPTIONS))
        names = [(e.info["image_id"], f"{e.info['image_id']}-output{e.info['turn']}.png") for e in examples]
        if missing := [name for image, name in names if name not in descriptions.get(image, {})]:
            raise UserError(f"{DESCRIPTIONS} describes no {missing[0]} ({len(missing)} missing)")
        return [descriptions[image][name] for image, name in names], "global description"


def l1_distance(drawn: Image.Image, target: Image.Image) -> float:
    """Mean absolute difference of the pixels on 0..1, the drawn image brought to the target's size."""
    if drawn.size != target.size:
        drawn = drawn.resize(target.size, Image.Resampling.BICUBIC)
    difference = np.asarray(drawn, np.float64) - np.asarray(target, np.float64)
    return float(np.abs(difference).mean() / 255)
