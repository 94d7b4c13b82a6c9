"""python -m data_prep.similarity score|apply: CLIP similarity of pictures and their texts, for data without such
a column.

    score DIR ... --encoder PATH                    similarities per shard, beside the shards
    apply DIR --min-similarity 0.28 --output NEW    a copy of DIR without what lies below, every drop counted

Both steps run as arrays (--task-index, --num-tasks), can be killed and run again. A picture's similarity is
that of its best text part; a document's is that of its worst picture. Documents without text are dropped as
`filtered:no_similarity`; documents without pictures stay.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.feature_jobs import in_batches, read_images, read_texts
from data_prep.rewrite import copy_without
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure, get_logger
from vlgpt.shards import ShardIndex, ShardSet

BELOW, UNKNOWN = "filtered:similarity", "filtered:no_similarity"


@dataclass(frozen=True)
class Scores:
    """Similarity of every document of a shard: NaN without text, inf without pictures. `encoder` names the CLIP
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
        buffer = io.BytesIO()
        np.savez(buffer, values=self.values, encoder=self.encoder, tar_sha256=self.tar_sha256)
        self.path(folder, name).parent.mkdir(exist_ok=True)
        write_atomic(self.path(folder, name), buffer.getvalue())

    @staticmethod
    def load(folder: Path, name: str, *, tar_sha256: str) -> Scores | None:
        """None when they are missing or belong to another tar."""
        try:
            with np.load(Scores.path(folder, name), allow_pickle=False) as archive:
                found = Scores(archive["values"], str(archive["encoder"]), str(archive["tar_sha256"]))
        except (FileNotFoundError, ValueError, KeyError, OSError):
            return None
        return found if found.tar_sha256 == tar_sha256 else None


def document_scores(images: np.ndarray, texts: np.ndarray, index: ShardIndex) -> np.ndarray:
    """The lowest over pictures of the highest over texts, per document. (images, E), (texts, E), unit length ->
    (n,) float32
    """
    values = np.full(index.num_samples, np.inf, np.float32)
    for sample in range(index.num_samples):
        own_images = images[index.image_start[sample] : index.image_start[sample + 1]]
        own_texts = texts[index.text_start[sample] : index.text_start[sample + 1]]
        if len(own_images):
            values[sample] = (own_images @ own_texts.T).max(axis=1).min() if len(own_texts) else np.nan
    return values


class Scorer:
    """A CLIP and what it says about the documents of a shard."""

    def __init__(self, arguments: argparse.Namespace):
        import torch

        from vlgpt.models.encoders import hash_weights, load_clip

        torch.set_num_threads(arguments.threads)
        encoder = load_clip(arguments.encoder, library=arguments.library, pretrained=arguments.pretrained)
        self._encoder, self._device = encoder.to(arguments.device), arguments.device
        self._batch_size = arguments.batch_size
        self.name = f"{arguments.library}:{Path(arguments.encoder).name}:{hash_weights(encoder)}"

    def score(self, shards: ShardSet, shard: int) -> Scores:
        """All documents of a shard. Raises UserError for a damaged picture or record."""
        images = self._embed(read_images(shards, shard, self._encoder.image_size_px), self._embed_images)
        texts = self._embed(read_texts(shards, shard), self._encoder.embed_texts)
        values = document_scores(images, texts, shards.index(shard))
        return Scores(values, self.name, shards.shards[shard].sha256)

    def _embed(self, items: Iterator[Any], embed: Callable[[list[Any]], Any]) -> np.ndarray:
        """Unit vectors, (items, E)."""
        import torch

        found = [np.zeros((0, 1), np.float32)]
        with torch.no_grad():
            for batch in in_batches(items, self._batch_size):
                vectors = torch.nn.functional.normalize(embed(batch).float(), dim=-1)
                found.append(vectors.cpu().numpy())
        return np.concatenate(found[1:] or found)

    def _embed_images(self, images: list[np.ndarray]) -> Any:
        from vlgpt.batch import to_pixels

        return self._encoder.embed_images(to_pixels(np.stack(images)).to(self._device))


def score(arguments: argparse.Namespace) -> None:
    """Score this task's shards of every folder; prints pictures per second. Raises UserError when another
    encoder has begun.
    """
    scorer = Scorer(arguments)
    for folder in arguments.folders:
        shards, started, num_images = ShardSet.open(folder), time.monotonic(), 0
        for shard in range(arguments.task_index, len(shards.shards), arguments.num_tasks):
            record = shards.shards[shard]
            found = Scores.load(folder, record.name, tar_sha256=record.sha256)
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


def apply(arguments: argparse.Namespace) -> bool:
    """Copy this task's shards without documents below the limit; True when the copy is complete. Raises
    UserError when a shard has no scores, or scores of another encoder than the first.
    """
    (folder,), limit = arguments.folders, arguments.min_similarity
    shards = ShardSet.open(folder)
    scores: dict[int, Scores] = {}
    for shard, record in enumerate(shards.shards):
        found = Scores.load(folder, record.name, tar_sha256=record.sha256)
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
        below = {int(sample): BELOW for sample in np.flatnonzero(values < limit)}
        return below | {int(sample): UNKNOWN for sample in np.flatnonzero(np.isnan(values))}

    note = {"min_clip_similarity": {"limit": limit, "encoder": scores[0].encoder if scores else ""}}
    tasks = {"task_index": arguments.task_index, "num_tasks": arguments.num_tasks}
    return copy_without(folder, arguments.output, verdicts=verdicts, note=note, **tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 done (or this task's share), 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.similarity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("step", choices=("score", "apply"))
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="data set folders")
    parser.add_argument("--encoder", help="score: CLIP folder or name")
    parser.add_argument("--library", choices=("open_clip", "transformers"), default="open_clip")
    parser.add_argument("--pretrained", help="score: weights of a named open_clip model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="score: cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="score: torch threads (default: 1)")
    parser.add_argument(
        "--min-similarity", type=float, help="apply: LAION kept 0.28 and more (CLIP ViT-B/32)"
    )
    parser.add_argument("--output", type=Path, help="apply: the new data set")
    parser.add_argument("--task-index", type=int, default=0, help="this task, from 0 (default: 0)")
    parser.add_argument("--num-tasks", type=int, default=1, help="tasks that share the work (default: 1)")
    arguments = parser.parse_args(argv)
    configure()
    if not 0 <= arguments.task_index < arguments.num_tasks:
        raise UserError(
            f"--task-index must be between 0 and {arguments.num_tasks - 1}, found {arguments.task_index}"
        )
    if arguments.step == "score":
        if arguments.encoder is None:
            raise UserError("score needs --encoder: a CLIP folder or name")
        score(arguments)
        return 0
    if len(arguments.folders) != 1 or arguments.output is None or arguments.min_similarity is None:
        raise UserError("apply takes one DIR, --min-similarity, and --output, the folder of the new data set")
    is_done = apply(arguments)
    get_logger().info("%s: %s", arguments.output, "complete" if is_done else "other tasks are not done yet")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
