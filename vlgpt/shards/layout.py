"""Where the members of every sample of a shard lie in its tar: computed once, so that reading one is little more than
the system call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from vlgpt.shards.index import crc32
from vlgpt.shards.schema import ShardIndex

MAX_GAP_BYTES = 4096  # between members read together: a tar header and its padding, with room for long names
_APART, _OUTSIDE = -1, -2  # instead of a span


class BadMember(ValueError):
    """A member that cannot be had as it was written; `reason` names the fault."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Layout:
    """`samples` (n, 4): first member, end, start of the piece of the tar that holds them, its length.
    `members` (M, 3): offset, size, crc32.
    """

    samples: np.ndarray
    members: np.ndarray

    @staticmethod
    def of(index: ShardIndex, *, num_bytes: int) -> Layout:
        """The layout of a shard whose tar has `num_bytes`."""
        offset, size = index.member_offset, index.member_size
        members = np.stack([offset, size, index.member_crc.astype(np.int64)], axis=1)
        first, end = index.member_start[:-1], index.member_start[1:]
        if index.num_samples == 0:
            return Layout(np.empty((0, 4), np.int64), members)
        start = np.minimum.reduceat(offset, first)
        span = np.maximum.reduceat(offset + size, first) - start
        is_apart = span > np.add.reduceat(size, first) + MAX_GAP_BYTES * (end - first)
        is_outside = np.logical_or.reduceat((offset < 0) | (size < 0) | (offset + size > num_bytes), first)
        span = np.where(is_outside, _OUTSIDE, np.where(is_apart, _APART, span))
        return Layout(np.stack([first, end, start, span], axis=1), members)

    def read(self, file: int, sample: int, *, with_images: bool) -> list[bytes]:
        """The members of a sample, checked: its record and its images. One request when they lie side by side, as in
        every tar that was written sample by sample.

        Raises BadMember (`bad_index`, `truncated_shard`, `checksum`) and OSError.
        """
        first, end, start, span = self.samples[sample].tolist()
        if span == _OUTSIDE:
            raise BadMember("bad_index")
        if not with_images:
            end, span = first + 1, _APART
        piece = os.pread(file, span, start) if span != _APART else b""
        found = []
        for offset, size, crc in self.members[first:end].tolist():
            if span == _APART:
                data = os.pread(file, size, offset)
            else:
                data = piece[offset - start : offset - start + size]
            if len(data) != size:
                raise BadMember("truncated_shard")
            if crc32(data) != crc:
                raise BadMember("checksum")
            found.append(data)
        return found
