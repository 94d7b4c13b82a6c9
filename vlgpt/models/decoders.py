"""Image decoders: from the two conditions (z_v, z_t) to pixels, behind one interface.

`DiffusionDecoder` in `diffusion.py` is ours. Any other is a `Component` that answers to the same `decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class ImageDecoder(Protocol):
    """What generation, evaluation and `vlgpt reconstruct` need of a decoder.

    `guidance` is the scale of classifier-free guidance for every image that is not asked for otherwise (1: none);
    `image_scale`, likewise, the weight of z_v beside z_t. `is_deterministic`: equal conditions give equal images.
    """

    size_px: int
    guidance: float
    image_scale: float
    is_deterministic: bool

    def decode(
        self,
        image_condition: Tensor | None,
        text_condition: Tensor | None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        guidance: float | None = None,
        image_scale: float | None = None,
    ) -> Tensor:
        """(B, Kv, Dv) | None, (B, Kt, Dt) | None -> (B, 3, H, W) in [-1, 1]; None leaves that condition out.

        One CPU generator per image gives the start noise, so results depend on neither batch nor device. Guidance and
        scale are the decoder's own unless given; decoders without noise ignore them and the generators.
        """
        ...
