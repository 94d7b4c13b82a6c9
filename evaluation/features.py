"""Feature extractors with local weights: CLIP for similarity and scores, Inception (inception.py) for FID.

Images are prepared with PIL exactly as CLIP's own processor does (bicubic resize of the shorter side,
centre crop). Everything an extractor did is in its `identity`, which goes into the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vlgpt.errors import UserError

BATCH_SIZE = 32
Item = TypeVar("Item")


def in_batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Lists of at most `BATCH_SIZE` items; of a generator, no more than one batch is in memory."""
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH_SIZE)):
        yield batch


def crop_and_resize(image: Image.Image, size_px: int) -> Image.Image:
    """Shorter side to `size_px` (bicubic, antialiased), centre crop to a square."""
    width, height = image.size
    short = min(width, height)
    # Whole pixels are cut off, not rounded, as in CLIP's own processor.
    width, height = size_px * width // short, size_px * height // short
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return image.crop((left, top, left + size_px, top + size_px))


class ClipFeatures:
    """Projected embeddings of a CLIP folder of open_clip or transformers, float64, not normalised.

    Raises UserError when the folder does not exist.
    """

    def __init__(self, path: Path, *, device: str = "cpu"):
        from vlgpt.models.encoders import hash_weights, load_clip

        if not path.is_dir():
            raise UserError(f"CLIP folder {path} not found; give a folder saved by open_clip or transformers")
        is_open_clip = (path / "open_clip_config.json").is_file()
        library = "open_clip" if is_open_clip else "transformers"
        self.encoder = load_clip(path, library=library, layer=-1).to(device)  # type: ignore[arg-type]
        self.device = device
        self.identity = {
            "extractor": "clip",
            "library": library,
            "name": path.name,
            "weights_hash": hash_weights(self.encoder),
            "resize": f"PIL bicubic, centre crop {self.encoder.image_size_px}",
        }

    def images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Images -> (n, dim)."""
        import torch

        size_px, rows = self.encoder.image_size_px, []
        for batch in in_batches(images):
            arrays = [np.asarray(crop_and_resize(image, size_px), np.float32) for image in batch]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
            with torch.no_grad():
                rows.append(self.encoder.embed_images(pixels.to(self.device)).double().cpu().numpy())
        return np.concatenate(rows)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> (n, dim)."""
        import torch

        with torch.no_grad():
            rows = [self.encoder.embed_texts(batch).double().cpu().numpy() for batch in in_batches(texts)]
        return np.concatenate(rows)
