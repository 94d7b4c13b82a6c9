"""python -m data_prep.similarity score|apply: CLIP similarity of images and texts, where no column has it.

    score DIR ... --encoder PATH                    similarities per shard, beside the shards
    apply DIR --min-similarity 0.28 --output NEW    a copy of DIR without what lies below, every drop counted

Both steps run as arrays (--task-index, --num-tasks), can be killed and run again. An image's similarity is that of its
best text part; a document's is that of its worst image. Documents without text are dropped as
`filtered:no_similarity`; documents without images stay.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from data_prep.arrays import load_arrays, save_arrays
from data_prep.feature_jobs import Item, in_batches, read_images, read_texts
from data_prep.options import Folders
from data_prep.rewrite import copy_without
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure, get_logger
from vlgpt.options import Argument, ArrayOptions, parse
from vlgpt.processes import Share
from vlgpt.shards import ShardIndex, ShardSet

if TYPE_CHECKING:
    import torch

BELOW, UNKNOWN = "filtered:similarity", "filtered:no_similarity"


@dataclass(frozen=True)
class ShardSimilarity:
    """Similarity of every document of a shard: NaN without text, inf without images. `encoder` names the CLIP
    and its weights.
    """

    values: np.ndarray  # (n,) float32
    encoder: str
    tar_sha256: str

    @staticmethod
    def path(folder: Path, name: str) -> Path:
        """Where the scores of a shard are stored."""
        return folder / "similarity" / f"{name}.npz"

    def store(self, folder: Path, name: str) -> None:
        """Write atomically."""
        save_arrays(
            self.path(folder, name), values=self.values, encoder=self.encoder, tar_sha256=self.tar_sha256
        )

    @staticmethod
    def load(folder: Path, name: str, *, tar_sha256: str) -> ShardSimilarity | None:
        """None when they are missing or belong to another tar."""
        columns = load_arrays(ShardSimilarity.path(folder, name), tar_sha256=tar_sha256)
        return (
            None
            if columns is None
            else ShardSimilarity(columns["values"], str(columns["encoder"]), tar_sha256)
        )


def document_scores(images: np.ndarray, texts: np.ndarray, index: ShardIndex) -> np.ndarray:
    """The lowest over images of the highest over texts, per document. (images, E), (texts, E), unit length ->
    (n,) float32
    """
    values = np.full(index.num_samples, np.inf, np.float32)
    for sample in range(index.num_samples):
        own_images = images[index.image_start[sample] : index.image_start[sample + 1]]
        own_texts = texts[index.text_start[sample] : index.text_start[sample + 1]]
        if len(own_images):
            values[sample] = (own_images @ own_texts.T).max(axis=1).min() if len(own_texts) else np.nan
    return values


class SimilarityOptions(ArrayOptions):
    """The command line."""

    step: Annotated[Literal["score", "apply"], Argument(is_positional=True)]
    folders: Folders = Field(description="data set folders")
    encoder: str | None = Field(None, description="score: CLIP folder or name")
    library: Literal["open_clip", "transformers"] = "open_clip"
    pretrained: str | None = Field(None, description="score: weights of a named open_clip model")
    batch_size: int = Field(64, ge=1)
    device: str = Field("cpu", description="score: cpu or cuda")
    threads: int = Field(1, ge=1, description="score: torch threads")
    min_similarity: float | None = Field(None, description="apply: LAION kept 0.28 and more (CLIP ViT-B/32)")
    output: Path | None = Field(None, description="apply: the new data set")


class Scorer:
    """A CLIP model, and what it says about the documents of a shard. Raises UserError without --encoder."""

    def __init__(self, options: SimilarityOptions):
        import torch

        from vlgpt.models.encoders import hash_weights, load_clip

        if options.encoder is None:
            raise UserError("score needs --encoder: a CLIP folder or name")
        torch.set_num_threads(options.threads)
        encoder = load_clip(options.encoder, library=options.library, pretrained=options.pretrained)
        self._encoder, self._device = encoder.to(options.device), options.device
        self._batch_size = options.batch_size
        self.name = f"{options.library}:{Path(options.encoder).name}:{hash_weights(encoder)}"

    def score(self, shards: ShardSet, shard: int) -> ShardSimilarity:
        """All documents of a shard. Raises UserError for a damaged image or record."""
        images = self._embed(read_images(shards, shard, self._encoder.image_size_px), self._embed_images)
        texts = self._embed(read_texts(shards, shard), self._encoder.embed_texts)
        values = document_scores(images, texts, shards.index(shard))
        return ShardSimilarity(values, self.name, shards.shards[shard].sha256)

    def _embed(self, items: Iterator[Item], embed: Callable[[list[Item]], torch.Tensor]) -> np.ndarray:
        """Unit vectors, (items, E)."""
        import torch

        found = [np.zeros((0, 1), np.float32)]
        with torch.no_grad():
            for batch in in_batches(items, self._batch_size):
                vectors = torch.nn.functional.normalize(embed(batch).float(), dim=-1)
                found.append(vectors.cpu().numpy())
        return np.concatenate(found[1:] or found)

    def _embed_images(self, images: list[np.ndarray]) -> torch.Tensor:
        from vlgpt.batch import to_pixels

        return self._encoder.embed_images(to_pixels(np.stack(images)).to(self._device))


def score(options: SimilarityOptions) -> None:
    """Score this task's shards of every folder and log the speed. Raises UserError for scores of another encoder."""
    scorer = Scorer(options)
    for folder in options.folders:
        shards, started, num_images = ShardSet.open(folder), time.monotonic(), 0
        for shard in options.share.of(len(shards.shards)):
            record = shards.shards[shard]
            found = ShardSimilarity.load(folder, record.name, tar_sha256=record.sha256)
            if found is not None and found.encoder != scorer.name:
                raise UserError(
                    f"{folder}: shard {record.name} was scored by {found.encoder}, this run has {scorer.name}; "
                    f"remove {folder / 'similarity'} to score again"
                )
            if found is None:
                scorer.score(shards, shard).store(folder, record.name)
                num_images += record.num_images
        speed = num_images / max(time.monotonic() - started, 1e-9)
        get_logger().info("%s: %d pictures scored, %.1f pictures/s", folder, num_images, speed)


def apply(folder: Path, output: Path, *, min_similarity: float, share: Share) -> bool:
    """Copy this task's shards without documents below the limit; True when the copy is complete. Raises
    UserError when a shard has no scores, or scores of another encoder than the first.
    """
    shards = ShardSet.open(folder)
    scores: dict[int, ShardSimilarity] = {}
    for shard, record in enumerate(shards.shards):
        found = ShardSimilarity.load(folder, record.name, tar_sha256=record.sha256)
        if found is None:
            raise UserError(
                f"{folder}: shard {record.name} has no similarities; run python -m data_prep.similarity score {folder}"
            )
        if scores and found.encoder != scores[0].encoder:
            raise UserError(
                f"{folder}: shard {record.name} was scored by {found.encoder}, the first by {scores[0].encoder}; "
                f"remove {folder / 'similarity'} and score again"
            )
        scores[shard] = found

    def verdicts(shard: int) -> dict[int, str]:
        values = scores[shard].values
        below = {int(sample): BELOW for sample in np.flatnonzero(values < min_similarity)}
        return below | {int(sample): UNKNOWN for sample in np.flatnonzero(np.isnan(values))}

    note = {"min_clip_similarity": {"limit": min_similarity, "encoder": scores[0].encoder if scores else ""}}
    return copy_without(folder, output, verdicts=verdicts, note=note, share=share)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: run the step `score` or `apply`.

    Returns 0 when this task's share is done. Raises UserError for wrong use (exit code 2).
    """
    options = parse(SimilarityOptions, argv, prog="python -m data_prep.similarity", description=__doc__)
    configure()
    if options.step == "score":
        score(options)
        return 0
    if len(options.folders) != 1 or options.output is None or options.min_similarity is None:
        raise UserError("apply takes one DIR, --min-similarity, and --output, the folder of the new data set")
    (folder,), limit = options.folders, options.min_similarity
    is_done = apply(folder, options.output, min_similarity=limit, share=options.share)
    get_logger().info("%s: %s", options.output, "complete" if is_done else "other tasks are not done yet")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
