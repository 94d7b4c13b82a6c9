"""Files that are either whole or absent: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from vlgpt.log import get_logger

CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): a reader, or a crash, sees the old file or the new one whole."""
    os.replace(_written_beside(path, data.encode() if isinstance(data, str) else data), path)
    fsync_folder(path.parent)


def write_once(path: Path, data: bytes) -> bool:
    """Write `path` unless it exists, whole; of several processes the first wins. -> whether it was this one."""
    temporary = _written_beside(path, data)
    try:
        os.link(temporary, path)  # a rename would take the place of a file that came meanwhile
    except OSError:  # it exists, or this file system has no hard links
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def _written_beside(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def open_locked(path: Path) -> BinaryIO:
    """An empty file for one process at a time: others that open it wait until it is closed.

    The lock ends with its process, however it ends. Who had to wait begins with a new file when the owner has
    renamed or removed the old one. File systems without locks get a warning and no protection.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            get_logger(__name__).warning("no file lock on %s: %s", path, error)
        try:
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        file.close()
