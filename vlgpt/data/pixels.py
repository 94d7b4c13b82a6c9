"""Encoded pictures -> square RGB arrays of one size, as CLIP's preprocessing does it (shorter side, centre
crop).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlgpt.images import decode_image


def read_square(data: bytes, *, size_px: int, decoder: Literal["pillow", "fast"]) -> np.ndarray:
    """Decode, resize the shorter side to `size_px` (bicubic), crop the centre: -> (size_px, size_px, 3)
    uint8.

    Large JPEGs are decoded at a fraction of their size: by the reference decoder only while both sides stay
    at least twice too large, so that the result is the same to the eye and within 1/255 on average.
    Raises BadImage.
    """
    is_fast = decoder == "fast"
    image = decode_image(data, fast=is_fast, min_size_px=size_px if is_fast else 2 * size_px)
    if image.size == (size_px, size_px):
        return np.asarray(image)
    return (_square_fast if is_fast else _square)(image, size_px)


def _crop_box(width: int, height: int, size_px: int) -> tuple[float, float, float, float]:
    """The part of the picture that the centre crop of the resized picture shows, in source pixels."""
    shorter = min(width, height)
    new_width, new_height = size_px * width // shorter, size_px * height // shorter
    left, top = round((new_width - size_px) / 2), round((new_height - size_px) / 2)
    x, y = width / new_width, height / new_height
    return left * x, top * y, (left + size_px) * x, (top + size_px) * y


def _square(image: Image.Image, size_px: int) -> np.ndarray:
    """Only the visible part is resampled; equal to resizing the whole picture and cropping it."""
    box = _crop_box(*image.size, size_px)
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))


def _square_fast(image: Image.Image, size_px: int) -> np.ndarray:
    try:
        import cv2
    except ImportError:
        return _square(image, size_px)
    left, top, right, bottom = (round(edge) for edge in _crop_box(*image.size, size_px))
    visible = np.asarray(image)[top:bottom, left:right]
    is_smaller = min(visible.shape[:2]) > size_px
    return cv2.resize(
        visible, (size_px, size_px), interpolation=cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    )


def to_pixels(squares: np.ndarray) -> Tensor:
    """(M, H, W, 3) uint8 -> (M, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
