"""Copies of commits at any fsspec URL, made in the background; the marker goes last, so half a copy is no commit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from vlgpt import commits
from vlgpt.log import get_logger


class Uploader:
    """Copies committed folders to `url`, one at a time. A failure is logged and counted, training goes on."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.num_failed = 0
        self._thread: threading.Thread | None = None

    def start(self, folder: Path) -> None:
        """Copy in the background, after the copy before has ended."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(folder,), name="upload")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, folder: Path) -> None:
        try:
            upload(folder, self.url)
        except (OSError, ValueError, ImportError) as error:  # ImportError: the protocol's package is missing
            self.num_failed += 1
            get_logger().error("%s was not uploaded to %s: %s", folder.name, self.url, error)


def upload(folder: Path, url: str) -> None:
    """Copy a committed folder to url/TAG. Raises OSError, ValueError (unknown protocol) or ImportError."""
    fs, root = _filesystem(url)
    target = f"{root}/{folder.name}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != commits.MARKER)
    for path in [*files, folder / commits.MARKER]:
        name = f"{target}/{path.relative_to(folder).as_posix()}"
        fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(path), name)
    get_logger().info("%s uploaded to %s", folder.name, url)


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")
