"""Precompute what frozen encoders give, beside the shards: `python -m data_prep.features DIR --features
patches,...`.

One array per shard and feature, written atomically and never twice: rerunning continues where a kill left
off. Every feature carries a FeatureSpec (encoder, weights hash, layer, preprocessing, shape), which training
compares.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlgpt import log, seeds
from vlgpt.data.pixels import read_square, to_pixels
from vlgpt.document import TextPart
from vlgpt.log import UserError
from vlgpt.models.augment import random_views
from vlgpt.models.encoders import ClipEncoder, hash_weights, load_clip
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.shards.features import has_feature_rows, write_feature_rows, write_spec
from vlgpt.shards.reader import ShardSet
from vlgpt.shards.schema import FeatureSpec

FEATURES = ("patches", "image_condition", "text_condition", "visual")
PER = {"patches": "image", "image_condition": "image", "visual": "image", "text_condition": "text"}


@dataclass(frozen=True)
class Job:
    """One feature to compute: how to encode a batch, and the spec that names it."""

    spec: FeatureSpec
    encoder: ClipEncoder
    tokenizer: ImageTokenizer | None
    seed: int

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """All views of a batch; view 0 is clean: (B, 3, H, W) -> (B, views, *shape)."""
        views = [pixels] + [random_views(pixels, generator) for _ in range(self.spec.views - 1)]
        encoded = [self.encoder.patches(view) for view in views]
        if self.tokenizer is not None:
            encoded = [self.tokenizer.encode(patches) for patches in encoded]
        return torch.stack(encoded, dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> (B, 1, Kt, Dt)."""
        return self.encoder.text_states(texts)[:, None]


def make_job(
    name: str, encoder: ClipEncoder, arguments: argparse.Namespace, tokenizer: ImageTokenizer | None
) -> Job:
    """Probe the encoder for its shape and describe the feature. Raises UserError when `visual` lacks its
    tokenizer.
    """
    if name == "visual" and tokenizer is None:
        raise UserError(
            "feature 'visual' needs --image-tokenizer: the image_tokenizer folder that stage 1 wrote"
        )
    views = arguments.views if name in ("patches", "visual") else 1
    used = tokenizer if name == "visual" else None
    with torch.no_grad():
        if PER[name] == "text":
            shape = tuple(encoder.text_states(["a"]).shape[1:])
        else:
            patches = encoder.patches(torch.zeros(1, 3, encoder.image_size_px, encoder.image_size_px))
            shape = tuple((used.encode(patches) if used is not None else patches).shape[1:])
    weights = hash_weights(encoder) + (f"+{hash_weights(used)}" if used is not None else "")
    spec = FeatureSpec(
        name=name,  # type: ignore[arg-type]
        encoder=f"{arguments.library}:{Path(arguments.encoder).name}",
        weights_hash=weights,
        layer=f"{arguments.layer}{'' if arguments.has_cls else ' without CLS'}"
        if PER[name] == "image"
        else "final",
        preprocessing=encoder.preprocessing,
        shape=shape,
        dtype=arguments.dtype,
        views=views,
        per=PER[name],  # type: ignore[arg-type]
    )
    return Job(spec, encoder, used, arguments.seed)


def read_images(shards: ShardSet, shard: int, size_px: int) -> Iterator[np.ndarray]:
    """All pictures of a shard in row order, (size, size, 3) uint8."""
    for sample in range(shards.index(shard).num_samples):
        for data in shards.read(shard, sample).images:
            yield read_square(data, size_px=size_px, decoder="pillow")


def read_texts(shards: ShardSet, shard: int) -> Iterator[str]:
    """All text parts of a shard in row order."""
    for sample in range(shards.index(shard).num_samples):
        for part in shards.read(shard, sample).document.parts:
            if isinstance(part, TextPart):
                yield part.text


def in_batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def compute_shard(job: Job, shards: ShardSet, shard: int, *, batch_size: int, device: str) -> np.ndarray:
    """Rows of one shard: -> (rows, views, *shape) float32."""
    name = shards.shards[shard].name
    rows = []
    if job.spec.per == "text":
        for texts in in_batches(read_texts(shards, shard), batch_size):
            rows.append(job.encode_texts(texts).float().cpu().numpy())
    else:
        generator = seeds.torch_generator(job.seed, "views", shards.name, name)
        for images in in_batches(read_images(shards, shard, job.encoder.image_size_px), batch_size):
            pixels = to_pixels(np.stack(images)).to(device)
            rows.append(job.encode_pixels(pixels, generator).float().cpu().numpy())
    if not rows:
        return np.zeros((0, job.spec.views, *job.spec.shape), np.float32)
    return np.concatenate(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path, nargs="+", help="data set folders with shards")
    parser.add_argument(
        "--features", default="patches,image_condition,text_condition", help=f"of {', '.join(FEATURES)}"
    )
    parser.add_argument("--encoder", required=True, help="CLIP folder or name")
    parser.add_argument("--library", choices=("open_clip", "transformers"), default="open_clip")
    parser.add_argument("--pretrained", help="weights of a named open_clip model")
    parser.add_argument(
        "--layer", type=int, default=-2, help="hidden layer of patch features (default: penultimate)"
    )
    parser.add_argument("--drop-cls", dest="has_cls", action="store_false", help="leave the class token out")
    parser.add_argument(
        "--image-tokenizer", type=Path, help="image_tokenizer folder of stage 1 (feature visual)"
    )
    parser.add_argument("--dtype", choices=("float16", "float32", "int8"), default="float16")
    parser.add_argument(
        "--views", type=int, default=1, help="views per picture: the clean one and augmented ones"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on CPU")
    parser.add_argument("--task-index", type=int, default=0, help="this task of an array")
    parser.add_argument("--num-tasks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.features = tuple(arguments.features.split(","))
    if unknown := set(arguments.features) - set(FEATURES):
        raise UserError(f"unknown feature {sorted(unknown)[0]!r}; valid: {', '.join(FEATURES)}")
    return arguments


def run(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing; prints pictures per second and bytes written."""
    log.configure()
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    encoder = load_clip(
        arguments.encoder,
        library=arguments.library,
        pretrained=arguments.pretrained,
        layer=arguments.layer,
        has_cls=arguments.has_cls,
    ).to(arguments.device)
    tokenizer = None
    if arguments.image_tokenizer is not None:
        tokenizer = ImageTokenizer.from_folder(arguments.image_tokenizer).eval().to(arguments.device)
    jobs = [make_job(name, encoder, arguments, tokenizer) for name in arguments.features]
    for folder in arguments.dir:
        compute_folder(folder, jobs, arguments)
    return 0


def compute_folder(folder: Path, jobs: Sequence[Job], arguments: argparse.Namespace) -> None:
    """All features of one data set; this task takes every `num_tasks`-th shard."""
    shards = ShardSet.open(folder)
    for job in jobs:
        write_spec(folder, job.spec)
        started, num_rows, num_bytes = time.monotonic(), 0, 0
        for number in range(arguments.task_index, len(shards.shards), arguments.num_tasks):
            record = shards.shards[number]
            if has_feature_rows(folder, job.spec.name, record.name, tar_sha256=record.sha256):
                continue
            rows = compute_shard(
                job, shards, number, batch_size=arguments.batch_size, device=arguments.device
            )
            write_feature_rows(folder, job.spec, record.name, rows, tar_sha256=record.sha256)
            num_rows += len(rows)
            num_bytes += rows.size * np.dtype(job.spec.dtype).itemsize
        seconds = max(time.monotonic() - started, 1e-9)
        per_row = f", {num_bytes / num_rows / 1e3:.1f} kB each" if num_rows else ""
        log.get_logger().info(
            "%s %s: %d rows of %s, %.0f rows/s%s",
            folder, job.spec.name, num_rows, "x".join(map(str, job.spec.shape)), num_rows / seconds, per_row,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(log.run_command(run))
