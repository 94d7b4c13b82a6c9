"""Images by file name or URL: in folders, in tars and zip files, in what img2dataset downloaded.

Tars and zip files are scanned once, by their headers; the table (24 bytes an image, and as much again for URLs) is kept
beside them and memory-mapped, so that 10^8 images can be joined and all processes share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.sources.base import BadRecord, ImageOpener
from data_prep.sources.inputs import kept_arrays
from data_prep.sources.records import JSON_SUFFIXES, table_batches, table_layout
from data_prep.sources.zips import ZIP, list_zip_members, read_zip_member
from vlgpt.errors import UserError
from vlgpt.files import file_stamp
from vlgpt.image_formats import IMAGE_SUFFIXES
from vlgpt.images import BadImage
from vlgpt.log import get_logger
from vlgpt.shards.tars import (
    TAR_SUFFIXES,
    TarMembers,
    find_tars,
    list_tar_members,
    plain_tar,
    read_tar_member,
)

COCO_NAME = re.compile(r"(^|/)(COCO_(?P<year>(train|val|test)20\d\d)_)?(?P<number>\d{12}\.\w+)$")


class ImageFinder:
    """Finds images below these paths: folders of image files, tars, zip files, folders of these.

    Raises UserError for a path that is none of these.
    """

    def __init__(self, paths: Sequence[Path]):
        self._folders: list[Path] = []
        self._tables: list[ImageTable] = []
        for path in paths:
            archives = [*find_tars(path), *_zips(path)] if path.is_dir() else [path]
            if path.is_dir():
                self._folders.append(path)
            elif not (path.name.lower().endswith((*TAR_SUFFIXES, ZIP)) and path.is_file()):
                raise UserError(
                    f"images are looked up in folders, .tar and .zip files; {path} is none of them"
                )
            if archives:
                self._tables.append(ImageTable(archives))

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

    def open(self, image: str | bytes) -> ImageOpener:
        """An image by its reference in a record; see `by_name` for errors."""
        return image if isinstance(image, bytes) else self.by_name(*coco_names(image))

    def find_url(self, url: str) -> ImageOpener | None:
        """The image that img2dataset downloaded from this URL, None if there is none."""
        for table in self._tables:
            if (found := table.find(f"url:{url}")) is not None:
                return found
        return None


def image_reference(value: object) -> str | bytes:
    """An image as a record holds it: its name, or its bytes in a table. Raises BadRecord(`bad_image_name`)."""
    found = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not isinstance(found, (str, bytes)) or not found:
        raise BadRecord("bad_image_name", f"found {type(found).__name__}")
    return found


def coco_names(name: str) -> tuple[str, ...]:
    """An image's name, and those under which COCO of 2014 and of 2017 keep it, with and without their folders.

    `train2014/COCO_train2014_000000000009.jpg` of 2014 is `train2017/000000000009.jpg` or `val2017/...` of 2017.
    """
    found = COCO_NAME.search(name)
    if not found:
        return (name,)
    number, kept = found["number"], found["year"]
    years = [kept] if kept else ["train2014", "val2014"]
    return (
        *([f"{kept}/{PurePosixPath(name).name}"] if kept else []),
        name,
        *(f"{split}/{number}" for split in ("train2017", "val2017")),
        *(f"{year}/COCO_{year}_{number}" for year in years),
    )


def _tails(name: str) -> Iterator[str]:
    """a/b/c.jpg -> a/b/c.jpg, b/c.jpg, c.jpg. Raises BadImage(`path_outside_folder`)."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise BadImage("path_outside_folder", name)
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _zips(folder: Path) -> list[Path]:
    """Zip files in a folder, but those of JSON."""
    return sorted(
        path for path in folder.glob("*.[zZ][iI][pP]") if not path.name.lower().endswith(JSON_SUFFIXES)
    )


class ImageTable:
    """Where the images of some tars and zip files lie, by the hash of their names and URLs."""

    def __init__(self, tars: Sequence[Path]):
        self._tars, self._plain = tars, [tar if _is_zip(tar) else plain_tar(tar) for tar in tars]
        self._arrays = self._kept()  # before any process is forked, so that all share it

    def find(self, name: str) -> ImageOpener | None:
        """The image under `name:...` or `url:...`; of several the first in order of tars."""
        hashes, tar, offset, size = self._arrays
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(hashes, wanted))
        if place == len(hashes) or hashes[place] != wanted:
            return None
        return partial(_read_member, self._plain[tar[place]], int(offset[place]), int(size[place]))

    def _kept(self) -> list[np.ndarray]:
        digest = hashlib.blake2b(digest_size=12)
        for tar in self._tars:
            for file in (tar, tar.with_suffix(".parquet")):
                digest.update(f"{file}|{file_stamp(file) if file.is_file() else None}\n".encode())
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
        for number, (tar, plain) in enumerate(zip(self._tars, self._plain)):
            members = list_zip_members(plain) if _is_zip(plain) else list_tar_members(plain)
            if members.problems:
                problems = ", ".join(members.problems)
                get_logger(__name__).warning("%s: %s; the pictures that can be found are used", tar, problems)
            known, places = _names_of(plain, members, table=tar.with_suffix(".parquet"))
            columns[0].append(np.array(known, np.uint64))
            columns[1].append(np.full(len(known), number, np.uint32))
            columns[2].append(members.offsets[places])
            columns[3].append(members.sizes[places].astype(np.uint32))
        joined = [np.concatenate(column) for column in columns]
        hashes, first = np.unique(joined[0], return_index=True)  # of equal ones the first
        return [hashes, *(column[first] for column in joined[1:])]


def _is_zip(path: Path) -> bool:
    return path.name.lower().endswith(ZIP)


def _read_member(archive: Path, offset: int, size: int) -> bytes:
    return (read_zip_member if _is_zip(archive) else read_tar_member)(archive, offset, size)


def _names_of(tar: Path, members: TarMembers, *, table: Path) -> tuple[list[int], list[int]]:
    """Hash of every name and URL of the images in one tar, and the number of its member."""
    hashes, places, place_of = [], [], {}
    for place, name in enumerate(members.names):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            place_of[stem] = place
            for known_as in {name.removeprefix("./"), name.rpartition("/")[2]}:
                hashes.append(_hash(f"name:{known_as}"))
                places.append(place)
    for key, url in _urls(tar, members, table):
        if key in place_of:
            hashes.append(_hash(f"url:{url}"))
            places.append(place_of[key])
    return hashes, places


def _urls(tar: Path, members: TarMembers, table: Path) -> Iterator[tuple[str, str]]:
    """(key, url) of img2dataset's samples: from the table beside the tar, else from the JSON members."""
    if table.is_file():
        if {"key", "url"} <= set(table_layout(table)[0]):
            for batch in table_batches(table, ("key", "url")):
                yield from _strings(zip(batch["key"].to_pylist(), batch["url"].to_pylist()))
        return
    for place, name in enumerate(members.names):
        if name.endswith(".json"):
            try:
                record = json.loads(_read_member(tar, int(members.offsets[place]), int(members.sizes[place])))
            except (ValueError, RecursionError):  # BadImage is a ValueError
                continue  # an image without its URL can still be found by name
            if isinstance(record, dict):
                yield from _strings([(name.removesuffix(".json"), record.get("url"))])


def _strings(pairs: Iterable[tuple[object, object]]) -> Iterator[tuple[str, str]]:
    return ((key, url) for key, url in pairs if isinstance(key, str) and isinstance(url, str))


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
