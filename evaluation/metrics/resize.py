"""The resizings that FID implementations put before Inception: they differ by up to 16 grey levels on sharp images.

torch_fidelity  TensorFlow 1 bilinear: no antialiasing, grid anchored at the top left corner
pytorch_fid     torch bilinear: no antialiasing, pixel centres
torchmetrics    torch bilinear with antialiasing (the default since 1.x; antialias=False is its torch-fidelity mode)
clean_fid       Pillow bicubic with antialiasing on float channels
seed            Pillow bilinear with antialiasing on 8-bit pixels (the pytorch-fid copy in AILab-CVC/SEED)

All return grey levels 0..255 as floats before the network's own scaling. State the mode with every FID.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

ResizeMode = Literal["torch_fidelity", "pytorch_fid", "torchmetrics", "clean_fid", "seed"]
Floats = NDArray[np.float64]

INCEPTION_SIZE_PX = 299


def resize(image: ArrayLike, mode: ResizeMode, *, size_px: int = INCEPTION_SIZE_PX) -> Floats:
    """Resize an 8-bit RGB image to a square: (H, W, 3) uint8 -> (size_px, size_px, 3).

    Raises ValueError for another shape, type or mode.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise ValueError(f"image has shape {pixels.shape} and type {pixels.dtype}; wanted (H, W, 3) uint8")
    if mode == "seed":
        small = Image.fromarray(pixels).resize((size_px, size_px), Image.Resampling.BILINEAR)
        return np.asarray(small, dtype=np.float64)
    if mode == "clean_fid":
        return _pillow_float_bicubic(pixels, size_px)
    if mode not in get_args(ResizeMode):
        raise ValueError(f"resize mode is {mode!r}; wanted one of {', '.join(get_args(ResizeMode))}")
    rows = _bilinear_weights(pixels.shape[0], size_px, mode)
    columns = _bilinear_weights(pixels.shape[1], size_px, mode)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float64)
    return (rows @ planes @ columns.T).transpose(1, 2, 0)


def _pillow_float_bicubic(pixels: NDArray[np.uint8], size_px: int) -> Floats:
    channels = []
    for channel in range(3):
        plane = Image.fromarray(pixels[:, :, channel].astype(np.float32))
        channels.append(np.asarray(plane.resize((size_px, size_px), Image.Resampling.BICUBIC)))
    # UPSTREAM: cleanfid/resize.py clips bicubic overshoot here.
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.float64)


def _bilinear_weights(num_in: int, num_out: int, mode: str) -> Floats:
    """Share of every input line in every output line: -> (num_out, num_in), rows sum to 1."""
    scale = num_in / num_out
    places = np.arange(num_out)
    if mode == "torchmetrics":
        reach = max(scale, 1.0)
        centres = (places[:, None] + 0.5) * scale
        weights = np.maximum(1.0 - np.abs(np.arange(num_in)[None] + 0.5 - centres) / reach, 0.0)
        return weights / weights.sum(axis=1, keepdims=True)
    source = places * scale if mode == "torch_fidelity" else np.maximum((places + 0.5) * scale - 0.5, 0.0)
    below = np.minimum(np.floor(source).astype(np.int64), num_in - 1)
    above = np.minimum(below + 1, num_in - 1)
    share = source - below
    weights = np.zeros((num_out, num_in))
    np.add.at(weights, (places, below), 1.0 - share)
    np.add.at(weights, (places, above), share)
    return weights
