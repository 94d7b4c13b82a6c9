"""Where the files of a data set are: a local folder, or a bounded local copy of a remote one.

Remote shards are fetched whole and in sequence, checked against the manifest's hash, and evicted oldest
first: there is never a request per sample.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from vlgpt.errors import UserError
from vlgpt.files import hash_stream, open_locked
from vlgpt.log import get_logger

DEFAULT_CACHE_BYTES = 64 << 30


def is_url(path: str) -> bool:
    """Whether the path is for fsspec: it has a protocol."""
    return "://" in path


class LocalFolder:
    """Files on a local or mounted disk."""

    def __init__(self, folder: Path):
        self._folder, self.where = folder, str(folder)

    def path(self, name: str) -> Path:
        """Path of a file of the data set, whether it exists or not."""
        return self._folder / name

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises FileNotFoundError when it is missing."""
        return self.path(name).read_bytes()

    def expect(self, sha256: Mapping[str, str]) -> None:
        """Local tars were verified when the manifest was written, and every member is checked when read."""

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to fetch."""


class RemoteFolder:
    """Files behind an fsspec URL, copied into `cache_dir` on first use; all processes of a machine share the copies."""

    def __init__(self, url: str, *, cache_dir: Path | None, cache_bytes: int):
        self.where, self._cache_bytes = url.rstrip("/"), cache_bytes
        self._root = cache_dir or Path.home() / ".cache" / "vlgpt" / "shards"
        self._folder = self._root / hashlib.blake2b(self.where.encode(), digest_size=8).hexdigest()
        self._sha256: dict[str, str] = {}

    def expect(self, sha256: Mapping[str, str]) -> None:
        """Hashes that downloaded files must have; copies of an older version of the data set are removed."""
        self._sha256 = dict(sha256)

    def read(self, name: str) -> bytes:
        """Small files that decide what the rest means are never cached."""
        import fsspec

        with fsspec.open(f"{self.where}/{name}", "rb") as file:
            content: bytes = file.read()
        return content

    def path(self, name: str) -> Path:
        """The local copy, downloaded first if needed. Raises FileNotFoundError, or UserError for a wrong hash."""
        local = self._local(name)
        if _touch(local):
            return local
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{local.name}.partial")
        # the partial file is also the lock: of several processes one downloads, the others wait
        with open_locked(partial) as file:
            if _touch(local):
                partial.unlink(missing_ok=True)
            else:
                self._download(name, file)
                os.replace(partial, local)
                self._evict(keep=local)
        return local

    def prefetch(self, names: Sequence[str]) -> None:
        """Download in the background, in this order; a failure is met again, and raised, by `path`."""
        threading.Thread(target=self._prefetch, args=(tuple(names),), daemon=True).start()

    def _prefetch(self, names: tuple[str, ...]) -> None:
        for name in names:
            try:
                self.path(name)
            except (OSError, UserError) as error:
                get_logger(__name__).warning("prefetch of %s/%s failed: %s", self.where, name, error)
                return

    def _local(self, name: str) -> Path:
        """The hash is part of the name, so a rebuilt shard is never confused with its older copy."""
        version = self._sha256.get(name) or self._sha256.get(f"{Path(name).stem}.tar", "")
        return self._folder / version[:16] / name if version else self._folder / name

    def _download(self, name: str, target: BinaryIO) -> None:
        import fsspec

        digest = hashlib.sha256()
        with fsspec.open(f"{self.where}/{name}", "rb") as source:
            hash_stream(source, digest, copy_to=target)
        target.flush()
        if (wanted := self._sha256.get(name)) and digest.hexdigest() != wanted:
            raise UserError(
                f"{self.where}/{name} has sha256 {digest.hexdigest()[:12]}..., the manifest says {wanted[:12]}..."
            )

    def _evict(self, *, keep: Path) -> None:
        """Remove the least recently used copies above the limit; files already open stay readable."""
        files = []
        for path in self._root.rglob("*"):
            if path.suffix == ".partial" or path.name == "manifest.json":
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file():
                files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._cache_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
