"""MagicBrush: edits of a picture by an instruction (dev split, 528 turns), each turn from the true previous
picture.

Parquet files of the data set's Hugging Face form. CLIP-I: cosine of drawn and true picture; L1: mean
absolute difference on 0..1; CLIP-T: cosine with the target's description where `global_descriptions.json`
is there, else with the instruction (`clip_t_text` in the notes says which; only the first is comparable
with published numbers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from evaluation.benchmarks.files import find_file, find_folder, has_file
from evaluation.benchmarks.pictures import chance_cosine, count_without, drawn_picture, load_clip
from evaluation.core import (
    Benchmark,
    DataNotFound,
    Example,
    ImageSource,
    Prediction,
    Scores,
    metric,
    read_image,
    read_json,
)
from evaluation.metrics.clip_score import pair_cosines
from vlgpt.errors import UserError

COLUMNS = ("img_id", "turn_index", "source_img", "instruction", "target_img")
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
        records = sorted(
            self._records(data), key=lambda record: (str(record["img_id"]), record["turn_index"])
        )
        return [self._example(record) for record in records]

    def _records(self, data: Path) -> list[dict[str, Any]]:
        import pyarrow.parquet

        folder = find_folder(data, "magicbrush/data", "magicbrush", "data", ".")
        paths = sorted(folder.glob(f"{self.split}-*.parquet")) or sorted(
            folder.glob(f"{self.split}*.parquet")
        )
        if not paths:
            raise DataNotFound(f"no {self.split}-*.parquet of MagicBrush in {folder}; see docs/evaluation.md")
        return [
            record
            for path in paths
            for record in pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
        ]

    def _example(self, record: Mapping[str, Any]) -> Example:
        id = f"{record['img_id']}-{record['turn_index']}"
        source, target = record["source_img"]["bytes"], record["target_img"]["bytes"]
        info = {
            "image_id": str(record["img_id"]),
            "turn": record["turn_index"],
            "instruction": record["instruction"],
        }
        prompt = self.make_prompt(id, images=(source,), instruction=record["instruction"])
        return Example(id, prompt, target, info)

    def ideal(self, example: Example) -> ImageSource:
        return example.truth

    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        from evaluation.features import in_batches

        examples = [example for example in self.loaded(data) if example.id in predictions]
        n, clip = len(examples), load_clip(self.clip)

        def drawn(i: int) -> Image.Image:
            return drawn_picture(predictions[examples[i].id])

        target = in_batches(clip.images, lambda i: read_image(examples[i].truth), n)
        source = in_batches(clip.images, lambda i: read_image(examples[i].prompt.images[0]), n)
        ours = in_batches(clip.images, drawn, n)
        texts, kind = self._texts(examples, data)
        described = clip.texts(texts)
        similarity = pair_cosines(ours, target)
        distances = [l1_distance(drawn(i), read_image(examples[i].truth)) for i in range(n)]
        unedited = [l1_distance(read_image(e.prompt.images[0]), read_image(e.truth)) for e in examples]
        chance_i, chance_t = chance_cosine(ours, target), chance_cosine(ours, described)
        return Scores(
            metrics={
                "CLIP-I": metric(similarity.mean(), n, chance=None if chance_i is None else chance_i / 100),
                "CLIP-T": metric(
                    pair_cosines(ours, described).mean(),
                    n,
                    chance=None if chance_t is None else chance_t / 100,
                ),
                "L1": metric(float(np.mean(distances)), n),
                "CLIP-I_unedited": metric(pair_cosines(source, target).mean(), n),
                "L1_unedited": metric(float(np.mean(unedited)), n),
            },
            per_example={e.id: float(value) for e, value in zip(examples, similarity)},
            notes={
                "clip": dict(clip.identity),
                "clip_t_text": kind,
                "l1_size": "the drawn picture resized (bicubic) to the target's size",
                "num_without_picture": count_without(examples, predictions),
            },
        )

    def _texts(self, examples: Sequence[Example], data: Path) -> tuple[list[str], str]:
        if not has_file(data, DESCRIPTIONS):
            return [example.info["instruction"] for example in examples], "instruction"
        descriptions = read_json(find_file(data, DESCRIPTIONS))
        names = [(e.info["image_id"], f"{e.info['image_id']}-output{e.info['turn']}.png") for e in examples]
        if missing := [name for image, name in names if name not in descriptions.get(image, {})]:
            raise UserError(f"{DESCRIPTIONS} describes no {missing[0]} ({len(missing)} missing)")
        return [descriptions[image][name] for image, name in names], "global description"


def l1_distance(drawn: Image.Image, target: Image.Image) -> float:
    """Mean absolute difference of the pixels on 0..1, the drawn picture brought to the target's size."""
    if drawn.size != target.size:
        drawn = drawn.resize(target.size, Image.Resampling.BICUBIC)
    difference = np.asarray(drawn, np.float64) - np.asarray(target, np.float64)
    return float(np.abs(difference).mean() / 255)
