"""Small random crops and zooms (paper §4.1: "augmentation techniques employed in CLIP models")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Shares of the side, and radians.
MAX_ZOOM, MAX_SHIFT, MAX_TURN = 0.12, 0.08, 0.1


def random_views(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random zoom, shift and slight turn per image, white outside: (B, 3, H, W) in [-1, 1] -> the same.

    PAPER: the exact augmentation is not given (§4.1); images are never mirrored, as texts name left and right.
    """
    batch = pixels.shape[0]

    def draw(limit: float) -> Tensor:
        return (torch.rand(batch, generator=generator) * 2 - 1) * limit

    angle, zoom = draw(MAX_TURN), 1 + draw(MAX_ZOOM)
    matrix = torch.zeros(batch, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom * torch.cos(angle)
    matrix[:, 0, 1] = -zoom * torch.sin(angle)
    matrix[:, 1, 0] = zoom * torch.sin(angle)
    matrix[:, 0, 2], matrix[:, 1, 2] = draw(2 * MAX_SHIFT), draw(2 * MAX_SHIFT)
    # White is 1: shifted by 1 it is the zero that grid_sample puts outside.
    grid = F.affine_grid(matrix.to(pixels), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
