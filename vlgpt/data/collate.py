"""Loaded samples -> `Batch` or `ConditionBatch`, padded and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlgpt.batch import Batch, ConditionBatch, ImageInput, ImageKind
from vlgpt.data.samples import LoadedCondition, LoadedSequence
from vlgpt.images import planar


def collate_rows(
    rows: Sequence[Sequence[LoadedSequence]], *, sequence_length: int, kind: ImageKind | None, num_visual: int
) -> Batch:
    """Sequences of every row, one after the other, then padding (segment 0).

    `kind=None`: no images. Raises ValueError when the batch is inconsistent (`Batch.validate`).
    """
    batch = collate_texts(rows, sequence_length=sequence_length, num_visual=num_visual)
    images = [loaded.images for row in rows for loaded in row if loaded.images is not None]
    batch = replace(batch, images=_image_input(kind, images))
    batch.validate()
    return batch


def collate_texts(
    rows: Sequence[Sequence[LoadedSequence]], *, sequence_length: int, num_visual: int
) -> Batch:
    """The batch but for its images: all that targets are counted from."""
    shape = (len(rows), sequence_length)
    token_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segment_ids, source_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int16)
    is_visual, is_target = np.zeros(shape, bool), np.zeros(shape, bool)
    for r, row in enumerate(rows):
        end = 0
        for number, loaded in enumerate(row, start=1):
            start, end = end, end + len(loaded.sequence.token_ids)
            at = (r, slice(start, end))
            token_ids[at], is_visual[at] = loaded.sequence.token_ids, loaded.sequence.is_visual
            is_target[at], segment_ids[at] = loaded.sequence.is_target, number
            position_ids[at], source_ids[at] = np.arange(end - start), loaded.source
        position_ids[r, end:] = np.arange(sequence_length - end)
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        is_visual=torch.from_numpy(is_visual),
        is_target=torch.from_numpy(is_target),
        source_ids=torch.from_numpy(source_ids),
        images=None,
        documents=tuple(tuple(loaded.document for loaded in row) for row in rows),
        num_visual=num_visual,
    )


def _image_input(kind: ImageKind | None, images: Sequence[np.ndarray]) -> ImageInput | None:
    if kind is None or not images:
        return None
    values = np.concatenate(images)
    return ImageInput(kind, torch.from_numpy(planar(values) if kind == "pixels" else values))


def collate_conditions(
    slots: Sequence[LoadedCondition | None], *, shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> ConditionBatch:
    """Samples, None for a masked slot: its tensors are zeros and `is_valid` is False.

    `shapes` names every array of the batch with its shape (without B) and dtype.
    """
    tensors = {name: _stack(slots, name, shape, dtype) for name, (shape, dtype) in shapes.items()}
    has_text = [slot is not None and bool(slot.caption) for slot in slots]
    batch = ConditionBatch(
        documents=tuple("" if slot is None else slot.document for slot in slots),
        source_ids=torch.tensor([0 if slot is None else slot.source for slot in slots], dtype=torch.int16),
        is_valid=torch.tensor([slot is not None for slot in slots]),
        has_text=torch.tensor(has_text),
        captions=tuple("" if slot is None else slot.caption for slot in slots),
        **tensors,
    )
    batch.validate()
    return batch


def _stack(
    slots: Sequence[LoadedCondition | None], name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Tensor:
    """One array of every slot: -> (B, ...); zeros where a slot has none."""
    empty = np.zeros(shape, dtype)
    values = [empty if slot is None else slot.arrays.get(name, empty) for slot in slots]
    if name == "pixels":
        return torch.from_numpy(planar(values))
    return torch.from_numpy(np.stack(values).astype(dtype, copy=False))
