"""Builds the columns of a ShardIndex sample by sample."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlgpt.document import Document
from vlgpt.shards.schema import ShardIndex, TextTokenizer, part_columns

try:  # the same checksum, an order of magnitude faster
    from isal.isal_zlib import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32


@dataclass(frozen=True)
class Member:
    """A file inside the tar: where its data lies."""

    suffix: str
    offset: int
    size: int
    crc: int


def crc32(data: bytes | memoryview) -> int:
    """Checksum of a member, checked at every read."""
    return _crc32(data)


@dataclass
class IndexBuilder:
    """Collects samples in order; `build` gives the index."""

    tokenizer: TextTokenizer | None = None
    keys: list[str] = field(default_factory=list)
    num_parts: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    is_image: list[bool] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_members: list[int] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    def add(self, key: str, document: Document, members: Sequence[Member]) -> None:
        """Append one sample; members are its record and then its images."""
        is_image, roles, tokens = part_columns(document, tokenizer=self.tokenizer)
        self.keys.append(key)
        self.num_parts.append(len(is_image))
        self.num_images.append(sum(is_image))
        self.is_image += is_image
        self.roles += roles
        self.tokens += tokens
        self.num_members.append(len(members))
        self.members += members

    def build(self, *, tar_sha256: str) -> ShardIndex:
        """The finished index of a tar with this hash."""
        num_texts = [parts - images for parts, images in zip(self.num_parts, self.num_images)]
        return ShardIndex(
            keys=np.array(self.keys, dtype=str),
            part_start=_starts(self.num_parts),
            part_is_image=np.array(self.is_image, dtype=bool),
            part_role=np.array(self.roles, dtype=np.uint8),
            part_tokens=np.array(self.tokens, dtype=np.int32),
            image_start=_starts(self.num_images),
            text_start=_starts(num_texts),
            member_start=_starts(self.num_members),
            member_offset=np.array([member.offset for member in self.members], dtype=np.int64),
            member_size=np.array([member.size for member in self.members], dtype=np.int64),
            member_crc=np.array([member.crc for member in self.members], dtype=np.uint32),
            member_suffix=np.array([member.suffix for member in self.members], dtype=str),
            tokenizer="" if self.tokenizer is None else self.tokenizer.fingerprint,
            tar_sha256=tar_sha256,
        )


def _starts(counts: list[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(counts)], dtype=np.int64)
