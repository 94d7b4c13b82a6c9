"""What all readers need of the file system: which files to read, under which names, and numbers that cost a
pass over a file, kept beside it.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlgpt.errors import UserError
from vlgpt.files import file_stamp, replacing
from vlgpt.image_formats import IMAGE_SUFFIXES
from vlgpt.log import get_logger
from vlgpt.shards.tars import INDEX_FOLDER, index_folder, make_index_folder

SHOWN_KEYS = 40
SMALL_BYTES = 4 << 20
SUFFIX = re.compile(r"(\.tar)?\.(?=[0-9]*[a-z])[a-z0-9]{1,10}$")
IMAGES_BESIDE = (*IMAGE_SUFFIXES, ".tar")
"""Records name images in such files: they are opened when their turn comes."""


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
    found = list_files(inputs, suffixes, others=IMAGES_BESIDE)
    if not found:
        shown = ", ".join(map(str, inputs)) or "no --input"
        raise UserError(f"source {source}: no {' or '.join(suffixes)} file in {shown}")
    paths_by_name(found, source=source)
    return found


def paths_by_name(files: Iterable[InputFile], *, source: str) -> dict[str, Path]:
    """Raises UserError for two files of one name: their documents would have the same ids."""
    found: dict[str, Path] = {}
    for file in files:
        if file.name in found:
            raise UserError(
                f"source {source}: {found[file.name]} and {file.path} would give documents the same ids; "
                "rename one, or build them as two data sets"
            )
        found[file.name] = file.path
    return found


def list_files(
    inputs: Sequence[Path], suffixes: Sequence[str], *, others: Sequence[str] | None = None
) -> list[InputFile]:
    """As `find_files`, without its checks. Suffixes match in any case; hidden files and folders are left out.

    With `others`, one line says which files were passed over: all but these suffixes, which the source reads elsewhere.
    """
    found, passed_over = walk(inputs)
    endings, known, given = tuple(suffixes), tuple(others or ()), set(inputs)
    listed = []
    for file in found:
        name = file.name.lower()
        if name.endswith(endings) or file.path in given:
            listed.append(InputFile(file.path, _without(file.name, suffixes)))
        elif not name.endswith(known):
            passed_over[suffix_of(name) or "without suffix"] += 1
    if others is not None:
        report_passed_over(passed_over)
    return listed


def report_passed_over(counts: Counter[str]) -> None:
    """One line for people: what lay in the input and was not looked at."""
    if counts:
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{count} {kind}" for kind, count in ranked[:SHOWN_KEYS])
        more = sum(count for _, count in ranked[SHOWN_KEYS:])
        get_logger(__name__).info("passed over: %s%s", shown, f", {more} others" if more else "")


def suffix_of(name: str) -> str:
    """The end of a file's name in small letters, `.tar.gz` as one; empty where the last dot begins no suffix.

    `photo.jpg?w=500`, `photo.jpg_large` and `Fig. 3` have none.
    """
    found = SUFFIX.search(name.lower())
    return found[0] if found else ""


def walk(inputs: Sequence[Path]) -> tuple[list[InputFile], Counter[str]]:
    """Files given, and all files in folders given, sorted by their whole names; beside them a count of what is none.

    Links to files and folders are followed; a folder is entered once, so loops end. Hidden ones are counted only.
    """
    found: list[InputFile] = []
    others: Counter[str] = Counter()
    for path in inputs:
        if path.is_dir():
            found += sorted(_walk_folder(path, others), key=lambda file: file.name)
        else:
            found.append(InputFile(path, _storable(path.name)))
    return found, others


def _walk_folder(root: Path, others: Counter[str]) -> Iterator[InputFile]:
    entered = {_identity(folder) for folder in root.resolve().parents}  # a link upwards would lead back here
    folders, links = [(str(root), "")], list[tuple[str, str]]()
    # links come last and in order: a folder has the name under which it truly lies, on every machine
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            if (identity := _identity(folder)) in entered:
                others["linked folders read before"] += 1
                continue
            entered.add(identity)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            others["unreadable folders"] += 1
            continue
        for entry in entries:
            kind = _kind(entry)
            if kind == "file":
                yield InputFile(Path(entry.path), _storable(prefix + entry.name))
            elif kind in ("folder", "link"):
                (folders if kind == "folder" else links).append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.name != INDEX_FOLDER:
                others[kind] += 1


def _kind(entry: os.DirEntry[str]) -> str:
    """`file`, `folder`, `link` (to a folder), or what else it is, in words."""
    try:
        if entry.name.startswith("."):
            return "hidden"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "broken links" if entry.is_symlink() else "pipes and devices"


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _storable(name: str) -> str:
    """File names are bytes: what is no UTF-8 is written in hexadecimal, so that a document can be called so."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _without(name: str, suffixes: Sequence[str]) -> str:
    longest = max((suffix for suffix in suffixes if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(longest)]


def inside(folder: Path, name: str) -> Path | None:
    """`folder/name`, or None when the name leads out of the folder (names come from data).

    The links on the way are the user's own: Hugging Face's cache is made of them.
    """
    path = os.path.normpath(name)
    if "\0" in name or path == ".." or path.startswith(("../", "/")):
        return None
    return folder / path


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
        if file.stat().st_size < SMALL_BYTES:
            return list(make())
        stamp = file_stamp(file)
    digest = hashlib.blake2b(f"{kind}|{stamp}".encode(), digest_size=6).hexdigest()
    folder = index_folder(file.parent)
    paths = [folder / f"{file.name}.{kind}.{digest}.{name}.npy" for name in names]
    try:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        get_logger(__name__).warning("%s is made again: %s", paths[0], error)
    arrays = list(make())
    try:
        make_index_folder(file.parent)
        for path, array in zip(paths, arrays):
            with replacing(path) as temporary, temporary.open("wb") as opened:
                np.save(opened, array, allow_pickle=False)
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    except OSError as error:
        get_logger(__name__).warning(
            "the index of %s cannot be kept and is made again next time: %s", file, error
        )
    return arrays
