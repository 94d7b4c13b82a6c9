"""Images by file name or URL: in folders, in tars, in what img2dataset downloaded.

Tars are scanned once, by their headers; the table (24 bytes an image, and as much again for URLs) is kept
beside them and memory-mapped, so that 10^8 images can be joined and all processes share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.sources.base import ImageOpener
from data_prep.sources.inputs import kept_arrays
from data_prep.sources.records import table_batches, table_layout
from vlgpt.errors import UserError
from vlgpt.image_formats import IMAGE_SUFFIXES
from vlgpt.images import BadImage
from vlgpt.log import get_logger
from vlgpt.shards.index import TarMembers, list_tar_members, read_tar_member


class ImageFinder:
    """Finds images below these paths: folders of image files, tars, folders of tars.

    Raises UserError for a path that is none of these.
    """

    def __init__(self, paths: Sequence[Path]):
        self._folders: list[Path] = []
        self._tables: list[ImageTable] = []
        for path in paths:
            tars = sorted(path.glob("*.tar")) if path.is_dir() else [path]
            if path.is_dir() and not tars:
                self._folders.append(path)
            elif path.is_dir() or (path.suffix == ".tar" and path.is_file()):
                self._tables.append(ImageTable(tars))
            else:
                raise UserError(f"pictures are looked up in folders and .tar files; {path} is neither")

    def by_name(self, *names: str) -> ImageOpener:
        """The image under the first of these names that is there; leading folders of a name may be missing.

        Raises BadImage(`missing_file`), or BadImage(`path_outside_folder`) for names that lead out of it.
        """
        for name in names:
            for tail in _tails(name):
                for folder in self._folders:
                    if os.path.isfile(folder / tail):
                        return folder / tail
                for table in self._tables:
                    if (found := table.find(f"name:{tail}")) is not None:
                        return found
        raise BadImage("missing_file", " or ".join(names))

    def find_url(self, url: str) -> ImageOpener | None:
        """The image that img2dataset downloaded from this URL, None if there is none."""
        for table in self._tables:
            if (found := table.find(f"url:{url}")) is not None:
                return found
        return None


def _tails(name: str) -> Iterator[str]:
    """a/b/c.jpg -> a/b/c.jpg, b/c.jpg, c.jpg. Raises BadImage(`path_outside_folder`)."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise BadImage("path_outside_folder", name)
    return ("/".join(parts[start:]) for start in range(len(parts)))


class ImageTable:
    """Where the images of some tars lie, by the hash of their names and URLs."""

    def __init__(self, tars: Sequence[Path]):
        self._tars = tars
        self._arrays = self._kept()  # before any process is forked, so that all share it

    def find(self, name: str) -> ImageOpener | None:
        """The image under `name:...` or `url:...`; of several the first in order of tars."""
        hashes, tar, offset, size = self._arrays
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(hashes, wanted))
        if place == len(hashes) or hashes[place] != wanted:
            return None
        return partial(read_tar_member, self._tars[tar[place]], int(offset[place]), int(size[place]))

    def _kept(self) -> list[np.ndarray]:
        digest = hashlib.blake2b(digest_size=12)
        for tar in self._tars:
            for file in (tar, tar.with_suffix(".parquet")):
                stat = file.stat() if file.is_file() else None
                digest.update(f"{file.name}|{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return kept_arrays(
            self._tars[0].parent / "pictures",
            kind="table",
            names=("hash", "tar", "offset", "size"),
            make=self._scan,
            stamp=digest.hexdigest(),
        )

    def _scan(self) -> list[np.ndarray]:
        get_logger(__name__).info("looking through %d tars of images once", len(self._tars))
        columns: list[list[np.ndarray]] = [[], [], [], []]
        for number, tar in enumerate(self._tars):
            members = list_tar_members(tar)
            if not members.is_complete:
                get_logger(__name__).warning("%s is cut; what lies before the cut is used", tar)
            known, places = _names_of(tar, members)
            columns[0].append(np.array(known, np.uint64))
            columns[1].append(np.full(len(known), number, np.uint32))
            columns[2].append(members.offsets[places])
            columns[3].append(members.sizes[places].astype(np.uint32))
        joined = [np.concatenate(column) for column in columns]
        hashes, first = np.unique(joined[0], return_index=True)  # of equal ones the first
        return [hashes, *(column[first] for column in joined[1:])]


def _names_of(tar: Path, members: TarMembers) -> tuple[list[int], list[int]]:
    """Hash of every name and URL of the images in one tar, and the number of its member."""
    hashes, places, place_of = [], [], {}
    for place, name in enumerate(members.names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            place_of[stem] = place
            for known_as in {name.removeprefix("./"), name.rpartition("/")[2]}:
                hashes.append(_hash(f"name:{known_as}"))
                places.append(place)
    for key, url in _urls(tar, members):
        if key in place_of:
            hashes.append(_hash(f"url:{url}"))
            places.append(place_of[key])
    return hashes, places


def _urls(tar: Path, members: TarMembers) -> Iterator[tuple[str, str]]:
    """(key, url) of img2dataset's samples: from the table beside the tar, else from the JSON members."""
    table = tar.with_suffix(".parquet")
    if table.is_file():
        if {"key", "url"} <= set(table_layout(table)[0]):
            for batch in table_batches(table, ("key", "url")):
                yield from _strings(zip(batch["key"].to_pylist(), batch["url"].to_pylist()))
        return
    for place, name in enumerate(members.names):
        if name.endswith(".json"):
            data = read_tar_member(tar, int(members.offsets[place]), int(members.sizes[place]))
            try:
                record = json.loads(data)
            except (ValueError, RecursionError):
                continue  # an image without its URL can still be found by name
            if isinstance(record, dict):
                yield from _strings([(name.removesuffix(".json"), record.get("url"))])


def _strings(pairs: Iterable[tuple[object, object]]) -> Iterator[tuple[str, str]]:
    return ((key, url) for key, url in pairs if isinstance(key, str) and isinstance(url, str))


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
