"""Bytes of an image file -> RGB image or square crop: one decoder for data_prep, training, evaluation and serving.

The first bytes of a file choose its decoder, and sizes are judged from the header before any pixel is decoded.
Everything odd but valid (16-bit grey, palettes, alpha, CMYK, EXIF rotation, animations) ends as the RGB image that a
person would see, on white. No torch here: a data worker or a report must not wait seconds for its import.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageDraw

from vlgpt.image_formats import (
    FORMATS,
    INSTALL,
    check_png_data,
    format_of,
    is_cut,
    tiff_directory,
    webp_size,
    without_metadata,
)

MAX_PIXELS = 50_000_000
MAX_SIDE_PX = 20_000
MAX_ASPECT_FAST = 32
WHITE = (255, 255, 255)
TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
# Pillow speaks about damaged metadata, which is thrown away, and about sizes, which have a limit of their own here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
with contextlib.suppress(
    AttributeError, OSError
):  # libtiff speaks past Python; another build may not show it
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class BadImage(ValueError):
    """An image that cannot be used: `reason` is one word to count by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return BadImage, (self.reason, self.detail)


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, fast: bool = False, min_size_px: int | None = None
) -> Image.Image:
    """Decode one image to RGB, upright, without metadata; of an animation the first frame.

    `min_size_px` lets a large JPEG be decoded at 1/2, 1/4 or 1/8 size as long as its shorter side stays at least that
    long. `fast` uses simplejpeg for JPEG when it is installed.

    Raises BadImage with the reason `empty`, `not_an_image`, `unsupported_format`, `needs_...` (a package),
    `too_many_pixels`, `too_wide`, `truncated` or `undecodable`.
    """
    return open_image(data, max_pixels=max_pixels).decode(fast=fast, min_size_px=min_size_px)


@dataclass
class OpenedImage:
    """An image of which only the header was read; `decode` it once. `is_turned` is then known: width and height of
    the result are exchanged.
    """

    data: bytes
    image: Image.Image
    max_pixels: int = MAX_PIXELS
    is_turned: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) before EXIF rotation."""
        return self.image.size

    def decode(self, *, fast: bool = False, min_size_px: int | None = None) -> Image.Image:
        """See `decode_image`. Raises BadImage."""
        if fast and (pixels := self._decode_fast(min_size_px)) is not None:
            return Image.fromarray(pixels)
        try:
            return self._decode(min_size_px)
        # on damaged files decoders raise whatever they run into
        except Exception as error:
            if len(bare := without_metadata(self.data)) < len(self.data):
                again = open_image(bare, max_pixels=self.max_pixels)
                decoded = again.decode(min_size_px=min_size_px)
                self.is_turned = again.is_turned
                return decoded
            is_truncated = "truncated" in str(error).lower() or is_cut(self.data)
            reason = "truncated" if is_truncated else "undecodable"
            raise BadImage(reason, f"{type(error).__name__}: {error}") from error

    def decode_array(self, *, fast: bool = False, min_size_px: int | None = None) -> np.ndarray:
        """The same as an array, without the copies that Pillow makes. -> (H, W, 3) uint8. Raises BadImage."""
        if fast and (pixels := self._decode_fast(min_size_px)) is not None:
            return pixels
        return np.asarray(self.decode(min_size_px=min_size_px))

    def _decode(self, min_size_px: int | None) -> Image.Image:
        if min_size_px is not None:
            self.image.draft(None, _draft_size(self.image.size, min_size_px))  # type: ignore[arg-type]
        self.image.load()
        if self.image.format == "PNG":
            check_png_data(self.data)
        return _upright(_to_rgb(self.image), self._orientation())

    def _decode_fast(self, min_size_px: int | None) -> np.ndarray | None:
        if format_of(self.data) != "JPEG" or self.image.mode not in ("RGB", "L"):
            return None
        pixels = _decode_jpeg_fast(self.data, min_size_px=min_size_px)
        return None if pixels is None else _upright_array(pixels, self._orientation())

    def _orientation(self) -> int:
        """By EXIF, whatever the format; a damaged EXIF block does not make the image bad."""
        try:
            orientation = int(self.image.getexif().get(0x0112, 1))
        except Exception:
            return 1
        self.is_turned = orientation in TURNED
        return orientation


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> OpenedImage:
    """Read the header only. Raises BadImage for other formats and for more pixels than allowed."""
    if not data:
        raise BadImage("empty")
    _check_size(webp_size(data), max_pixels)
    try:
        try:
            image = _open(data)
        except Exception:
            data = without_metadata(data)
            image = _open(data)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", str(error)) from error
    except Exception as error:
        raise _refusal(data, error) from error
    _check_size(image.size, max_pixels)
    return OpenedImage(data, image, max_pixels)


def _open(data: bytes) -> Image.Image:
    """By the decoder that the first bytes ask for, and no other."""
    name = format_of(data)
    if name is None:
        raise BadImage("truncated" if is_cut(data) else "not_an_image", f"none of {', '.join(FORMATS)}")
    if name not in FORMATS:
        raise BadImage("unsupported_format", f"{name} is not read; convert it to PNG")
    if name in INSTALL and not can_read(name):
        package = INSTALL[name]
        reason = f"needs_{package.partition('>')[0].replace('-', '_')}"
        raise BadImage(reason, f"{name} is read with {package}: pip install '{package}'")
    return Image.open(io.BytesIO(data), formats=(name,))


def _refusal(data: bytes, error: Exception) -> BadImage:
    """Why a file that begins like an image could not be opened."""
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.UnidentifiedImageError):
        # Pillow's own words hold an address in memory, which differs from run to run
        detail = f"Pillow cannot read this {format_of(data)}"
    if is_cut(data):
        return BadImage("truncated", detail)
    start = tiff_directory(data) if format_of(data) == "TIFF" else 0
    # a TIFF without any entry holds no image
    return BadImage("undecodable" if any(data[start : start + 2]) else "not_an_image", detail)


@cache
def can_read(name: str) -> bool:
    """Whether the decoder of this format is installed."""
    from PIL import features

    if name == "HEIF":
        try:
            import pillow_heif
        except ImportError:
            return False
        pillow_heif.register_heif_opener()
        return True
    Image.init()
    optional = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
    return name in Image.OPEN and (name not in optional or bool(features.check(optional[name])))


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width} x {height}, the limit is {max_pixels}")
    if max(width, height) > MAX_SIDE_PX:
        raise BadImage("too_wide", f"{width} x {height}, the limit is {MAX_SIDE_PX} a side")


def _draft_size(size: tuple[int, int], min_size_px: int) -> tuple[int, int]:
    """The size to ask of a scaled decoder so that the shorter side keeps `min_size_px`."""
    shorter = min(size)
    return cast(tuple[int, int], tuple(max(1, side * min_size_px // shorter) for side in size))


def _fast_eighths(shorter: int, min_size_px: int) -> int:
    """The smallest of 1/8, 2/8, 4/8 and 8/8 that keeps `min_size_px`."""
    # libjpeg-turbo could also do 3/8, 5/8 and so on, but without vector instructions: 5/8 takes longer than 8/8.
    return next((eighths for eighths in (1, 2, 4) if -(-shorter * eighths // 8) >= min_size_px), 8)


def _decode_jpeg_fast(data: bytes, *, min_size_px: int | None) -> np.ndarray | None:
    """None when simplejpeg is missing or refuses the file: Pillow then decides and names the reason."""
    try:
        import simplejpeg
    except ImportError:
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
        eighths = 8 if min_size_px is None else _fast_eighths(min(height, width), min_size_px)
        least = {"min_width": -(-width * eighths // 8), "min_height": -(-height * eighths // 8)}
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **(least if eighths < 8 else {}))
    except (ValueError, RuntimeError):
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB as a viewer shows it: 16-bit scaled, transparency on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_high_depth(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*WHITE, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _from_high_depth(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey: Pillow's own convert would clip everything above 255 to white."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    largest = values.max(initial=0)
    # integers have 16 bits; numbers in a float image lie in [0, 1], or mean one of these depths
    depths = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    top = next((depth for depth in depths if largest <= depth), largest)
    grey = np.clip(values * (255.0 / top), 0, 255)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(np.rint(grey).astype(np.uint8), "L").convert("RGB")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Apply the EXIF orientation and forget all metadata."""
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    if orientation in methods:
        image = image.transpose(methods[orientation])
    image.info.clear()
    return image


def _upright_array(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`_upright` for arrays. (H, W, 3) -> (H, W, 3) or (W, H, 3)"""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# -------------------------------------------------------------------------------------------------------- square crops


def read_square(data: bytes, *, size_px: int, decoder: Literal["pillow", "fast"]) -> np.ndarray:
    """Decode, resize the shorter side to `size_px` (bicubic), crop the centre, as CLIP's preprocessing does.

    -> (size_px, size_px, 3) uint8. Raises BadImage.
    """
    # A JPEG decodes fast at 1/2, 1/4 or 1/8 of its size. At least twice the size wanted is asked for, which keeps the
    # result within 1/255 of the exact one on average.
    image = decode_image(data, fast=decoder == "fast", min_size_px=2 * size_px)
    if image.size == (size_px, size_px):
        return np.asarray(image)
    return (_square_fast if decoder == "fast" else _square)(image, size_px)


def _resized(width: int, height: int, size_px: int) -> tuple[int, int, int, int]:
    """Width and height after resizing the shorter side, and the left and top edge of the centre crop."""
    shorter = min(width, height)
    new_width, new_height = size_px * width // shorter, size_px * height // shorter
    return new_width, new_height, round((new_width - size_px) / 2), round((new_height - size_px) / 2)


def _square(image: Image.Image, size_px: int) -> np.ndarray:
    """Only the visible part is resampled; equal to resizing the whole image and cropping it."""
    width, height, left, top = _resized(*image.size, size_px)
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size_px) * x, (top + size_px) * y)
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))


def _square_fast(image: Image.Image, size_px: int) -> np.ndarray:
    """The same by OpenCV, several times as fast; without it, by Pillow."""
    # OpenCV resizes what the crop then throws away: of a ribbon that would be gigabytes
    if (cv2 := _opencv()) is None or max(image.size) > MAX_ASPECT_FAST * min(image.size):
        return _square(image, size_px)
    width, height, left, top = _resized(*image.size, size_px)
    ratio = min(image.size) / size_px
    # OpenCV's filters do not widen when an image shrinks, as Pillow's do. The filter closest to Pillow's bicubic
    # therefore depends on the ratio: with these limits the measured mean distance is 0.3 to 0.6 of 255.
    filters = ((1.25, cv2.INTER_CUBIC), (2.0, cv2.INTER_LINEAR), (float("inf"), cv2.INTER_AREA))
    interpolation = next(chosen for limit, chosen in filters if ratio <= limit)
    resized = cv2.resize(np.asarray(image), (width, height), interpolation=interpolation)
    return resized[top : top + size_px, left : left + size_px]


@cache
def _opencv() -> ModuleType | None:
    """The module, limited to the calling thread (its thread pool does not survive a fork), or None."""
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    return cv2


def planar(squares: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """M images of (H, W, 3), in a list or an array -> (M, 3, H, W), without a copy in between."""
    height, width, channels = squares[0].shape
    pixels = np.empty((len(squares), channels, height, width), np.uint8)
    for target, square in zip(pixels, squares):
        np.copyto(target, square.transpose(2, 0, 1))
    return pixels


# ------------------------------------------------------------------------------------------------------------- writing


def png_bytes(image: Image.Image, *, compress_level: int = 6) -> bytes:
    """An image as a PNG file; `compress_level` 0 is fast, 9 small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def thumbnail(image: Image.Image, size_px: int) -> Image.Image:
    """A copy whose longer side is at most `size_px`."""
    small = image.copy()
    small.thumbnail((size_px, size_px))
    return small


def data_uri(data: bytes, *, kind: Literal["png", "jpeg"] = "png") -> str:
    """The bytes of an image file as a `data:` address, for pages that load nothing."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], *, min_cell_px: int = 128) -> Image.Image:
    """Images of one size under the names of their columns; small ones are enlarged by a whole factor."""
    size, count = next(iter(columns.values()))[0].width, len(next(iter(columns.values())))
    cell, header = size * -(-min_cell_px // size), 16
    sheet = Image.new("RGB", (cell * len(columns), header + cell * count), "white")
    for column, (name, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * cell + 4, 2), name, fill="black")
        for row, picture in enumerate(pictures):
            enlarged = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (column * cell, header + row * cell))
    return sheet
