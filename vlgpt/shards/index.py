"""Builds, rebuilds and retokenises the index of a tar, and lists the members of any tar from its headers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlgpt.document import Document, TextPart, text_places
from vlgpt.errors import UserError
from vlgpt.files import sha256_file
from vlgpt.shards.schema import ShardIndex, TextTokenizer, part_columns

try:  # the same checksum, an order of magnitude faster
    from isal.isal_zlib import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32

END_MARK = bytes(1024)


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


def retokenise(index: ShardIndex, documents: Iterator[Document], *, tokenizer: TextTokenizer) -> ShardIndex:
    """The same index with the token lengths of another tokenizer; `documents` are the shard's, in order."""
    tokens = np.zeros_like(index.part_tokens)
    position = 0
    for document in documents:
        for part, place in zip(document.parts, text_places([part.role for part in document.parts])):
            if isinstance(part, TextPart):
                tokens[position] = len(tokenizer.encode_text(part.text, place))
            position += 1
    if position != len(tokens):
        raise UserError(
            f"the documents have {position} parts, the index has {len(tokens)}; rebuild the index"
        )
    return dataclasses.replace(index, part_tokens=tokens, tokenizer=tokenizer.fingerprint)


def rebuild_index(tar: Path, *, tokenizer: TextTokenizer | None) -> ShardIndex:
    """Index one of our own tars from its content alone. Raises UserError when the tar itself is damaged."""
    builder = IndexBuilder(tokenizer)
    with tar.open("rb") as file:
        try:
            for key, members in _samples(tar, file.fileno()):
                record = os.pread(file.fileno(), members[0].size, members[0].offset)
                builder.add(key, Document.from_record(json.loads(record)), members)
        except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{tar} is damaged ({error}); remove it and run its build again") from error
    return builder.build(tar_sha256=sha256_file(tar))


def _samples(tar: Path, descriptor: int) -> Iterator[tuple[str, list[Member]]]:
    """(key, [record, images in order]) of every sample."""
    key = ""
    members: list[Member] = []
    for info in tar_headers(tar):
        stem, _, suffix = info.name.partition(".")
        data = os.pread(descriptor, info.size, info.offset_data)
        member = Member(suffix.rpartition(".")[2], info.offset_data, info.size, crc32(data))
        if suffix == "json":
            if members:
                yield key, members
            key, members = stem, [member]
        elif stem != key or suffix.partition(".")[0] != str(len(members) - 1):
            raise ValueError(f"member {info.name!r} does not follow its record")
        else:
            members.append(member)
    if members:
        yield key, members


def tar_headers(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of an uncompressed tar, in order. Raises OSError, and tarfile.TarError where the tar is damaged."""
    with tarfile.open(tar, mode="r:") as archive:
        for info in archive:
            yield info
            # tarfile remembers every member: memory stays flat without
            archive.members = []  # type: ignore[attr-defined]  # not in typeshed


@dataclass(frozen=True)
class TarMembers:
    """The complete regular files of one tar, in order. `names` are never to be used as paths."""

    names: tuple[str, ...]
    offsets: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64
    is_complete: bool
    """False for a tar that is cut or damaged: the members before the damage are listed. A tar without its end mark
    (two empty blocks) counts as cut: it may have been cut between two members.
    """


def list_tar_members(tar: Path) -> TarMembers:
    """Scan the headers of an uncompressed tar. Raises OSError when the file cannot be read."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    is_complete = True
    size = tar.stat().st_size
    try:
        for info in tar_headers(tar):
            if info.isreg() and not info.issparse():
                if info.offset_data + info.size > size:
                    is_complete = False
                    break
                names.append(info.name)
                places.append((info.offset_data, info.size))
    except (tarfile.TarError, EOFError):
        is_complete = False
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return TarMembers(tuple(names), offsets, sizes, is_complete and _has_end_mark(tar, size))


def _has_end_mark(tar: Path, size: int) -> bool:
    with tar.open("rb") as file:
        file.seek(max(0, size - len(END_MARK)))
        return file.read() == END_MARK


def read_tar_member(tar: Path, offset: int, size: int) -> bytes:
    """The bytes of one member. Raises OSError when the tar is gone or shorter than it was."""
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise OSError(f"{tar} ends inside a member: {len(data)} of {size} bytes at offset {offset}")
    return data
