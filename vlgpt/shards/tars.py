"""The members of any tar from its headers alone: of joined, cut, damaged and compressed ones too.

Python's tarfile ends at the first end mark and trusts every number of a header. Here a tar is only read forwards, and
what is wrong with it becomes a word to count by.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import posixpath
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import escape
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlgpt.errors import UserError
from vlgpt.files import CHUNK_BYTES, expand_paths, file_stamp, open_locked
from vlgpt.log import get_logger

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
INDEX_FOLDER = ".vlgpt-index"
BLOCK_BYTES = 512
MAGIC, MAGIC_OFFSET, POSIX_MAGIC = b"ustar", 257, b"ustar\0"
EXTENSIONS = {
    tarfile.GNUTYPE_LONGNAME: "path",
    tarfile.GNUTYPE_LONGLINK: "linkpath",
    tarfile.XHDTYPE: "",
    tarfile.SOLARIS_XHDTYPE: "",
}
"""Headers that say something about the member behind them: which keyword, or "" for the many of a PAX header."""
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINK_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_DATA = (*LINK_TYPES, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
SPARSE_FLAG, SPARSE_FLAG_EXTENDED = 482, 504
# every key of an index takes the room of the longest
MAX_NAME_CHARS = 1000
MAX_EXTENSION_BYTES = 1 << 20
MAX_LINKS = 8
# pictures hardly shrink: what unpacks to more is no data set
MAX_UNPACKED, MAX_UNPACKED_RATIO = 1 << 30, 100
PACKERS: dict[bytes, Callable[..., BufferedIOBase]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
DAMAGED = ".damaged.tar"


@dataclass(frozen=True)
class TarMembers:
    """The complete files of one tar, in order; links count as the files of the same tar that they name. `names` are
    never to be used as paths.
    """

    names: tuple[str, ...]
    offsets: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64
    others: tuple[str, ...]
    """Names of what has no bytes of its own: devices, sparse files, links that lead nowhere in this tar."""
    problems: tuple[str, ...]
    """`empty_tar`; `truncated_tar`: no end mark (it may be cut between two members) or a cut member; `damaged_tar`:
    bytes that are no header. What lies behind damage and has a whole header is listed.
    """

    @property
    def is_complete(self) -> bool:
        """False for a tar that is cut or damaged."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member as its header has it. `link` is the name that a hard or symbolic link holds."""

    name: str
    offset: int
    size: int
    kind: bytes
    link: str = ""

    @property
    def is_file(self) -> bool:
        return self.kind in FILE_TYPES

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + -(-self.size // BLOCK_BYTES) * BLOCK_BYTES


def list_tar_members(tar: Path) -> TarMembers:
    """Scan the headers of an uncompressed tar. Raises OSError when the file cannot be read."""
    with tar.open("rb") as file:
        scan = _Scan(file.fileno())
        scan.run()
    found = [entry for archive in scan.archives for entry in _resolve(archive)]
    files = [entry for entry in found if entry.is_file]
    offsets, sizes = np.array([(entry.offset, entry.size) for entry in files], np.int64).reshape(-1, 2).T
    return TarMembers(
        names=tuple(entry.name for entry in files),
        offsets=offsets,
        sizes=sizes,
        others=tuple(entry.name for entry in found if not entry.is_file and entry.kind != tarfile.DIRTYPE),
        problems=tuple(sorted(scan.problems | ({"damaged_tar"} if tar.name.endswith(DAMAGED) else set()))),
    )


class _Scan:
    """One pass over the headers of a file of `archives`, each a list of entries that ends with an end mark."""

    def __init__(self, descriptor: int):
        self._file, self._size = descriptor, os.fstat(descriptor).st_size
        self.archives: list[list[_Entry]] = [[]]
        self.problems: set[str] = set()

    def run(self) -> None:
        """Fill `archives` and `problems`."""
        if not self._size:
            self.problems.add("empty_tar")
        position, is_ended = 0, True
        said: dict[str, str] = {}  # by extension headers about the member that follows them
        while position < self._size:
            block = self._read(BLOCK_BYTES, position)
            if not any(block):
                start, position = position, self._skip_zeros(position)
                if position - start >= 2 * BLOCK_BYTES and not is_ended:
                    self.archives.append([])
                    is_ended = True
                continue
            entry = self._entry(block, position, said)
            if entry is None or entry.offset + entry.size > self._size:
                is_cut = entry is not None or len(block) < BLOCK_BYTES
                position, said, is_ended = self._behind_damage(position, is_cut=is_cut), {}, True
                continue
            said, is_ended = self._extensions(entry, said), False
            if entry.kind not in (*EXTENSIONS, tarfile.XGLTYPE):
                self.archives[-1].append(entry)
            position = entry.end
        if not is_ended:
            self.problems.add("truncated_tar")

    def _read(self, size: int, position: int) -> bytes:
        return os.pread(self._file, size, position)

    def _skip_zeros(self, position: int) -> int:
        """The first block at or behind `position` that is not empty."""
        while chunk := self._read(CHUNK_BYTES, position):
            if rest := len(chunk.lstrip(b"\0")):
                return position + (len(chunk) - rest) // BLOCK_BYTES * BLOCK_BYTES
            position += len(chunk)
        return position

    def _entry(self, block: bytes, position: int, said: Mapping[str, str]) -> _Entry | None:
        """The entry whose header is at `position`, None when there is none."""
        info = _header(block)
        if info is None:
            return None
        kind, offset, size = info.type, position + BLOCK_BYTES, info.size
        if kind in (*EXTENSIONS, tarfile.XGLTYPE):
            return _Entry("", offset, size, kind)
        name, claim = said.get("path", info.name), said.get("size", "0")
        if "damaged" in said or len(name) > MAX_NAME_CHARS or not claim.isdecimal() or len(claim) > 19:
            return None
        if kind == tarfile.GNUTYPE_SPARSE:
            is_extended = block[SPARSE_FLAG]
            while is_extended and len(more := self._read(BLOCK_BYTES, offset)) == BLOCK_BYTES:
                is_extended, offset = more[SPARSE_FLAG_EXTENDED], offset + BLOCK_BYTES
        elif any(keyword.startswith("GNU.sparse.") for keyword in said):
            kind = tarfile.GNUTYPE_SPARSE
        size = 0 if kind in WITHOUT_DATA else int(claim) if "size" in said else size
        return _Entry(name, offset, size, kind, said.get("linkpath", info.linkname))

    def _extensions(self, entry: _Entry, said: dict[str, str]) -> dict[str, str]:
        """What is known about the next member after this entry: nothing, unless the entry is an extension header."""
        if entry.kind not in EXTENSIONS:
            return said if entry.kind == tarfile.XGLTYPE else {}
        if entry.size > MAX_EXTENSION_BYTES:
            return {"damaged": ""}
        data = self._read(entry.size, entry.offset)
        keyword = EXTENSIONS[entry.kind]
        return {**said, **({keyword: _text(data)} if keyword else _pax(data))}

    def _behind_damage(self, position: int, *, is_cut: bool) -> int:
        """Where to read on behind what is no header, or behind a header that claims more bytes than there are
        (`is_cut`).
        """
        archive = self.archives[-1]
        start = position + 1
        # A member whose end leads to no header may itself be cut, and another tar joined to it: a header inside tells.
        if not is_cut and archive and archive[-1].end == position:
            start = archive[-1].offset
        found = self._find_header(start)
        if found < position:
            archive.pop()
        self.problems.add("truncated_tar" if is_cut and found == self._size else "damaged_tar")
        return found

    def _find_header(self, start: int) -> int:
        """The next place with a whole header, the end of the file when there is none."""
        size = BLOCK_BYTES  # small at first: the next header may be near, and damage everywhere
        while chunk := self._read(size + BLOCK_BYTES, start):
            at = chunk.find(MAGIC, MAGIC_OFFSET)
            while at >= 0:
                header = at - MAGIC_OFFSET
                if _header(chunk[header : header + BLOCK_BYTES]) is not None:
                    return start + header
                at = chunk.find(MAGIC, at + 1)
            start += min(len(chunk), size)
            size = min(4 * size, CHUNK_BYTES)
        return self._size


@dataclass(frozen=True, slots=True)
class _Header:
    """What a header block says, of which tarfile would read ten fields more."""

    name: str
    size: int
    type: bytes
    linkname: str


def _header(block: bytes) -> _Header | None:
    """None for a block whose checksum is wrong, or whose size makes no sense."""
    if len(block) < BLOCK_BYTES:
        return None
    try:
        checksum, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        return None
    # every byte but the checksum's own, which count as blanks; old programs took bytes for signed numbers
    found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if size < 0 or (checksum != found and checksum != found - 256 * sum(byte > 127 for byte in block)):
        return None
    name, kind = _text(block[:100]), block[156:157]
    if block[257:263] == POSIX_MAGIC and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    if kind == tarfile.AREGTYPE and name.endswith("/"):
        kind = tarfile.DIRTYPE
    return _Header(name, size, kind, _text(block[157:257]))


def _number(field: bytes) -> int:
    """Octal digits, or the bytes of a number if the first one says so. Raises ValueError."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") if field[0] == 0o200 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> dict[str, str]:
    """Keyword -> value of a PAX header; `damaged` is among the keywords of one that makes no sense."""
    found: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        end = int(length) if length.isdigit() and len(length) < 8 else 0
        keyword, is_there, value = data[len(length) + 1 : max(end - 1, 0)].partition(b"=")
        if not is_there or end > len(data):
            return {"damaged": ""}
        found[_text(keyword)] = _text(value)
        data = data[end:]
    return found


def _resolve(archive: list[_Entry]) -> Iterator[_Entry]:
    """The entries with links replaced by the files they name; a hard link names a file before it."""
    if not any(entry.kind in LINK_TYPES for entry in archive):
        yield from archive
        return
    last = {posixpath.normpath(entry.name): entry for entry in archive}
    before: dict[str, _Entry] = {}
    for entry in archive:
        target: _Entry | None = entry
        for _ in range(MAX_LINKS):
            if target is None or target.kind not in LINK_TYPES:
                break
            if target.kind == tarfile.LNKTYPE:
                target = before.get(posixpath.normpath(target.link))
            else:
                target = last.get(
                    posixpath.normpath(posixpath.join(posixpath.dirname(target.name), target.link))
                )
        before[posixpath.normpath(entry.name)] = entry
        if target is not None and target.is_file:
            yield _Entry(entry.name, target.offset, target.size, target.kind)
        else:
            yield entry


def find_tars(folder: Path) -> list[Path]:
    """Tars in a folder, at any depth, sorted by name. Hidden files and folders are left out.

    A linked folder is read under its own name, unless it was read before: so loops end.
    """
    found: list[Path] = []
    entered = {(stat.st_dev, stat.st_ino) for stat in map(os.stat, folder.resolve().parents)}
    folders, links = [folder], list[Path]()
    while folders or links:
        parent = folders.pop() if folders else links.pop(0)
        stat = parent.stat()
        if (stat.st_dev, stat.st_ino) in entered:
            continue
        entered.add((stat.st_dev, stat.st_ino))
        try:
            paths = sorted(parent.iterdir())
        except PermissionError as error:
            get_logger(__name__).warning("passed over: %s", error)
            continue
        for path in paths:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.name.lower().endswith(TAR_SUFFIXES) and path.is_file():
                found.append(path)
    return sorted(found, key=lambda tar: tar.relative_to(folder).as_posix())


def tars_of(path: Path) -> list[Path]:
    """All tars that the path of a data set means: a folder, a tar, or a name with braces and stars."""
    places = [place for place in expand_paths(path) if place.exists()]
    return [tar for place in places for tar in (find_tars(place) if place.is_dir() else [place])]


def without_suffix(name: str) -> str:
    """`a/00000.tar.gz` -> `a/00000`; a name without a suffix of tars stays."""
    longest = max((suffix for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(longest)]


def index_folder(folder: Path, *, cache_dir: Path | None = None) -> Path:
    """Where what is known about the files in `folder` is kept: in a hidden folder there, else in the cache folder or
    the temporary one, under a name that stands for this place: files elsewhere may have the same names.
    """
    if cache_dir is None and os.access(folder, os.W_OK):
        return folder / INDEX_FOLDER
    root = cache_dir or Path(tempfile.gettempdir()) / f"{INDEX_FOLDER[1:]}-{os.getuid()}"
    return root / hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()


def make_index_folder(folder: Path, *, cache_dir: Path | None = None) -> Path:
    """The same, created: in the temporary folder for this user alone. Raises OSError."""
    made = index_folder(folder, cache_dir=cache_dir)
    is_temporary = cache_dir is None and made.name != INDEX_FOLDER
    made.mkdir(mode=0o700 if is_temporary else 0o777, parents=True, exist_ok=True)
    return made


def plain_tar(tar: Path, *, cache_dir: Path | None = None) -> Path:
    """`tar` itself, or what it holds when it is compressed, unpacked once into `index_folder`.

    What lies before damage is unpacked. Raises OSError when `tar` cannot be read, UserError when there is no room.
    """
    with tar.open("rb") as file:
        start = file.read(6)
    packer = next((packer for prefix, packer in PACKERS.items() if start.startswith(prefix)), None)
    if packer is None:
        return tar
    version = hashlib.blake2b(file_stamp(tar).encode(), digest_size=6).hexdigest()
    folder = index_folder(tar.parent, cache_dir=cache_dir)
    whole, damaged = (folder / f"{tar.name}.{version}{suffix}" for suffix in (".tar", DAMAGED))
    try:
        make_index_folder(tar.parent, cache_dir=cache_dir)
        # the partial file is also the lock: of several processes one unpacks, the others wait
        partial = folder / f".{whole.name}.partial"
        with open_locked(partial) as target:
            if not (whole.is_file() or damaged.is_file()):
                get_logger(__name__).info("%s is unpacked once, into %s", tar, folder)
                for old in folder.glob(f"{escape(tar.name)}.*.tar"):
                    old.unlink(missing_ok=True)
                with packer(tar, "rb") as source:
                    is_whole = _unpack(
                        source, target, limit=MAX_UNPACKED + MAX_UNPACKED_RATIO * tar.stat().st_size
                    )
                os.replace(partial, whole if is_whole else damaged)
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{tar} cannot be unpacked into {folder} ({error}); make room, or unpack it yourself"
        ) from error
    return whole if whole.is_file() else damaged


def _unpack(source: BufferedIOBase, target: BinaryIO, *, limit: int) -> bool:
    """Copy until the end, damage or the limit: -> whether it was the end. Raises OSError for a disk that fails."""
    is_whole = False
    try:
        # not `read`: it keeps what it has for itself when it meets damage
        while limit > 0 and (chunk := source.read1(CHUNK_BYTES)):
            target.write(chunk)
            limit -= len(chunk)
        is_whole = limit > 0
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
    target.flush()
    os.fsync(target.fileno())
    return is_whole


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
