"""Feature extractors with local weights: CLIP for similarity and scores, Inception for FID.

Pictures are prepared with PIL exactly as CLIP's own processor does (bicubic resize of the shorter side,
centre crop). Everything an extractor did is in its `identity`, which goes into the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlgpt.errors import UserError

BATCH_SIZE = 32


class Features(Protocol):
    """Pictures (and texts, for CLIP) -> one feature row each."""

    identity: Mapping[str, Any]

    def images(self, images: Sequence[Image.Image]) -> np.ndarray: ...


def crop_and_resize(image: Image.Image, size_px: int) -> Image.Image:
    """Shorter side to `size_px` (bicubic, antialiased), centre crop to a square."""
    width, height = image.size
    short = min(width, height)
    width, height = (
        size_px * width // short,
        size_px * height // short,
    )  # whole pixels, as CLIP's own processor
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))


class ClipFeatures:
    """Projected embeddings of a CLIP folder of open_clip or transformers, float64, not normalised."""

    def __init__(self, path: Path, *, device: str = "cpu"):
        from vlgpt.models.encoders import hash_weights, load_clip

        if not path.is_dir():
            raise UserError(f"CLIP folder {path} not found; give a folder saved by open_clip or transformers")
        library = "open_clip" if (path / "open_clip_config.json").is_file() else "transformers"
        self.encoder = load_clip(path, library=library, layer=-1).to(device)  # type: ignore[arg-type]
        self.device = device
        self.identity = {
            "extractor": "clip",
            "library": library,
            "name": path.name,
            "weights_hash": hash_weights(self.encoder),
            "resize": f"PIL bicubic, centre crop {self.encoder.image_size_px}",
        }

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """`(n, dim)`."""
        import torch

        size_px, rows = self.encoder.image_size_px, []
        for start in range(0, len(images), BATCH_SIZE):
            batch = [
                np.asarray(crop_and_resize(i, size_px), np.float32)
                for i in images[start : start + BATCH_SIZE]
            ]
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 127.5 - 1
            with torch.no_grad():
                rows.append(self.encoder.embed_images(pixels.to(self.device)).double().cpu().numpy())
        return np.concatenate(rows)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """`(n, dim)`."""
        import torch

        rows = []
        for start in range(0, len(texts), BATCH_SIZE):
            with torch.no_grad():
                rows.append(
                    self.encoder.embed_texts(texts[start : start + BATCH_SIZE]).double().cpu().numpy()
                )
        return np.concatenate(rows)


def in_batches(
    extract: Callable[[Sequence[Image.Image]], np.ndarray],
    read: Callable[[int], Image.Image],
    num_images: int,
) -> np.ndarray:
    """Features of many pictures `-> (num_images, dim)`, at most one batch of them in memory."""
    rows = [
        extract([read(i) for i in range(start, min(start + BATCH_SIZE, num_images))])
        for start in range(0, num_images, BATCH_SIZE)
    ]
    return np.concatenate(rows)
