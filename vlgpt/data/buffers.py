"""Shared memory through which the batches of one worker reach the trainer.

A tensor that is sent as such takes a file in /dev/shm and a descriptor for as long as somebody holds it. These buffers
are one anonymous mapping instead, made before the worker is forked and used again and again: they need no descriptor,
they do not count against the size of /dev/shm, and pages that no batch has reached yet take no memory. What is taken
out of a buffer is ordinary memory, so that the buffer is free at once.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlgpt.batch import map_parts
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings

ALIGNMENT = 64  # bytes, a cache line
MAX_TENSORS = 16  # of a batch: what aligning them may cost
MAX_BUFFERS = 256  # per worker: as many orders fit into a pipe unread


def num_buffers(settings: DataSettings, *, batch_bytes: int) -> int:
    """How many batches a worker may have ready, at least 1: its share of them, limited by its share of the bytes."""
    share = -(-settings.prefetch_batches // settings.num_workers)
    fitting = settings.prefetch_bytes // settings.num_workers // max(batch_bytes, 1)
    return max(1, min(share, fitting, MAX_BUFFERS))


@dataclass(frozen=True)
class _Stored:
    """A tensor inside a buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Buffers:
    """`count` buffers that hold one batch of at most `batch_bytes` each. Raises UserError when there is no memory."""

    def __init__(self, count: int, *, batch_bytes: int):
        self.count, self._size = count, batch_bytes + MAX_TENSORS * ALIGNMENT
        try:
            self._memory = mmap.mmap(-1, count * self._size)
        except OSError as error:
            raise UserError(
                f"no memory for {count} batches of up to {self._size / 1e6:.1f} MB per data worker ({error.strerror}): "
                "lower data.prefetch_batches or micro_batch"
            ) from error

    def put(self, number: int, value: object) -> Any:
        """Copy the tensors of a (nested) dataclass into a buffer: -> the same with what `take` needs in their place.

        Raises ValueError when they do not fit.
        """
        start, end = number * self._size, (number + 1) * self._size

        def store(tensor: Tensor) -> _Stored:
            nonlocal start
            if start + tensor.nbytes > end:
                raise ValueError(f"a batch does not fit into its buffer of {self._size} bytes")
            stored = _Stored(start, tuple(tensor.shape), tensor.dtype)
            self._view(stored).copy_(tensor)
            start = -(-(start + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
            return stored

        return map_parts(value, Tensor, store)

    def take(self, value: object, *, pin_memory: bool) -> Any:
        """Copy what `put` stored into tensors of their own, in pinned memory if CUDA is to fetch them from there.

        Pinned memory is torch's, which gives a block again once it is free and the copies from it are done.
        """

        def load(stored: _Stored) -> Tensor:
            tensor = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=pin_memory)
            return tensor.copy_(self._view(stored))

        return map_parts(value, _Stored, load)

    def _view(self, stored: _Stored) -> Tensor:
        count = math.prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(self._memory, dtype=stored.dtype, count=count, offset=stored.offset)
        return flat.view(stored.shape)
