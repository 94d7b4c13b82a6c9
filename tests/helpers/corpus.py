"""Real picture files made on the spot: good ones, odd but valid ones, and malformed ones of many kinds with
the reason that each must be counted under.
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PER_KIND = 8


def pixels(number: int, *, width: int = 64, height: int = 48) -> np.ndarray:
    """A smooth picture that differs with `number`. -> (height, width, 3) uint8"""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [
        np.sin((number % 7 + 2) * x + number),
        np.cos((number % 5 + 1) * y * 3 + number),
        np.sin(x * y * 9),
    ]
    return np.stack([(wave * 100 + 127) for wave in waves], axis=-1).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def picture(number: int, file_format: str = "JPEG", *, width: int = 64, height: int = 48) -> bytes:
    return encode(Image.fromarray(pixels(number, width=width, height=height)), file_format)


def png_bytes(header: bytes, *rows: bytes) -> bytes:
    """A PNG from its IHDR fields and its filtered rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    body = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    return png_bytes(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), bytes(1000))


def deep_png(samples: np.ndarray) -> bytes:
    """A PNG of 16 bits per sample. (height, width, 1 to 4) uint16: grey, grey and alpha, RGB, RGB and alpha."""
    height, width, channels = samples.shape
    colour_type = (0, 4, 2, 6)[channels - 1]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return png_bytes(header, *(b"\0" + row.astype(">u2").tobytes() for row in samples))


def claims(width: int, height: int) -> dict[str, bytes]:
    """Files of every format that claim a size and hold next to nothing."""
    short = struct.pack("<HH", min(width, 65_535), min(height, 65_535))
    sides = struct.pack(">HH", min(height, 65_535), min(width, 65_535))
    components = b"\3\1\x11\0\2\x11\0\3\x11\0"
    bmp = struct.pack("<IIIIiiHH", 154, 0, 54, 40, width, height, 1, 24)
    tags = (
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
    )
    tags += ((278, 4, height), (279, 4, 100))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    frames = [Image.fromarray(pixels(number, width=8, height=8)) for number in range(2)]
    webp = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return {
        "PNG": png_header(width, height),
        "JPEG": b"\xff\xd8\xff\xc0\0\x11\x08" + sides + components + b"\xff\xda" + bytes(100) + b"\xff\xd9",
        "BMP": b"BM" + bmp + struct.pack("<IIiiII", 0, 100, 0, 0, 0, 0) + bytes(100),
        "GIF": b"GIF89a" + short + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + short + b"\0\2\2\x4c\1\0;",
        "TIFF": b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(104),
        "WEBP": bytes(webp),
    }


def long_animation(num_frames: int) -> bytes:
    """A GIF of many frames of 8 x 8 that take 20 bytes each."""
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    first, second = (encode(frame, "GIF") for frame in (image, image.rotate(180)))
    start = second.index(b",")
    return first[:-1] + second[start:-1] * (num_frames - 1) + b";"


def damaged_pictures(number: int) -> dict[str, tuple[bytes, str]]:
    """Kind -> (bytes, reason)."""
    formats = ("JPEG", "PNG", "WEBP", "GIF")
    jpeg, png, webp, gif = (picture(number, name, width=160, height=120) for name in formats)
    corrupt = bytearray(png)
    corrupt[len(png) // 2] ^= 0xFF
    noise = np.random.default_rng(number).integers(0, 256, 3000, dtype=np.uint8).tobytes()
    return {
        "empty": (b"", "empty"),
        "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
        "noise": (b"\x01" + noise, "not_an_image"),
        "half_jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half_png": (png[: len(png) // 2], "truncated"),
        "half_webp": (webp[: len(webp) // 2], "truncated"),
        "half_gif": (gif[: len(gif) // 2], "truncated"),
        "jpeg_start": (jpeg[:20], "truncated"),
        "jpeg_header": (jpeg[: jpeg.index(b"\xff\xc0")], "truncated"),
        "jpeg_of_noise": (jpeg[:2] + b"\1" + noise, "not_an_image"),
        "png_start": (png[:20], "truncated"),
        "corrupt_png": (bytes(corrupt), "undecodable"),
        "png_of_no_pixels": (png_header(300, 300), "truncated"),
        "bomb": (png_header(20_000, 20_000), "too_many_pixels"),
        "small_bomb": (png_header(8_000, 8_000), "too_many_pixels"),
        "ribbon": (png_header(1, 30_000), "too_wide"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not_an_image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>", "not_an_image"),
        "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "not_an_image"),
        "ppm": (b"P6 2 2 255\n" + bytes(12), "not_an_image"),
        "tiff_loop": (b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00", "not_an_image"),
    }


def write_corpus(folder: Path, *, num_good: int) -> tuple[list[str], dict[str, int]]:
    """An imagefolder with good and malformed records mixed: (captions of the good, malformed per reason)."""
    folder.mkdir(parents=True)
    (folder.parent / "secret.jpg").write_bytes(picture(0))
    rows: list[bytes] = []
    expected: dict[str, int] = {}
    captions: list[str] = []

    def row(line: bytes, reason: str | None = None) -> None:
        rows.append(line)
        if reason:
            expected[reason] = expected.get(reason, 0) + 1

    def record(name: object, text: object = "caption", **more: object) -> bytes:
        return json.dumps({"file_name": name, "text": text, **more}).encode()

    for number in range(num_good):
        name = f"good{number}.{('jpg', 'PNG', 'webp')[number % 3]}"
        (folder / name).write_bytes(picture(number, ("JPEG", "PNG", "WEBP")[number % 3]))
        captions.append(f"good picture {number}")
        row(record(name, captions[-1]))
    for number in range(PER_KIND):
        for kind, (data, reason) in damaged_pictures(number).items():
            (folder / f"{kind}{number}.jpg").write_bytes(data)
            row(record(f"{kind}{number}.jpg"), reason)
        (folder / f"folder{number}.jpg").mkdir()
        row(record(f"folder{number}.jpg"), "unreadable_file")
        os.symlink(folder.parent / "secret.jpg", folder / f"link{number}.jpg")
        captions.append(f"linked picture {number}")
        row(record(f"link{number}.jpg", captions[-1]))
        os.mkfifo(folder / f"pipe{number}.jpg")
        row(record(f"pipe{number}.jpg"), "unreadable_file")
        row(record(f"missing{number}.jpg"), "missing_file")
        row(record("../secret.jpg"), "path_outside_folder")
        row(record("/etc/passwd"), "path_outside_folder")
        row(record("null\0byte.jpg"), "path_outside_folder")
        row(record("good0.jpg", "\ud800 alone"), "bad_text")
        row(b'{"file_name": "good0.jpg", "text": "\xff\xfe"}', "text_not_utf8")
        row(b'{"file_name": "good0.jpg", "text": ', "bad_json")
        row(b"[" * 100_000, "bad_json")
        row(b'["good0.jpg", "a list"]', "bad_row")
        row(record("good0.jpg", None), "no_text")
        row(record("good0.jpg", ["a", "b"]), "no_text")
        row(record(None), "no_file_name")
        row(record("good0.jpg", "x" * 300_000), "filtered:text_too_long")
    order = np.random.default_rng(0).permutation(len(rows))
    (folder / "metadata.jsonl").write_bytes(b"\n".join(rows[position] for position in order))
    return captions, expected
