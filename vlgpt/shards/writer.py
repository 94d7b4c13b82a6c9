"""Writes one shard so that a kill at any moment leaves either the complete shard or none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from webdataset import TarWriter

BLOCK_BYTES = 512
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
    samples only. No file has its final name before `close`, which writes index and report first and
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
        # fixed owner, mode and time, so that the bytes depend on the samples only
        self._tar = load_tar_writer()(
            self._file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False
        )

    def add(
        self, document: Document, images: Sequence[tuple[str, bytes]], *, dropped_images: Sequence[str] = ()
    ) -> str:
        """Write the next record as a sample and return its key; `images` are (suffix, encoded bytes) in document order.

        `dropped_images` are the reasons of images that the document lost on the way.

        Raises UnstorableDocument, with nothing written, for text that is no Unicode, and ValueError when images and
        image parts do not match or a suffix is unknown.
        """
        if len(images) != document.num_images:
            raise ValueError(
                f"document {document.id!r} has {document.num_images} image parts but {len(images)} images "
                "were given"
            )
        key = sample_key(self.shard, record=self.num_records)
        record = _record_bytes(document)
        members = [self._write_member(key, "json", "json", record)]
        for number, (suffix, data) in enumerate(images):
            if suffix not in IMAGE_SUFFIXES:
                raise ValueError(
                    f"document {document.id!r}: image suffix {suffix!r}; valid: {', '.join(IMAGE_SUFFIXES)}"
                )
            members.append(self._write_member(key, f"{number}.{suffix}", suffix, data))
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
        self._tar.close()
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
        # an older version must never lie beside the report of the new one
        final.unlink(missing_ok=True)
        write_atomic(self.folder / f"{self.name}.idx", index.save_bytes())
        write_atomic(self.folder / f"{self.name}.json", report.model_dump_json(indent=1))
        os.replace(self._partial, final)
        fsync_folder(self.folder)
        self._file.close()
        return report

    def abort(self) -> None:
        """Forget everything written so far."""
        self._partial.unlink(missing_ok=True)
        self._file.close()

    def _write_member(self, key: str, name: str, suffix: str, data: bytes) -> Member:
        """One member `KEY.NAME`. One call for each: webdataset sorts the members of a call by name."""
        if len(data) >= MAX_MEMBER_BYTES:
            raise ValueError(
                f"member {key}.{name} has {len(data)} bytes; the tar format ends at {MAX_MEMBER_BYTES}"
            )
        offset = self._tar.tarstream.offset + BLOCK_BYTES
        self._tar.write({"__key__": key, name: data})
        # tarfile remembers every member: memory stays flat without
        self._tar.tarstream.members = []
        return Member(suffix, offset, len(data), crc32(data))


@cache
def load_tar_writer() -> type[TarWriter]:
    """webdataset's writer. Its import loads torch (seconds, 200 MB): a process calls this before it forks workers."""
    from webdataset import TarWriter

    writer: type[TarWriter] = TarWriter
    return writer


def _record_bytes(document: Document) -> bytes:
    try:
        return json.dumps(document.to_record(), ensure_ascii=False, separators=(",", ":")).encode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
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
        """Append. After `close` nothing: a tar that was given up writes its last block when it is collected."""
        if self._file.closed:
            return
        self._digest.update(data)
        self.num_bytes += len(data)
        self._file.write(data)

    def finish(self) -> tuple[int, str]:
        """Everything is on disk: -> its number of bytes and sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.num_bytes, self._digest.hexdigest()

    def close(self) -> None:
        """Give up the file and its lock."""
        self._file.close()
