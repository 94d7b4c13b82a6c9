"""One feature of one shard: which encoder makes it, what it costs, and the rows themselves, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlgpt import seeds
from vlgpt.batch import to_pixels
from vlgpt.document import TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage, read_square
from vlgpt.models.augment import random_views
from vlgpt.models.encoders import Conditioner, hash_weights
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.shards import BadSample, FeatureSpec, FeatureWriter, ShardSet
from vlgpt.shards.features import has_feature_rows

PER = {"patches": "image", "image_condition": "image", "visual": "image", "text_condition": "text"}
HAS_VIEWS = ("patches", "visual")
Item = TypeVar("Item")


@dataclass(frozen=True)
class FeatureJob:
    """How to compute one feature, and the spec that names it."""

    spec: FeatureSpec
    encoder: Conditioner
    tokenizer: ImageTokenizer | None
    seed: int = 0
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        return self.encoder.mean.device

    @property
    def bytes_per_row(self) -> int:
        """On disk: int8 has one float32 scale for every vector."""
        num_vectors = self.spec.views * int(np.prod(self.spec.shape[:-1], dtype=np.int64))
        scale = num_vectors * 4 if self.spec.dtype == "int8" else 0
        return num_vectors * self.spec.shape[-1] * np.dtype(self.spec.dtype).itemsize + scale

    def flops_per_row(self) -> int:
        """Of computing one row, counted while one is computed on the CPU or GPU at hand."""
        with FlopCounterMode(display=False) as counter, _reference_attention():
            if self.spec.per == "text":
                self.encode_texts(["a"])
            else:
                size = self.encoder.image_size_px
                pixels = torch.zeros(1, 3, size, size, device=self.device)
                self.encode_pixels(pixels, seeds.torch_generator(0, "flops"))
        return counter.get_total_flops()

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """All views of a batch; view 0 is clean: (B, 3, H, W) -> (B, views, *shape)."""
        views = [pixels] + [random_views(pixels, generator) for _ in range(self.spec.views - 1)]
        with self._autocast():
            encoded = [self.encoder.image_condition(view) for view in views]
            if self.tokenizer is not None:
                encoded = [self.tokenizer.encode(patches) for patches in encoded]
        return torch.stack(encoded, dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> (B, 1, Kt, Dt)."""
        with self._autocast():
            return self.encoder.text_condition(texts)[:, None]

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))


@contextmanager
def _reference_attention() -> Iterator[None]:
    """Fused attention has no entry in torch's table of FLOPs: while counting, it is done product by product."""
    was_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)


def make_job(
    name: str,
    encoder: Conditioner,
    *,
    encoder_name: str,
    tokenizer: ImageTokenizer | None = None,
    dtype: str = "float16",
    views: int = 1,
    seed: int = 0,
    precision: str = "float32",
) -> FeatureJob:
    """Probe the encoder for its shape and describe the feature. Raises UserError when `visual` lacks its tokenizer."""
    if name == "visual" and tokenizer is None:
        raise UserError(
            "feature 'visual' needs --image-tokenizer: the image_tokenizer folder that stage 1 wrote"
        )
    used = tokenizer if name == "visual" else None
    with torch.no_grad():
        if PER[name] == "text":
            shape = tuple(encoder.text_condition(["a"]).shape[1:])
        else:
            size = encoder.image_size_px
            patches = encoder.image_condition(torch.zeros(1, 3, size, size, device=encoder.mean.device))
            shape = tuple((used.encode(patches) if used is not None else patches).shape[1:])
    spec = FeatureSpec(
        name=name,  # type: ignore[arg-type]
        encoder=encoder_name,
        weights_hash=hash_weights(encoder) + (f"+{hash_weights(used)}" if used is not None else ""),
        layer=encoder.layer_name if PER[name] == "image" else "final",
        preprocessing=encoder.preprocessing,
        shape=shape,
        dtype=dtype,  # type: ignore[arg-type]
        views=views if name in HAS_VIEWS else 1,
        per=PER[name],  # type: ignore[arg-type]
    )
    return FeatureJob(spec, encoder, used, seed, precision)


def compute_shard(
    job: FeatureJob,
    shards: ShardSet,
    shard: int,
    *,
    folder: Path,
    batch_size: int,
) -> int:
    """Store the rows of one shard unless they are there: -> rows made now."""
    record, index, name = shards.shards[shard], shards.index(shard), job.spec.name
    if has_feature_rows(folder, name, record.name, tar_sha256=record.sha256):
        return 0
    num_rows = index.num_images if job.spec.per == "image" else index.num_texts
    writer = FeatureWriter(folder, job.spec, record.name, num_rows=num_rows)
    try:
        if has_feature_rows(folder, name, record.name, tar_sha256=record.sha256):
            writer.abort()  # another process finished it while this one waited for the lock
            return 0
        for rows in _batches(job, shards, shard, batch_size):
            writer.add(rows.float().cpu().numpy())
        writer.close(tar_sha256=record.sha256)
        return num_rows
    except BaseException:
        writer.abort()
        raise


def _batches(job: FeatureJob, shards: ShardSet, shard: int, size: int) -> Iterator[torch.Tensor]:
    """(B, views, *shape) of `size` rows after the other."""
    if job.spec.per == "text":
        for texts in in_batches(read_texts(shards, shard), size):
            yield job.encode_texts(texts)
    else:
        generator = seeds.torch_generator(job.seed, "views", shards.name, shards.shards[shard].name)
        for images in in_batches(read_images(shards, shard, job.encoder.image_size_px), size):
            yield job.encode_pixels(to_pixels(np.stack(images)).to(job.device), generator)


def read_images(shards: ShardSet, shard: int, size_px: int) -> Iterator[np.ndarray]:
    """All images of a shard in row order, (size, size, 3) uint8. Raises UserError for a damaged one."""
    for sample in range(shards.index(shard).num_samples):
        try:
            for data in shards.read(shard, sample).images:
                yield read_square(data, size_px=size_px, decoder="pillow")
        except (BadSample, BadImage) as error:
            where = f"{shards.folder.where}: shard {shards.shards[shard].name}, sample {sample}"
            raise UserError(f"{where}: {error}; {shards.repair}") from error


def read_texts(shards: ShardSet, shard: int) -> Iterator[str]:
    """All text parts of a shard in row order. Raises UserError for a damaged record."""
    for sample in range(shards.index(shard).num_samples):
        try:
            parts = shards.read(shard, sample, with_images=False).document.parts
        except BadSample as error:
            raise UserError(f"{shards.folder.where}: {error}; {shards.repair}") from error
        yield from (part.text for part in parts if isinstance(part, TextPart))


def in_batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most `size` items."""
    while batch := list(islice(items, size)):
        yield batch
