"""What the loader hands to a stage: `Batch` (language stages), `ConditionBatch` (image stages), and `LossTerm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlgpt.images import planar

ImageKind = Literal["patches", "visual", "pixels"]
_NUM_DIMS: dict[str, int] = {"patches": 3, "visual": 3, "pixels": 4}

T = TypeVar("T")


def normalised(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels as encoders and losses take them, on whatever device they are: uint8 (...) -> (...) in [-1, 1].

    Computed in fp32 and then cast, so that fp32 results are bit-identical on every device.
    """
    # A tensor on the device: dividing by a Python number, CUDA multiplies by its reciprocal, which rounds differently.
    divisor = torch.full((), 127.5, device=pixels.device)
    return pixels.to(torch.float32).div_(divisor).sub_(1.0).to(dtype)


def to_pixels(squares: Sequence[np.ndarray] | np.ndarray) -> Tensor:
    """M images of (H, W, 3) uint8, in a list or an array -> (M, 3, H, W) float32 in [-1, 1]."""
    return normalised(torch.from_numpy(planar(squares)))


def map_parts(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with every part of this kind replaced, in a (nested) dataclass too."""
    if isinstance(value, kind):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: map_parts(getattr(value, f.name), kind, function) for f in fields(value)}
        )
    return value


def to_device(value: T, device: torch.device | str, dtype: torch.dtype | None = None) -> T:
    """Move every tensor of a (nested) dataclass; cast floating ones to `dtype`, which DeepSpeed does for no dataclass.

    Pixels, the only uint8 tensors of a batch, are normalised: on the device, since uint8 is a quarter of the bytes.
    """

    def moved(tensor: Tensor) -> Tensor:
        # In its own type first: a tensor that is cast on the way is copied synchronously.
        tensor = tensor.to(device=device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            return normalised(tensor, dtype or torch.float32)
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    result: T = map_parts(value, Tensor, moved)
    return result


def tensors_of(value: object) -> list[Tensor]:
    """Every tensor of a (nested) dataclass; lists and dicts are not searched."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_parts(value, Tensor, note)
    return found


def segment_starts(segment_ids: Tensor) -> Tensor:
    """Where a packed sequence or the padding begins: (B, L) -> (B, L) bool. Rows never share a sequence."""
    is_start = torch.ones_like(segment_ids, dtype=torch.bool)
    is_start[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return is_start


@dataclass(frozen=True)
class ImageInput:
    """M images in reading order, tagged by kind: patches (M, P, C) | visual (M, N, d) | pixels (M, 3, H, W).

    Pixels are uint8 until `to_device` brings them to [-1, 1].
    """

    kind: ImageKind
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != _NUM_DIMS[self.kind]:
            raise ValueError(
                f"{self.kind} need {_NUM_DIMS[self.kind]} dimensions, found shape {tuple(self.values.shape)}"
            )

    def __len__(self) -> int:
        return self.values.shape[0]


@dataclass(frozen=True)
class Batch:
    """Packed token rows. B rows, L positions, M images, N visual embeddings per image.

    `is_target` marks the position whose own content is predicted from the position before; the shift by one happens in
    `models/losses.py` and nowhere else. Segment 0 is padding; attention never crosses segments.
    """

    token_ids: Tensor  # (B, L) int64; visual positions hold a placeholder
    segment_ids: Tensor  # (B, L) int32; 0 = padding, 1.. = packed sequence
    position_ids: Tensor  # (B, L) int64; restart at 0 in every segment
    is_visual: Tensor  # (B, L) bool; runs of exactly N; the sum is M * N
    is_target: Tensor  # (B, L) bool
    source_ids: Tensor  # (B, L) int16; for losses per source
    images: ImageInput | None  # in reading order over the rows; None when the batch has no image
    documents: tuple[tuple[str, ...], ...]  # document ids of each row, to name bad ones
    num_visual: int  # N

    def validate(self) -> None:
        """Check the laws above on CPU. Raises ValueError with the offending counts."""
        shape = tuple(self.token_ids.shape)
        for name in ("segment_ids", "position_ids", "is_visual", "is_target", "source_ids"):
            if (found := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(f"{name} has shape {found}, token_ids {shape}")
        num_images = 0 if self.images is None else len(self.images)
        num_positions = int(self.is_visual.sum())
        if num_positions != num_images * self.num_visual:
            raise ValueError(
                f"{num_positions} visual positions for {num_images} images of {self.num_visual} embeddings "
                f"(documents {self.documents})"
            )
        self._validate_runs()
        is_start = segment_starts(self.segment_ids)
        if bool((self.is_target & is_start).any()):
            raise ValueError("a segment's first position is a target: no position before it predicts it")
        if bool((self.is_target & (self.segment_ids == 0)).any()):
            raise ValueError("padding positions are marked as targets")
        if bool((self.position_ids[is_start] != 0).any()):
            raise ValueError("position_ids do not restart at 0 in every segment")
        step = self.position_ids[:, 1:] - self.position_ids[:, :-1]
        if bool(((step != 1) & ~is_start[:, 1:]).any()):
            raise ValueError("position_ids do not count up by one inside a segment")

    def _validate_runs(self) -> None:
        before = torch.zeros_like(self.is_visual)
        before[:, 1:] = self.is_visual[:, :-1]
        starts = (self.is_visual & ~before).nonzero()
        if len(starts) * self.num_visual != int(self.is_visual.sum()):
            raise ValueError(f"visual positions do not come in runs of {self.num_visual}")
        offsets = torch.arange(self.num_visual)
        rows, columns = starts[:, :1], starts[:, 1:] + offsets
        if len(starts) and (
            columns.max() >= self.is_visual.shape[1] or not bool(self.is_visual[rows, columns].all())
        ):
            raise ValueError(f"visual positions do not come in runs of {self.num_visual}")
        if len(starts) and bool(
            (self.segment_ids[rows, columns] != self.segment_ids[rows, starts[:, 1:]]).any()
        ):
            raise ValueError("an image crosses a segment border")

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True)
class ConditionBatch:
    """Images with what a diffusion decoder would be conditioned on (stage 1), or pixels and captions (demo parts).

    B samples; P patches of width C; image condition (Kv, Dv), text condition (Kt, Dt). Fields that a stage computes
    online, or does not use, are None. `is_valid` is False for a masked slot (a sample that could not be read).
    """

    documents: tuple[str, ...]
    source_ids: Tensor  # (B,) int16
    is_valid: Tensor  # (B,) bool
    has_text: Tensor  # (B,) bool; image-only data trains stage 1 too
    captions: tuple[str, ...] = ()
    pixels: Tensor | None = None  # (B, 3, H, W); uint8 until `to_device` brings them to [-1, 1]
    patches: Tensor | None = None  # (B, P, C)
    image_condition: Tensor | None = None  # (B, Kv, Dv), e_v
    text_condition: Tensor | None = None  # (B, Kt, Dt), e_t

    def validate(self) -> None:
        """Raises ValueError when batch sizes differ."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and value.shape[0] != len(self.documents):
                raise ValueError(f"{f.name} has {value.shape[0]} rows for {len(self.documents)} documents")

    def require(self, name: str) -> Tensor:
        """The tensor `name`; raises ValueError that says how to provide it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this stage needs {name} in its batches: list it under `data.features`")
        if value.dtype == torch.uint8:
            raise ValueError(f"{name} are still uint8: bring the batch to its device first (`to_device`)")
        return value


class LossTerm(NamedTuple):
    """A sum over targets, never a mean: the loop divides by the count over all ranks and micro-batches.

    `count` must equal what the stage's `count_targets` gives for the same batch. `by_source` holds per-source (sum,
    count) pairs for the log, `(2, num_sources)`, detached.


    """

    # A named tuple, because DeepSpeed looks for tensors in tuples, lists and dictionaries only. It puts its
    # before-backward hook on the losses that it finds; without the hook, ZeRO-1 in bf16 and offloading accumulate
    # wrongly.

    total: Tensor
    weight: float = 1.0
    by_source: Tensor | None = None
