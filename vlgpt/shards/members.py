"""Lists the files inside a tar from its headers alone: names, offsets and sizes, nothing read or
extracted.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

END_MARK = bytes(1024)


@dataclass(frozen=True)
class TarMembers:
    """The whole regular files of one tar, in order. `names` are never to be used as paths."""

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
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.isreg() and not info.issparse():
                    if info.offset_data + info.size > size:
                        is_complete = False
                        break
                    names.append(info.name)
                    places.append((info.offset_data, info.size))
                archive.members = []  # type: ignore[attr-defined]  # keep memory flat: tarfile remembers every member
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
