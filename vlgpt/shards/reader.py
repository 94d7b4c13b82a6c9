"""Opens a data set folder and reads any sample of any shard by number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.images import decode_image
from vlgpt.shards.cache import DEFAULT_CACHE_BYTES, LocalFolder, RemoteFolder, is_url
from vlgpt.shards.features import FeatureReader
from vlgpt.shards.foreign import TEXT_SUFFIXES, ForeignFolder, foreign_document, foreign_sample
from vlgpt.shards.index import crc32
from vlgpt.shards.manifest import MANIFEST, SUCCESS, Manifest, fingerprint, read_manifest
from vlgpt.shards.recent import Recent
from vlgpt.shards.schema import BadSample, Sample, ShardIndex, ShardRecord, ShardReport

if TYPE_CHECKING:
    from webdataset.compat import FluidWrapper

MAX_OPEN_TARS = 128
MAX_CACHED_INDEXES = 64
# between members that are read together: a tar header and its padding, with room for long names
MAX_GAP_BYTES = 4096
# instead of the length of a span
_APART, _OUTSIDE = -1, -2

StoredSample = tuple[Document, list[tuple[str, bytes]]]
"""A document and (suffix, encoded bytes) of its images."""


class ShardSet:
    """A data set: `num_samples` samples in shards, each readable in any order from any thread or forked worker."""

    def __init__(
        self,
        folder: LocalFolder | RemoteFolder | ForeignFolder,
        *,
        name: str,
        shards: Sequence[ShardRecord],
        manifest: Manifest | None,
    ):
        """Use `ShardSet.open`."""
        self.folder, self.name, self.shards, self.manifest = folder, name, tuple(shards), manifest
        self.num_samples = sum(shard.num_samples for shard in self.shards)
        self.num_images = sum(shard.num_images for shard in self.shards)
        self.fingerprint = fingerprint(self.shards)
        self._indexes: Recent[int, tuple[ShardIndex, Layout]] = Recent(MAX_CACHED_INDEXES)
        self._tars: Recent[int, _OpenTar] = Recent(MAX_OPEN_TARS)

    @classmethod
    def open(
        cls,
        path: str | Path | Sequence[str | Path],
        *,
        cache_dir: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> ShardSet:
        """Open a folder made by data_prep (local or an fsspec URL), or a folder or list of foreign webdataset tars.

        Raises FileNotFoundError, or UserError for an unfinished or damaged data set and for tars without usable
        samples.
        """
        if isinstance(path, (str, Path)):
            if is_url(str(path)):
                return cls._open_sealed(RemoteFolder(str(path), cache_dir=cache_dir, cache_bytes=cache_bytes))
            local = Path(path)
            if not local.exists():
                raise FileNotFoundError(
                    f"data set {local} does not exist; build it with python -m data_prep.build"
                )
            if (local / MANIFEST).is_file():
                return cls._open_sealed(LocalFolder(local))
            if (local / "build.json").is_file():
                raise UserError(
                    f"{local} is not finished (no {MANIFEST}); run its python -m data_prep.build again"
                )
            tars = sorted(local.glob("*.tar")) if local.is_dir() else [local]
        else:
            tars = [Path(tar) for tar in path]
            local = tars[0].parent if tars else Path()
        if not tars:
            raise UserError(f"{local} holds neither a {MANIFEST} nor a *.tar; it is not a data set")
        foreign = ForeignFolder(tars, index_dir=cache_dir)
        return cls(foreign, name=local.name, shards=foreign.records, manifest=None)

    @classmethod
    def _open_sealed(cls, folder: LocalFolder | RemoteFolder) -> ShardSet:
        try:
            manifest = read_manifest(folder.read(MANIFEST), where=f"{folder.where}/{MANIFEST}")
            folder.read(SUCCESS)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder.where} is not finished; run its python -m data_prep.build again ({error})"
            ) from error
        folder.expect({f"{shard.name}.tar": shard.sha256 for shard in manifest.shards})
        return cls(folder, name=manifest.name, shards=manifest.shards, manifest=manifest)

    @property
    def skipped(self) -> dict[str, int]:
        """Samples of foreign tars that have no place in the index, by reason; empty for our own data sets."""
        return self.folder.skipped if isinstance(self.folder, ForeignFolder) else {}

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard (cached). Raises UserError when it does not fit the manifest."""
        return self._indexes.get(shard, self._open)[0]

    def _open(self, shard: int) -> tuple[ShardIndex, Layout]:
        record = self.shards[shard]
        index = ShardIndex.load(self.index_path(shard))
        if index.tar_sha256 != record.sha256 or index.num_samples != record.num_samples:
            raise UserError(
                f"{self.folder.where}: the index of shard {record.name} belongs to another tar; run python "
                f"-m data_prep.index {self.folder.where}"
            )
        return index, Layout.of(index, num_bytes=record.num_bytes)

    def index_path(self, shard: int) -> Path:
        """Where the index file of a shard lies locally."""
        if isinstance(self.folder, ForeignFolder):
            return self.folder.index_path(shard)
        return self.folder.path(f"{self.shards[shard].name}.idx")

    def read(self, shard: int, sample: int, *, with_images: bool = True) -> Sample:
        """One sample; without its images only its record is read from the tar.

        Raises BadSample (damaged, missing or malformed data) and IndexError.
        """
        (index, layout), record = self._indexes.get(shard, self._open), self.shards[shard]
        if not 0 <= sample < index.num_samples:
            raise IndexError(f"shard {record.name} has {index.num_samples} samples, asked for {sample}")
        key = str(index.keys[sample])
        try:
            tar = self._tars.get(
                shard, self._open_tar
            )  # held until it is read: another thread may evict it from the cache
            data = layout.read(tar.descriptor, sample, with_images=with_images)
        except OSError as error:
            raise BadSample("unreadable_shard", key, record.name) from error
        except BadMember as error:
            raise BadSample(error.reason, key, record.name) from error
        images = tuple(data[1:])
        try:
            if isinstance(self.folder, ForeignFolder):
                suffix = str(index.member_suffix[index.member_start[sample]])
                caption, images = (data[0], images) if suffix in TEXT_SUFFIXES else (None, tuple(data))
                document = foreign_document(caption, suffix, key=key, source=self.name)
            else:
                document = Document.from_record(json.loads(data[0]))
        except UnicodeDecodeError as error:
            raise BadSample("text_not_utf8", key, record.name) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadSample("bad_record", key, record.name) from error
        if with_images and document.num_images != len(images):
            raise BadSample("image_count", key, record.name)
        return Sample(document, images if with_images else (), key)

    def feature(self, name: str) -> FeatureReader:
        """A precomputed feature. Raises UserError with the command that computes it when it is missing."""
        return FeatureReader(
            name,
            shards=[shard.name for shard in self.shards],
            locate=self.folder.path,
            index=self.index,
            where=self.folder.where,
        )

    def as_webdataset(self, *, handler: Callable[[Exception], bool] | None = None) -> FluidWrapper:
        """The samples in sequence, as a webdataset pipeline for training loops of your own.

        It gives dictionaries with `__key__`, `document` and `images` (PIL, RGB, in document order); shards are split
        over ranks and DataLoader workers. Go on with `.shuffle(1000).map(...)`. Samples of foreign tars
        that have no place in the index are left out. `handler` decides about damaged samples, as
        `webdataset.warn_and_continue` does; without it BadImage or ValueError is raised.
        """
        import webdataset
        from webdataset.compat import FluidWrapper
        from webdataset.tariterators import group_by_keys, tar_file_expander

        source = webdataset.SimpleShardList([f"{shard.name}.tar" for shard in self.shards])
        options = {} if handler is None else {"handler": handler}
        is_foreign = isinstance(self.folder, ForeignFolder)
        return (
            FluidWrapper(source)
            .compose(
                webdataset.split_by_node, webdataset.split_by_worker, partial(_open_streams, self.folder)
            )
            .compose(partial(tar_file_expander, **options), partial(group_by_keys, **options))
            .map(partial(_decoded, is_foreign=is_foreign, source=self.name), **options)
        )

    def _open_tar(self, shard: int) -> _OpenTar:
        name = f"{self.shards[shard].name}.tar"
        for _ in range(3):  # another process may evict a cached copy between its download and this open
            try:
                return _OpenTar(self.folder.path(name))
            except FileNotFoundError:
                continue
        return _OpenTar(self.folder.path(name))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to download these shards of a remote data set, in this order; nothing to do for a local one."""
        if not isinstance(self.folder, ForeignFolder):
            names = [self.shards[shard].name for shard in shards]
            self.folder.prefetch([f"{name}.{suffix}" for name in names for suffix in ("idx", "tar")])

    def close(self) -> None:
        """Close all files; reading opens them again."""
        self._tars.clear()


class _OpenTar:
    """A file descriptor that is closed when its last user lets go, so a thread never reads from a reused number."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open_streams(
    folder: LocalFolder | RemoteFolder | ForeignFolder, shards: Iterable[dict[str, str]]
) -> Iterator[dict[str, object]]:
    for shard in shards:
        with folder.path(shard["url"]).open("rb") as stream:
            yield {"url": shard["url"], "stream": stream}


def _decoded(fields: dict[str, bytes], *, is_foreign: bool, source: str) -> dict[str, object] | None:
    """Members grouped by key -> a document and its decoded images; None for what the index leaves out."""
    key = str(fields["__key__"])
    if is_foreign:
        try:
            sample = foreign_sample(fields, key=key, source=source)
        except BadSample:
            return None
        document, images = sample.document, list(sample.images)
    else:
        document = Document.from_record(json.loads(fields["json"]))
        numbered = {name.partition(".")[0]: data for name, data in fields.items() if name[0].isdigit()}
        images = [numbered[str(number)] for number in range(document.num_images)]
    return {"document": document, "images": [decode_image(data) for data in images]}


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


def read_stored_samples(
    folder: Path, report: ShardReport, *, with_incomplete: bool = False
) -> dict[int, StoredSample]:
    """Record place in the shard -> (document, [(suffix, bytes), ...]).

    Documents that lost an image in the build are left out unless `with_incomplete`. Raises UserError when the tar is
    damaged.
    """
    index = ShardIndex.load(folder / f"{report.name}.idx")
    layout = Layout.of(index, num_bytes=report.num_bytes)
    incomplete = {place for places in report.dropped_images.values() for place in places}
    samples: dict[int, StoredSample] = {}
    with (folder / f"{report.name}.tar").open("rb") as file:
        for sample, key in enumerate(index.keys.tolist()):
            place = int(key[-5:])
            if with_incomplete or place not in incomplete:
                try:
                    record, *images = layout.read(file.fileno(), sample, with_images=True)
                except BadMember as error:
                    raise UserError(
                        f"{folder}: shard {report.name}, sample {key}: {error}; remove the tar and run its build again"
                    ) from error
                first, end = index.member_start[sample : sample + 2].tolist()
                suffixes = index.member_suffix[first + 1 : end].tolist()
                samples[place] = Document.from_record(json.loads(record)), list(zip(suffixes, images))
    return samples
