"""What all readers need of the file system: which files to read, under which names, and numbers that cost a
pass over a file, kept beside it.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlgpt.errors import UserError
from vlgpt.files import replacing
from vlgpt.log import get_logger
from vlgpt.shards.foreign import INDEX_FOLDER

SHOWN_KEYS = 40
SMALL_BYTES = 4 << 20


@dataclass(frozen=True)
class InputFile:
    """A file to read. `name` is its path below the input without suffixes: the start of document ids."""

    path: Path
    name: str

    @property
    def key(self) -> str:
        """The name, for files that are records themselves."""
        return self.name


def find_files(inputs: Sequence[Path], suffixes: Sequence[str], *, source: str) -> list[InputFile]:
    """Files given, and files with these suffixes in folders given, at any depth; sorted within each folder.

    Raises UserError when there is none, or when two would give documents the same ids.
    """
    found = list_files(inputs, suffixes)
    if not found:
        shown = ", ".join(map(str, inputs)) or "no --input"
        raise UserError(f"source {source}: no {' or '.join(suffixes)} file in {shown}")
    places: dict[str, Path] = {}
    for file in found:
        if file.name in places:
            raise UserError(
                f"source {source}: {places[file.name]} and {file.path} would give documents the same ids; "
                "rename one, or build them as two data sets"
            )
        places[file.name] = file.path
    return found


def list_files(inputs: Sequence[Path], suffixes: Sequence[str]) -> list[InputFile]:
    """As `find_files`, without its checks. Suffixes match in any case; hidden files and folders are left out."""
    found: list[InputFile] = []
    endings = tuple(suffixes)
    for path in inputs:
        if path.is_dir():
            names = {
                file.relative_to(path).as_posix(): file
                for file in path.rglob("*")
                if file.name.lower().endswith(endings) and file.is_file()
            }
            visible = sorted(name for name in names if not f"/{name}".count("/."))
            found += [InputFile(names[name], _without(name, suffixes)) for name in visible]
        else:
            found.append(InputFile(path, _without(path.name, suffixes)))
    return found


def _without(name: str, suffixes: Sequence[str]) -> str:
    longest = max((suffix for suffix in suffixes if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(longest)]


def inside(folder: Path, name: str) -> Path | None:
    """`folder/name`, or None when the name leads out of the folder (names come from data)."""
    path = folder / name
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # null bytes, link loops
        return None
    return path if is_inside else None


def split_range(starts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Numbers `start ... stop - 1` of things that lie in files: (file, first, stop) counted within each file.

    `starts` holds the number of every file's first thing, and the total as its last entry.
    """
    while start < stop:
        place = bisect.bisect_right(starts, start) - 1
        end = min(stop, starts[place + 1])
        yield place, start - starts[place], end - starts[place]
        start = end


def require_keys(
    found: Iterable[str], wanted: Mapping[str, Sequence[str]], *, where: Path, what: str
) -> None:
    """Raise UserError unless one name of every entry of `wanted` (meaning -> accepted names) was found."""
    names = sorted(map(str, found))
    missing = [" or ".join(accepted) for accepted in wanted.values() if not set(accepted).intersection(names)]
    if missing:
        more = ", ..." if len(names) > SHOWN_KEYS else ""
        raise UserError(
            f"{where} is no {what}: it has no {', no '.join(missing)}; found "
            f"{', '.join(names[:SHOWN_KEYS]) or 'no names at all'}{more}"
        )


def kept_arrays(
    file: Path, *, kind: str, names: Sequence[str], make: Callable[[], Sequence[np.ndarray]], stamp: str = ""
) -> list[np.ndarray]:
    """Arrays that depend on nothing but `file` (its size and time, or `stamp`): made once, then read.

    They lie in `.vlgpt-index` beside the file, or in the temporary folder when that cannot be written; memory
    maps, so that processes share them. For small files they are made every time.
    """
    if not stamp:
        stat = file.stat()
        if stat.st_size < SMALL_BYTES:
            return list(make())
        stamp = f"{stat.st_size}.{stat.st_mtime_ns}"
    digest = hashlib.blake2b(f"{kind}|{stamp}".encode(), digest_size=6).hexdigest()
    folder = _index_folder(file.parent)
    paths = [folder / f"{file.name}.{kind}.{digest}.{name}.npy" for name in names]
    try:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        get_logger(__name__).warning("%s is made again: %s", paths[0], error)
    arrays = list(make())
    try:
        folder.mkdir(mode=0o700 if folder.parent != file.parent else 0o777, parents=True, exist_ok=True)
        for path, array in zip(paths, arrays):
            with replacing(path) as temporary, temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except OSError as error:
        get_logger(__name__).warning(
            "the index of %s cannot be kept and is made again next time: %s", file, error
        )
    return arrays


def _index_folder(parent: Path) -> Path:
    if os.access(parent, os.W_OK):
        return parent / INDEX_FOLDER
    place = hashlib.blake2b(str(parent.resolve()).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"vlgpt-index-{os.getuid()}" / place
