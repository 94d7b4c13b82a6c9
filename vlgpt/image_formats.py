"""What the first bytes and the name of an image file say, before any decoder sees it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Literal

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
"""Names of Pillow's decoders that are tried, HEIF only with pillow-heif. None of them starts another program."""
INSTALL = {"HEIF": "pillow-heif", "AVIF": "pillow>=11.3", "JPEG2000": "pillow"}
"""What reads a format, where the decoder may be missing."""
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".gif"),
    *(
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".j2k",
        ".j2c",
        ".jpc",
        ".jpx",
        ".jpf",
        *HEIF_SUFFIXES,
    ),
)
"""File names that promise an image of these formats; what it is, its bytes decide."""
PREFIX_BYTES = 32
"""Enough for `format_of`."""
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}
_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x4f\xff": "JPEG2000",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
}


def format_of(data: bytes) -> str | None:
    """The format that the first PREFIX_BYTES of a file announce, whatever its name; None when they are no image's.

    It may be one that is not among FORMATS.
    """
    found = _STARTS.get(data[:4]) or _STARTS.get(data[:3]) or _STARTS.get(data[:2])
    if found is not None:
        return found
    if data[:4] == b"RIFF":
        return "WEBP" if data[8:12] == b"WEBP" else None
    if data[:2] == b"BM":
        # a text may begin with these letters: the size of the second header must be one that exists
        return "BMP" if int.from_bytes(data[14:18], "little") in _BMP_HEADERS else None
    return _format_of_boxes(data)


def _format_of_boxes(data: bytes) -> str | None:
    """Of files made of boxes: 4 bytes of size, 4 of name, and content."""
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), PREFIX_BYTES)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, length - 3, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else None
    return {b"\0\0\0\x0cjP  ": "JPEG2000", b"\0\0\0\x0cJXL ": "JPEG XL"}.get(data[:8])


def is_cut(data: bytes) -> bool:
    """Whether the file was cut, in its header for JPEG, PNG, GIF and TIFF.

    Pillow cannot tell that from a file that never was an image.
    """
    if data[4:8] in (b"ftyp", b"jP  "):
        return _ends_inside_box(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data[:4] == b"\x89PNG":
        return len(data) < 33
    if data[:4] == b"GIF8":
        palette = 3 << (data[10] & 7) + 1 if data[10:11] >= b"\x80" else 0
        return len(data) < 13 + palette + 10
    if format_of(data) == "TIFF":
        return tiff_directory(data) + 2 > len(data)
    if data[:2] != b"\xff\xd8":
        return False
    position = 2  # of the next JPEG segment
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position + 4 > len(data)


def tiff_directory(data: bytes) -> int:
    """Where the first directory of a TIFF begins: the number of its entries."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    return int.from_bytes(data[8:16] if b"+" in data[2:4] else data[4:8], order)


def _ends_inside_box(data: bytes) -> bool:
    """Of AVIF, HEIF and JPEG 2000."""
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8:  # the last box, or one with 64 bits of size
            return False
        position += size
    return position != len(data)


def webp_size(data: bytes) -> tuple[int, int]:
    """The size that a WEBP claims, (0, 0) for other files."""
    # Pillow allocates two images of that size when it opens the file: too late to refuse it.
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        sides = int.from_bytes(data[21:25], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    sides = int.from_bytes(data[26:30], "little")
    return sides & 0x3FFF, sides >> 16 & 0x3FFF


def check_png_data(data: bytes) -> None:
    """Pillow does not compare the checksums of pixel data, so a flipped bit could pass as an image.

    Raises ValueError for an IDAT chunk with another checksum than stored.
    """
    for name, start, end in _png_chunks(data):
        if name == b"IDAT" and end <= len(data) and not _is_intact(data, start, end):
            raise ValueError("an IDAT chunk has a wrong checksum")


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG without the parts that no pixel depends on: texts, profiles, previews, and small ones that are
    damaged. EXIF stays. Other files are returned as they are.

    Pillow refuses a PNG for more than 1 MB of text in it, and either for a damaged part that nobody needs.
    """
    name = format_of(data)
    if name == "PNG":
        parts = (
            data[start:end] for kind, start, end in _png_chunks(data) if _is_needed(data, kind, start, end)
        )
        return data[:8] + b"".join(parts)
    return _bare_jpeg(data) if name == "JPEG" else data


def _is_needed(data: bytes, name: bytes, start: int, end: int) -> bool:
    """Whether the pixels, or their orientation, depend on this chunk of a PNG."""
    if not name[0] & 0x20:
        return True
    if name == b"tRNS":
        size, colour_type = end - start - 12, data[25]
        is_valid = size == {0: 2, 2: 6}.get(colour_type) or (colour_type == 3 and 0 < size <= 256)
        return is_valid and _is_intact(data, start, end)
    return name == b"eXIf" and _is_intact(data, start, end)


def _bare_jpeg(data: bytes) -> bytes:
    """Without comments and APP2 ... APP13: an index of further images, colour profiles, Photoshop's notes."""
    kept, position = [data[:2]], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if not 0xE2 <= data[position + 1] <= 0xED and data[position + 1] != 0xFE:
            kept.append(data[position:end])
        position = end
    return b"".join((*kept, data[position:]))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, first and last + 1 byte of every chunk; the last one may end behind the data."""
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        yield name, position, position + 12 + length
        position += 12 + length


def _is_intact(data: bytes, start: int, end: int) -> bool:
    """Whether the chunk in these bytes has the checksum that is stored with it."""
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
