"""The samples of one tar as the sources read them, listed once from its headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep.sources.inputs import kept_arrays
from vlgpt.shards.samples import TarSamples, list_samples
from vlgpt.shards.tars import plain_tar, read_tar_member


class SampleTar:
    """A tar, unpacked if it is compressed, and its samples."""

    def __init__(self, tar: Path):
        self.path = plain_tar(tar)
        self.samples = _kept_samples(self.path)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {key: number for number, key in reversed(list(enumerate(self.samples.keys)))}

    def number(self, key: str) -> int | None:
        """The number of a key, None if the tar does not hold it."""
        return self._numbers.get(key)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a member. Raises OSError."""
        return read_tar_member(self.path, offset, size)

    def image(self, number: int) -> TarPlace:
        """Where the image of a sample lies that has no reason against it."""
        place = self.samples.place(number, "image")
        assert place is not None  # else there is a reason
        return TarPlace(self.path, *place)


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


def _kept_samples(tar: Path) -> TarSamples:
    def make() -> list[np.ndarray]:
        found = list_samples(tar)
        keys = "\0".join(found.keys).encode("utf-8", "surrogatepass")
        notes = json.dumps([found.problems, found.passed_over]).encode()
        return [np.frombuffer(keys, np.uint8), found.reasons, found.places, np.frombuffer(notes, np.uint8)]

    names = ("keys", "reasons", "places", "notes")
    keys, reasons, places, notes = kept_arrays(tar, kind="samples.2", names=names, make=make)
    problems, passed_over = json.loads(notes.tobytes())
    split = keys.tobytes().decode("utf-8", "surrogatepass").split("\0") if len(reasons) else []
    return TarSamples(split, reasons, places, tuple(problems), passed_over)
