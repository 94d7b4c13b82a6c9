"""Files and folders that are whole or absent (write beside, fsync, rename), hashes of files, free ports."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from vlgpt.errors import UserError
from vlgpt.log import get_logger

CHUNK_BYTES = 1 << 20
MAX_EXPANDED = 1_000_000
JsonObject: TypeAlias = dict[str, Any]
"""An object of a JSON file, as `json.loads` gives it."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): a reader, or a crash, sees the old file or the new one whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`: the file that the block writes there takes the place of `path` at its end.

    After an error it is removed. For writers that want a path; `write_atomic` is for data in memory.
    """
    temporary = _beside(path)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`: what the block writes there takes the place of `folder` at its end.

    After an error it is removed, and so is what a killed process left there.
    """
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("partial", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        # No rename replaces a folder that holds files: the old one steps aside, and is deleted last.
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_once(path: Path, data: bytes) -> bool:
    """Write `path` unless it exists, whole; of several processes the first wins. -> whether it was this one."""
    temporary = _beside(path)
    temporary.write_bytes(data)
    _fsync(temporary)
    try:
        # a rename would take the place of a file that another process has written meanwhile
        os.link(temporary, path)
    except OSError:
        if path.exists():
            return False
        # this file system has no hard links
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Digest(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add bytes to the hash."""


class Readable(Protocol):
    """A file or any stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """At most `size` further bytes; none at the end."""


def hash_stream(stream: Readable, digest: Digest, *, copy_to: BinaryIO | None = None) -> None:
    """Feed the rest of a stream to a hash, chunk by chunk, and copy it on the way."""
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
        if copy_to is not None:
            copy_to.write(chunk)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        hash_stream(file, digest)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """Changes whenever the file does: its time of change cannot be set, as `cp -p` and `rsync -t` set that of its
    content.
    """
    stat = path.stat()
    return f"{stat.st_size}.{stat.st_mtime_ns}.{stat.st_ctime_ns}"


def expand_paths(path: Path) -> list[Path]:
    """The paths that a name with braces or stars means, which no shell has expanded; `path` itself if it exists."""
    if path.exists():
        return [path]
    from braceexpand import braceexpand

    try:
        names = list(islice(braceexpand(str(path)), MAX_EXPANDED))
    except ValueError as error:
        raise UserError(f"{path}: the braces are not balanced") from error
    return [Path(found) for name in names for found in (sorted(glob(name)) if has_magic(name) else [name])]


def open_locked(path: Path) -> BinaryIO:
    """An empty file for one process at a time: other processes that open it wait until it is closed.

    The lock ends with its process, however it ends. A process that waited while the owner renamed or removed the file
    gets a new one. File systems without locks get a warning and no protection.
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


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
