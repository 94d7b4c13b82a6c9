"""An image as found -> an image as stored: decoded once, upright, RGB, resized, encoded, without metadata."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from vlgpt.images import MAX_PIXELS, BadImage, open_image

CACHE_BYTES = 32 << 20
CACHED_BYTES = 16 << 10
# what a cached image costs beside its bytes
ENTRY_BYTES = 1500
# factors to reduce by; scaled JPEG decoding leaves less than 2
LINEAR_BELOW, AREA_FROM = 1.4, 2.0
HASHED_PX = 32
# 40 % faster than zlib's 6, 1 % larger on drawings
PNG_LEVEL = 3
Pixels = TypeVar("Pixels")


class ImageSettings(BaseModel):
    """How images are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_format: Literal["jpg", "png", "webp"] = Field("jpg", description="encoding of stored images")
    quality: int = Field(95, ge=1, le=100, description="of jpg and webp")
    size_px: int = Field(256, ge=1, description="shorter side is reduced to this; smaller images stay")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="larger images are refused by their header")
    max_file_bytes: int = Field(100 << 20, ge=1, description="larger files are refused unread")
    min_side_px: int | None = Field(None, ge=1, description="drop images with a shorter side")
    max_side_px: int | None = Field(None, ge=1, description="drop images with a longer side")
    max_aspect: float | None = Field(None, ge=1, description="drop images with a larger side ratio")
    min_file_bytes: int | None = Field(None, ge=1, description="drop images from smaller files")
    perceptual_hash: bool = Field(
        True, description="store a 64-bit perceptual hash for near-duplicate removal"
    )
    fast: bool = Field(False, description="use simplejpeg and OpenCV (pip install vlgpt[fast]); other bytes")


@dataclass(frozen=True)
class StoredImage:
    """Encoded bytes and what is worth knowing about the original."""

    suffix: str
    data: bytes
    info: dict[str, Any]


class ImagePreparer:
    """Prepares images; small ones that occur often are prepared once and kept, in CACHE_BYTES at most."""

    def __init__(self, settings: ImageSettings, *, cache_bytes: int = CACHE_BYTES):
        self._settings = settings
        self._cache: OrderedDict[bytes, StoredImage] = OrderedDict()
        self._free_bytes = cache_bytes
        if settings.fast:
            import cv2

            # workers share the cores; threads inside them would only get in each other's way
            cv2.setNumThreads(0)

    def prepare(self, data: bytes) -> StoredImage:
        """Raises BadImage; reasons that start with `filtered:` come from the settings' filters."""
        digest = hashlib.sha256(data)
        if (stored := self._cache.get(digest.digest())) is not None:
            return stored
        stored = _prepare(data, digest.hexdigest(), self._settings)
        if len(stored.data) <= CACHED_BYTES:
            self._cache[digest.digest()] = stored
            self._free_bytes -= len(stored.data) + ENTRY_BYTES
            while self._free_bytes < 0:
                self._free_bytes += len(self._cache.popitem(last=False)[1].data) + ENTRY_BYTES
        return stored


def _prepare(data: bytes, sha256: str, settings: ImageSettings) -> StoredImage:
    opened = open_image(data, max_pixels=settings.max_pixels)
    size = opened.size
    _filter(size, len(data), settings)
    if settings.fast:
        pixels = _resize_array(opened.decode_array(fast=True, min_size_px=settings.size_px), settings.size_px)
        data = _encoded(_encode_array, pixels, settings)
        phash = _perceptual_hash_array(pixels) if settings.perceptual_hash else None
    else:
        image = _resize(opened.decode(min_size_px=settings.size_px), settings.size_px)
        data = _encoded(_encode, image, settings)
        phash = perceptual_hash(image) if settings.perceptual_hash else None
    if opened.is_turned:
        # the header gives the size before the image is turned upright
        size = size[1], size[0]
    info = {"sha256": sha256, "width": size[0], "height": size[1]}
    if phash is not None:
        info["phash"] = f"{phash:016x}"
    return StoredImage(settings.image_format, data, info)


def _encoded(
    encode: Callable[[Pixels, ImageSettings], bytes], image: Pixels, settings: ImageSettings
) -> bytes:
    """Raises BadImage(`not_encodable`): WebP ends at 16,383 pixels a side, for example."""
    try:
        return encode(image, settings)
    except Exception as error:
        raise BadImage("not_encodable", f"as {settings.image_format}: {error}") from error


def _filter(size: tuple[int, int], num_bytes: int, settings: ImageSettings) -> None:
    shorter, longer = min(size), max(size)
    if settings.min_file_bytes is not None and num_bytes < settings.min_file_bytes:
        raise BadImage("filtered:file_bytes")
    if settings.min_side_px is not None and shorter < settings.min_side_px:
        raise BadImage("filtered:min_side")
    if settings.max_side_px is not None and longer > settings.max_side_px:
        raise BadImage("filtered:max_side")
    if settings.max_aspect is not None and longer > settings.max_aspect * shorter:
        raise BadImage("filtered:aspect")


def _new_size(size: tuple[int, int], size_px: int) -> tuple[int, int]:
    """Shorter side to `size_px` at most, ratio kept."""
    shorter = min(size)
    if shorter <= size_px:
        return size
    return max(1, round(size[0] * size_px / shorter)), max(1, round(size[1] * size_px / shorter))


def _resize(image: Image.Image, size_px: int) -> Image.Image:
    size = _new_size(image.size, size_px)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _resize_array(pixels: np.ndarray, size_px: int) -> np.ndarray:
    """Within 1.5 of 255 of Pillow's bicubic on average, four times as fast as OpenCV's area averaging, which only
    large reductions need: bilinear, from LINEAR_BELOW after a slight blur against aliasing.

    (H, W, 3) uint8 -> (H', W', 3) uint8
    """
    import cv2

    old = pixels.shape[1], pixels.shape[0]
    size = _new_size(old, size_px)
    if size == old:
        return pixels
    factor = min(old) / size_px
    if factor >= AREA_FROM:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if factor >= LINEAR_BELOW:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0.45 + (factor - LINEAR_BELOW) / 2)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def _encode(image: Image.Image, settings: ImageSettings) -> bytes:
    buffer = io.BytesIO()
    if settings.image_format == "png":
        image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    else:
        image.save(buffer, "JPEG" if settings.image_format == "jpg" else "WEBP", quality=settings.quality)
    return buffer.getvalue()


def _encode_array(pixels: np.ndarray, settings: ImageSettings) -> bytes:
    if settings.image_format != "jpg":
        return _encode(Image.fromarray(pixels), settings)
    import simplejpeg

    return simplejpeg.encode_jpeg(pixels, quality=settings.quality, colorsubsampling="420")


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash of Zauner (2010): sign of the 8x8 lowest frequencies of a 32x32 grey copy, against
    their median.
    """
    grey = image.convert("L").resize((HASHED_PX, HASHED_PX), Image.Resampling.LANCZOS)
    return _sign_bits(np.asarray(grey, dtype=np.float64))


def _perceptual_hash_array(pixels: np.ndarray) -> int:
    """The same hash from OpenCV's resizing: at most a few bits away, in a tenth of the time. (H, W, 3) uint8
    -> hash
    """
    import cv2

    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    while min(grey.shape) >= 4 * HASHED_PX:
        # halving averages 2 x 2, five times as fast as any other area
        grey = cv2.resize(grey, (grey.shape[1] // 2, grey.shape[0] // 2), interpolation=cv2.INTER_LINEAR)
    return _sign_bits(
        cv2.resize(grey, (HASHED_PX, HASHED_PX), interpolation=cv2.INTER_AREA).astype(np.float64)
    )


def _sign_bits(grey: np.ndarray) -> int:
    low = _dct_rows() @ grey @ _dct_rows().T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


@lru_cache(maxsize=1)
def _dct_rows() -> np.ndarray:
    """The first 8 rows of the 32-point DCT-II. -> (8, 32)"""
    frequency, position = np.arange(8)[:, None], np.arange(32)[None, :]
    return 2 * np.cos(np.pi * frequency * (2 * position + 1) / 64)
