"""Emoji benchmarks whose answers are images: reconstruction, drawing from text, edits.

All images are compared at the judge's size, pixels in [-1, 1]. A missing image counts as the mean training
image: it is never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from demo.benchmarks.data import (
    SPLITS,
    EmojiBenchmark,
    ask,
    by_split,
    chats,
    load,
    named,
    subset,
)
from evaluation.core import Example, Kind, Predictions, Scores, metric
from vlgpt import seeds
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.document import Document, ImagePart

if TYPE_CHECKING:
    from demo.probes import Judge, Pictures

NUM_CANDIDATES = 150
NUM_RECALL = 5
SUFFIX = {"both": "", "image": "_image_only", "text": "_text_only"}
MEAN_OF = 1000


class PictureAnswers(EmojiBenchmark):
    """Predictions are PNG files; `truth` is the encoded real image."""

    primary: ClassVar[str]

    def ideal(self, example: Example) -> bytes:
        """The real image itself, as encoded bytes."""
        return example.truth

    def load_judge(self) -> Judge:
        """Raises UserError without `--option judge=FOLDER`."""
        from demo.probes import load_judge

        return load_judge(self.judge)

    def drawn(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Pictures:
        """What was drawn, in the order of the examples: -> (n, S, S, 3)."""
        judge = self.load_judge()
        result = np.repeat(mean_picture(data, self.judge)[None], len(examples), axis=0)
        for row, example in enumerate(examples):
            if path := predictions[example.id]["image"]:
                result[row] = judge.squares([Path(path).read_bytes()])[0]
        return result

    def notes(self, predictions: Predictions) -> dict[str, object]:
        """Who judged, and how many images are missing."""
        missing = sum(not prediction["image"] for prediction in predictions.values())
        return {"judge": dict(self.load_judge().identity), "num_without_picture": missing}


@lru_cache(maxsize=4)
def mean_picture(data: Path, judge: str) -> np.ndarray:
    """Mean of 1,000 training images: -> (S, S, 3) uint8."""
    from demo.probes import load_judge

    items = subset(load(data / "pairs-train"), MEAN_OF)
    pictures = load_judge(judge).squares([item.images[0] for item in items])
    return pictures.astype(np.float64).mean(0).round().astype(np.uint8)


def pixel_mse(first: Pictures, second: Pictures) -> np.ndarray:
    """Mean squared difference of each pair, in [-1, 1]: (n, S, S, 3) x 2 -> (n,)."""
    difference = first.reshape(len(first), -1).astype(np.float32) - second.reshape(len(second), -1)
    return np.square(difference / 127.5, dtype=np.float64).mean(1)


def all_pixel_mse(first: Pictures, second: Pictures) -> np.ndarray:
    """Of every pair: (n, S, S, 3), (m, S, S, 3) -> (n, m)."""
    a = first.reshape(len(first), -1).astype(np.float64) / 127.5
    b = second.reshape(len(second), -1).astype(np.float64) / 127.5
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squares, 0) / a.shape[1]


@dataclass(frozen=True, kw_only=True)
class EmojiReconstruction(PictureAnswers):
    """Held-out images through image tokenizer, detokenizer and image decoder.

    `conditions`: which of z_v and z_t the decoder reads (both | image | text; paper, Table 4).
    """

    name: ClassVar[str] = "emoji_reconstruction"
    kind: ClassVar[Kind] = "reconstruction"
    primary: ClassVar[str] = "reconstruction/pixel_mse"
    higher_is_better: ClassVar[bool] = False
    answer_options: ClassVar[tuple[str, ...]] = ("conditions",)

    prompt: str = "picture"
    limit: int = 440
    conditions: Literal["both", "image", "text"] = "both"

    @property
    def decoding(self) -> DecodeSettings:
        return replace(super().decoding, use=self.conditions)

    def examples(self, data: Path) -> Sequence[Example]:
        """Images of described emoji, unseen ones first; the prompt is the image alone."""
        result = []
        for split in ("unseen", "seen") if self.conditions == "both" else ("unseen",):
            for item in chats(data, split, kind="describe", limit=self.limit):
                id, image = item.info["picture"]["id"], item.images[0]
                prompt = Prompt(Document(id, self.name, (ImagePart(0),)), (image,), id)
                result.append(Example(id, prompt, image, {"split": split, "picture": id}))
        return result

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Pixel error against the real image, and CLIP similarity above that of mismatched pairs, by split."""
        judge, mean = self.load_judge(), mean_picture(data, self.judge)
        suffix = SUFFIX[self.conditions]
        metrics: dict[str, dict[str, float]] = {}
        per_example: dict[str, float] = {}
        for split, chosen in by_split(examples):
            real, n = judge.squares([example.truth for example in chosen]), len(chosen)
            drawn = self.drawn(chosen, predictions, data)
            error = pixel_mse(drawn, real)
            blank = pixel_mse(np.repeat(mean[None], n, axis=0), real).mean()
            cosine = judge.embed(drawn) @ judge.embed(real).T
            matched = np.trace(cosine) / n
            mismatched = (cosine.sum() - np.trace(cosine)) / max(n * (n - 1), 1)
            name = named(f"reconstruction/pixel_mse{suffix}", split, main="unseen")
            metrics[name] = metric(float(error.mean()), n, chance=float(blank))
            name = named(f"reconstruction/clip_similarity{suffix}", split, main="unseen")
            metrics[name] = metric(float(matched - mismatched), n, chance=0.0)
            per_example |= {example.id: float(value) for example, value in zip(chosen, error)}
        return Scores(metrics, per_example, notes=self.notes(predictions))


@dataclass(frozen=True, kw_only=True)
class EmojiDraw(PictureAnswers):
    """Images drawn from held-out captions, compared with the real ones.

    real_r5: the real image is among the 5 nearest of 150 candidates (itself and 149 others of its split, drawn
    by id) in the judge's space. pixel_mse_ratio: error to the real image / mean error to the other 149.
    `image_seeds`: images per caption, for models that sample; scores are means over all of them.
    """

    name: ClassVar[str] = "emoji_draw"
    kind: ClassVar[Kind] = "image"
    primary: ClassVar[str] = "draw/real_r5"
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings(max_new_tokens=24, images="free")

    limit: int = 440
    image_seeds: int = 1

    def examples(self, data: Path) -> Sequence[Example]:
        """Drawing chats of every split, each repeated with `image_seeds` seeds."""
        result = []
        for split in SPLITS:
            for item in chats(data, split, kind="draw", limit=self.limit):
                picture, image = item.info["picture"], item.images[0]
                for seed in range(self.image_seeds):
                    id = item.document.id + (f"@{seed}" if seed else "")
                    info = {"split": split, "picture": picture["id"], "caption": picture["caption"]}
                    result.append(Example(id, ask(item, id=id), image, info))
        return result

    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Recall of the right image among candidates by CLIP similarity, and pixel errors, by split."""
        judge = self.load_judge()
        metrics: dict[str, dict[str, float]] = {}
        per_example: dict[str, float] = {}
        for split, chosen in by_split(examples):
            ids, images = _real_pictures(data, split)
            real = judge.squares(images)
            drawn = self.drawn(chosen, predictions, data)
            similarity = judge.embed(drawn) @ judge.embed(real).T
            error = all_pixel_mse(drawn, real)
            hits, matched, mismatched = [], [], []
            for row, example in enumerate(chosen):
                truth, others = draw_candidates(ids, example.info["picture"])
                # A tie counts as a miss: a judge that tells nothing apart must not score.
                rank = int(np.sum(similarity[row, others] >= similarity[row, truth]))
                hits.append(float(rank < NUM_RECALL))
                matched.append(error[row, truth])
                mismatched.append(error[row, others].mean())
            n = len({example.info["picture"] for example in chosen})
            chance = NUM_RECALL / min(NUM_CANDIDATES, len(ids))
            name = named("draw/real_r5", split, main="unseen")
            metrics[name] = metric(float(np.mean(hits)), n, chance=chance)
            total = float(np.sum(mismatched))
            ratio = float(np.sum(matched)) / total if total else 1.0  # all images alike: nothing to tell
            metrics[named("draw/pixel_mse_ratio", split, main="unseen")] = metric(ratio, n, chance=1.0)
            per_example |= {example.id: hit for example, hit in zip(chosen, hits)}
        return Scores(metrics, per_example, notes=self.notes(predictions))


def _real_pictures(data: Path, split: str) -> tuple[list[str], list[bytes]]:
    """All images of a split: ids and files."""
    items = chats(data, split, kind="draw")
    return [item.info["picture"]["id"] for item in items], [item.images[0] for item in items]


def draw_candidates(ids: Sequence[str], truth: str, *, without: str = "") -> tuple[int, np.ndarray]:
    """Position of the true image, and of up to 149 others of the same gallery."""
    position = ids.index(truth)
    pool = [row for row, id in enumerate(ids) if id not in (truth, without)]
    random = seeds.generator("emoji-candidates", truth, without)
    return position, np.array(random.permutation(pool)[: NUM_CANDIDATES - 1])
