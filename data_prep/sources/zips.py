"""The members of zip files by place, as those of tars: listed once, read with one seek, never unpacked to disk."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from vlgpt.errors import UserError
from vlgpt.images import BadImage
from vlgpt.shards.tars import TarMembers

ZIP = ".zip"
LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")
MAX_MEMBER_BYTES = 1 << 30
IS_ENCRYPTED = 1


def list_zip_members(path: Path) -> TarMembers:
    """Names, places of local headers, packed sizes. Raises UserError for a file that is no zip file, or is cut."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [member for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise UserError(f"{path} is no zip file or is cut: {error}; download it again") from error
    return TarMembers(
        names=tuple(member.filename for member in found),
        offsets=np.array([member.header_offset for member in found], np.int64),
        sizes=np.array([member.compress_size for member in found], np.int64),
        others=(),
        problems=(),
    )


def read_zip_member(path: Path, offset: int, size: int) -> bytes:
    """Raises BadImage(`unreadable_file`) for what is encrypted, damaged or packed otherwise than by deflate."""
    with path.open("rb") as file:
        file.seek(offset)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
            raise BadImage("unreadable_file", f"{path} is cut or has changed at byte {offset}")
        _, flags, method, *lengths = LOCAL_HEADER.unpack(header)
        file.seek(sum(lengths), 1)
        data = file.read(size)
    if flags & IS_ENCRYPTED or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImage("unreadable_file", f"{path}: encrypted, or packed by method {method}")
    if method == zipfile.ZIP_STORED:
        return data
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = unpacker.decompress(data, MAX_MEMBER_BYTES)
    except zlib.error as error:
        raise BadImage("unreadable_file", f"{path}: {error}") from error
    if unpacker.unconsumed_tail:
        raise BadImage("too_many_bytes", f"{path}: a member unpacks to over {MAX_MEMBER_BYTES} bytes")
    return found
