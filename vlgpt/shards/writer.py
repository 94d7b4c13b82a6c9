"""Writes one shard so that a kill at any moment leaves either the whole shard or none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlgpt.document import Document
from vlgpt.files import fsync_folder, open_locked, write_atomic
from vlgpt.shards.index import IndexBuilder, Member, crc32
from vlgpt.shards.schema import (
    IMAGE_SUFFIXES,
    MAX_RECORDS_PER_SHARD,
    MAX_SHARDS,
    ShardReport,
    TextTokenizer,
    UnstorableDocument,
)

BLOCK_BYTES, RECORD_BYTES = 512, 10240
MAX_MEMBER_BYTES = 8 << 30


def shard_name(shard: int) -> str:
    """`7 -> "00007"`."""
    if not 0 <= shard < MAX_SHARDS:
        raise ValueError(
            f"shard numbers go from 0 to {MAX_SHARDS - 1}, found {shard}; use a larger shard size"
        )
    return f"{shard:05d}"


def sample_key(shard: int, *, record: int) -> str:
    """`(7, 42) -> "0000700042"`: the shard and the record's place in the shard's input range."""
    if not 0 <= record < MAX_RECORDS_PER_SHARD:
        raise ValueError(f"record numbers go from 0 to {MAX_RECORDS_PER_SHARD - 1}, found {record}")
    return f"{shard_name(shard)}{record:05d}"


class ShardWriter:
    """Shard number `shard` of `folder`, made from the input records `first_record, first_record + 1, ...`.

    Every input record is given either to `add` or to `drop`, in order. The bytes of the tar depend on the
    samples only. Nothing stands under a final name before `close`, which writes index and report first and
    renames the tar last: a tar under its final name always has a valid report and index beside it.
    """

    def __init__(
        self,
        folder: Path,
        shard: int,
        *,
        first_record: int = 0,
        build: str = "",
        tokenizer: TextTokenizer | None = None,
    ):
        self.folder, self.shard, self.name = folder, shard, shard_name(shard)
        self.first_record, self.build = first_record, build
        self.num_records = 0
        self._dropped: dict[str, list[int]] = {}
        self._dropped_images: dict[str, list[int]] = {}
        self._index = IndexBuilder(tokenizer)
        self._partial = folder / f".{self.name}.tar.partial"
        self._file = _HashingFile(self._partial)

    def add(
        self, document: Document, images: Sequence[tuple[str, bytes]], *, dropped_images: Sequence[str] = ()
    ) -> str:
        """Write the next record as a sample and return its key; `images` are (suffix, encoded bytes) in
        document order.

        `dropped_images` are the reasons of images that the document lost on the way.

        Raises UnstorableDocument, with nothing written, for text that is no Unicode, and ValueError when
        images and image parts do not match or a suffix is unknown.
        """
        if len(images) != document.num_images:
            raise ValueError(
                f"document {document.id!r} has {document.num_images} image parts but {len(images)} images "
                "were given"
            )
        key = sample_key(self.shard, record=self.num_records)
        record = _record_bytes(document)
        members = [self._write_member(key, "json", record)]
        for number, (suffix, data) in enumerate(images):
            if suffix not in IMAGE_SUFFIXES:
                raise ValueError(
                    f"document {document.id!r}: image suffix {suffix!r}; valid: {', '.join(IMAGE_SUFFIXES)}"
                )
            members.append(self._write_member(f"{key}.{number}", suffix, data))
        self._index.add(key, document, members)
        for reason in dropped_images:
            self._dropped_images.setdefault(reason, []).append(self.num_records)
        self.num_records += 1
        return key

    def drop(self, reason: str) -> None:
        """Count the next record as dropped."""
        self._dropped.setdefault(reason, []).append(self.num_records)
        self.num_records += 1

    def close(self) -> ShardReport:
        """Make the shard visible and return its report."""
        self._file.write(bytes(BLOCK_BYTES * 2))  # two empty blocks end a tar
        self._file.write(bytes(-self._file.num_bytes % RECORD_BYTES))
        num_bytes, sha256 = self._file.finish()
        index = self._index.build(tar_sha256=sha256)
        report = ShardReport(
            name=self.name,
            first_record=self.first_record,
            num_records=self.num_records,
            num_samples=index.num_samples,
            num_images=index.num_images,
            dropped={reason: len(records) for reason, records in sorted(self._dropped.items())},
            dropped_records={reason: tuple(records) for reason, records in sorted(self._dropped.items())},
            dropped_images={name: tuple(records) for name, records in sorted(self._dropped_images.items())},
            num_bytes=num_bytes,
            sha256=sha256,
            first_key=str(index.keys[0]) if index.num_samples else "",
            last_key=str(index.keys[-1]) if index.num_samples else "",
            build=self.build,
        )
        final = self.folder / f"{self.name}.tar"
        final.unlink(missing_ok=True)  # an older version must never stand beside the report of the new one
        write_atomic(self.folder / f"{self.name}.idx", index.save_bytes())
        write_atomic(self.folder / f"{self.name}.json", report.model_dump_json(indent=1).encode())
        os.replace(self._partial, final)
        fsync_folder(self.folder)
        self._file.close()
        return report

    def abort(self) -> None:
        """Forget everything written so far."""
        self._partial.unlink(missing_ok=True)
        self._file.close()

    def _write_member(self, stem: str, suffix: str, data: bytes) -> Member:
        self._file.write(_tar_header(f"{stem}.{suffix}", size=len(data)))
        offset = self._file.num_bytes
        self._file.write(data)
        self._file.write(bytes(-len(data) % BLOCK_BYTES))
        return Member(suffix, offset, len(data), crc32(data))


def _tar_header(name: str, *, size: int) -> bytes:
    """The ustar header that tarfile writes for a regular file with its default owner, mode and time.

    Written by hand because tarfile spends more time on a header than the disk on a small picture.
    """
    if size >= MAX_MEMBER_BYTES:
        raise ValueError(f"member {name} has {size} bytes; the tar format ends at {MAX_MEMBER_BYTES}")
    fields = (
        *(name.encode("ascii").ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0"),
        *(b"%011o\0" % size, b"00000000000\0", b" " * 8, b"0", bytes(100), b"ustar\0", b"00"),
    )
    header = b"".join(fields).ljust(BLOCK_BYTES, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _record_bytes(document: Document) -> bytes:
    try:
        return json.dumps(document.to_record(), ensure_ascii=False, separators=(",", ":")).encode()
    except (UnicodeEncodeError, TypeError, ValueError) as error:
        raise UnstorableDocument(f"document {document.id!r}: {error}") from error


class _HashingFile:
    """A file that knows the sha256 of what was written to it; it belongs to one process at a time.

    The lock ends with its process, however it ends, so a restarted task waits for a worker that outlived the
    killed one.
    """

    def __init__(self, path: Path):
        self._file = open_locked(path)
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self.num_bytes += len(data)
        self._file.write(data)

    def finish(self) -> tuple[int, str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.num_bytes, self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()
