"""Tars made on the spot, with odd members on demand."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def add(archive: tarfile.TarFile, name: str, data: bytes, *, claim: int | None = None) -> None:
    """A regular file; `claim` is the size that its header tells, where it lies."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if claim is None else claim
    archive.addfile(info, io.BytesIO(data.ljust(info.size)) if claim is None else None)


def add_special(archive: tarfile.TarFile, name: str, kind: bytes) -> None:
    """A link, a device or a folder instead of a file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    archive.addfile(info)


def write_tar(path: Path, members: dict[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    """A plain tar with these members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            add(archive, name, data)
    return path
