"""The samples of one webdataset tar (`KEY.jpg`, `KEY.txt`, `KEY.json`), listed once from its headers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_prep.sources.inputs import kept_arrays
from vlgpt.shards.index import list_tar_members, read_tar_member

FIELDS = ("image", "json", "txt")
FIELD_OF = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "json": "json", "txt": "txt"}
DUPLICATE = -2


class SampleTar:
    """Samples in order of first appearance. An image whose key came before is listed as a duplicate."""

    def __init__(self, tar: Path):
        self.path = tar
        names = ("keys", "places", "is_complete")
        keys, self._places, is_complete = kept_arrays(
            tar, kind="samples", names=names, make=lambda: _list_samples(tar)
        )
        self.keys = keys.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(keys) else []
        self.is_complete = bool(is_complete[0])
        self._number = {key: number for number, key in reversed(list(enumerate(self.keys)))}

    def __len__(self) -> int:
        return len(self.keys)

    def number(self, key: str) -> int | None:
        """The number of a key, None if the tar does not hold it."""
        return self._number.get(key)

    def is_duplicate(self, number: int) -> bool:
        """Whether this image's key came before."""
        return int(self._places[number, 1, 0]) == DUPLICATE

    def place(self, number: int, field: str) -> TarPlace | None:
        """Where a sample's `image`, `json` or `txt` lies."""
        offset, size = map(int, self._places[number, FIELDS.index(field)])
        return None if offset < 0 else TarPlace(self.path, offset, size)


@dataclass(frozen=True, slots=True)
class TarPlace:
    """Where the bytes of a member lie; calling it reads them (it serves as an image opener)."""

    tar: Path
    offset: int
    size: int

    def __call__(self) -> bytes:
        return read_tar_member(self.tar, self.offset, self.size)


@lru_cache(maxsize=4)
def open_sample_tar(tar: Path) -> SampleTar:
    """The last few tars stay open: neighbouring records lie in the same one."""
    return SampleTar(tar)


def _list_samples(tar: Path) -> list[np.ndarray]:
    """-> keys joined by zero bytes; (n, 3, 2) offset and size of image, json, txt (-1: none); is_complete."""
    members = list_tar_members(tar)
    keys: list[str] = []
    places: list[list[tuple[int, int]]] = []
    number_of: dict[str, int] = {}
    for name, offset, size in zip(members.names, members.offsets.tolist(), members.sizes.tolist()):
        key, _, suffix = name.removeprefix("./").rpartition(".")
        field = FIELD_OF.get(suffix.lower())
        if field is None or not key:
            continue
        number = number_of.setdefault(key, len(keys))
        if number == len(keys):
            keys.append(key)
            places.append([(-1, -1)] * len(FIELDS))
        if places[number][FIELDS.index(field)][0] < 0:
            places[number][FIELDS.index(field)] = offset, size
        elif field == "image":
            keys.append(key)
            places.append([(offset, size), (DUPLICATE, 0), (DUPLICATE, 0)])
    joined = "\0".join(keys).encode("utf-8", "surrogateescape")
    return [
        np.frombuffer(joined, np.uint8),
        np.array(places, np.int64).reshape(-1, len(FIELDS), 2),
        np.array([members.is_complete]),
    ]
