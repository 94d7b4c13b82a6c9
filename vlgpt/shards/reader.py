"""Opens a data set folder and reads any sample of any shard by number."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.files import expand_paths
from vlgpt.images import decode_image
from vlgpt.shards.cache import DEFAULT_CACHE_BYTES, LocalFolder, RemoteFolder, is_url
from vlgpt.shards.features import FeatureReader
from vlgpt.shards.foreign import ForeignFolder
from vlgpt.shards.index import crc32
from vlgpt.shards.manifest import MANIFEST, SUCCESS, Manifest, fingerprint, read_manifest
from vlgpt.shards.recent import Recent
from vlgpt.shards.samples import BadText, caption_of, pair_document
from vlgpt.shards.schema import BadSample, Sample, ShardIndex, ShardRecord, ShardReport
from vlgpt.shards.tars import TAR_SUFFIXES, find_tars

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
            if (local / MANIFEST).is_file():
                return cls._open_sealed(LocalFolder(local))
            if (local / "build.json").is_file():
                raise UserError(
                    f"{local} is not finished (no {MANIFEST}); run its python -m data_prep.build again"
                )
            given = expand_paths(local)
        else:
            given = [Path(os.path.abspath(tar)) for tar in path]
            local = Path(os.path.commonpath([tar.parent for tar in given])) if given else Path()
        for place in given:
            if not place.exists():
                raise FileNotFoundError(
                    f"data set {place} does not exist; build it with python -m data_prep.build"
                )
        tars = [tar for place in given for tar in (find_tars(place) if place.is_dir() else [place])]
        if not tars:
            raise UserError(
                f"{local} holds neither a {MANIFEST} nor a tar ({', '.join(TAR_SUFFIXES)}); it is not a data set"
            )
        root = local if local.is_dir() else Path(os.path.commonpath([tar.parent for tar in tars]))
        foreign = ForeignFolder(tars, root=root, cache_dir=cache_dir)
        return cls(
            foreign,
            name=(local if local.exists() else root).name or root.resolve().name,
            shards=foreign.records,
            manifest=None,
        )

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

    @property
    def repair(self) -> str:
        """For people: what to do about a sample that cannot be read."""
        where = self.folder.where
        if isinstance(self.folder, ForeignFolder):
            return f"leave it out: python -m data_prep.build img2dataset --input {where} --output NEW"
        return f"run python -m data_prep.check {where}"

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard (cached). Raises UserError when it does not fit the manifest."""
        return self._indexes.get(shard, self._open)[0]

    def _open(self, shard: int) -> tuple[ShardIndex, Layout]:
        record = self.shards[shard]
        try:
            index = self._load(shard)
        except (UserError, FileNotFoundError):
            if not isinstance(self.folder, ForeignFolder):
                raise
            index = self.folder.index_again(shard)
        return index, Layout.of(index, num_bytes=record.num_bytes)

    def _load(self, shard: int) -> ShardIndex:
        record, index = self.shards[shard], ShardIndex.load(self.index_path(shard))
        if index.tar_sha256 != record.sha256 or index.num_samples != record.num_samples:
            raise UserError(
                f"{self.folder.where}: the index of shard {record.name} belongs to another tar; run python "
                f"-m data_prep.index {self.folder.where}"
            )
        return index

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
                role = layout.roles[sample]
                caption = None if role == "image" else caption_of(role, data[0])
                document = pair_document(caption, key=key, source=self.name)
                images = images if caption is not None else tuple(data)
            else:
                document = Document.from_record(json.loads(data[0]))
        except BadText as error:
            raise BadSample(error.reason, key, record.name) from error
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
        `webdataset.warn_and_continue` does; without it BadImage or BadSample is raised.
        """
        import webdataset
        from webdataset.compat import FluidWrapper

        options = {} if handler is None else {"handler": handler}
        return (
            FluidWrapper(webdataset.SimpleShardList([str(shard) for shard in range(len(self.shards))]))
            .compose(webdataset.split_by_node, webdataset.split_by_worker, self._places)
            .map(self._decoded, **options)
        )

    def _places(self, shards: Iterable[dict[str, str]]) -> Iterator[tuple[int, int]]:
        """(shard, sample) of all samples of shards, which webdataset names by their `url`."""
        for shard in (int(shard["url"]) for shard in shards):
            yield from ((shard, sample) for sample in range(self.shards[shard].num_samples))

    def _decoded(self, place: tuple[int, int]) -> dict[str, object]:
        sample = self.read(*place)
        images = [decode_image(data) for data in sample.images]
        return {"__key__": sample.key, "document": sample.document, "images": images}

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


class BadMember(ValueError):
    """A member that cannot be had as it was written; `reason` names the fault."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Layout:
    """`samples` (n, 4): first member, end, start of the piece of the tar that holds them, its length.
    `members` (M, 3): offset, size, crc32. `roles`: what the first member of each sample is.
    """

    samples: np.ndarray
    members: np.ndarray
    roles: list[str]

    @staticmethod
    def of(index: ShardIndex, *, num_bytes: int) -> Layout:
        """The layout of a shard whose tar has `num_bytes`."""
        offset, size = index.member_offset, index.member_size
        members = np.stack([offset, size, index.member_crc.astype(np.int64)], axis=1)
        first, end = index.member_start[:-1], index.member_start[1:]
        if index.num_samples == 0:
            return Layout(np.empty((0, 4), np.int64), members, [])
        start = np.minimum.reduceat(offset, first)
        span = np.maximum.reduceat(offset + size, first) - start
        is_apart = span > np.add.reduceat(size, first) + MAX_GAP_BYTES * (end - first)
        is_outside = np.logical_or.reduceat((offset < 0) | (size < 0) | (offset + size > num_bytes), first)
        span = np.where(is_outside, _OUTSIDE, np.where(is_apart, _APART, span))
        roles = index.member_suffix[first].tolist()
        return Layout(np.stack([first, end, start, span], axis=1), members, roles)

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
