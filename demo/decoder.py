"""The demo's image decoder: conditions to pixels in one pass. It stands in for Stable Diffusion + IP-Adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vlgpt.models.component import Component


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.layers(x)


class ConvDecoder(Component):
    """Condition tokens -> small transformer -> grid -> convolutions -> pixel shuffle. Deterministic, one pass.

    Both conditions are optional: each has a learned stand-in for "absent", trained by dropping conditions.
    """

    guidance = image_scale = 1.0
    is_deterministic = True

    def __init__(
        self,
        *,
        image_tokens: int,
        image_width: int,
        text_tokens: int,
        text_width: int,
        size_px: int = 48,
        width: int = 192,
        depth: int = 2,
        num_heads: int = 6,
        grid: int = 12,
        channels: int = 64,
        num_blocks: int = 2,
        bottleneck: int = 320,
    ):
        super().__init__()
        self.size_px, self.grid, self.channels = size_px, grid, channels
        self.image_absent = nn.Parameter(torch.randn(image_tokens, image_width) * 0.1)
        self.text_absent = nn.Parameter(torch.randn(text_tokens, text_width) * 0.1)
        self.image_input = nn.Linear(image_width, width)
        self.text_input = nn.Linear(text_width, width)
        self.positions = nn.Parameter(torch.randn(image_tokens + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.to_grid = nn.Sequential(
            nn.Linear((image_tokens + 1) * width, bottleneck),
            nn.Linear(bottleneck, grid * grid * channels // 4),
        )
        self.widen = nn.Conv2d(channels // 4, channels, 3, padding=1)
        scale = size_px // grid
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(num_blocks)))
        self.to_pixels = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, 3 * scale**2, 3, padding=1),
            nn.PixelShuffle(scale),
        )

    def forward(self, image_condition: Tensor, text_condition: Tensor) -> Tensor:
        """(B, Kv, Dv), (B, Kt, Dt) -> (B, 3, H, W), not clipped."""
        image = self.image_input(image_condition)
        text = self.text_input(text_condition).mean(1, keepdim=True)
        hidden = self.norm(self.transformer(torch.cat([image, text], dim=1) + self.positions))
        grid = rearrange(
            self.to_grid(hidden.flatten(1)),
            "b (c h w) -> b c h w",
            h=self.grid,
            w=self.grid,
            c=self.channels // 4,
        )
        return self.to_pixels(self.blocks(self.widen(grid)))

    def drop_conditions(self, condition: Tensor, absent: Tensor, is_dropped: Tensor) -> Tensor:
        """Replace the condition of dropped samples by the learned stand-in: (B, K, D), (K, D), (B,) -> (B, K, D)."""
        return torch.where(is_dropped[:, None, None], absent.to(condition.dtype), condition)

    @torch.no_grad()
    def decode(
        self,
        image_condition: Tensor | None,
        text_condition: Tensor | None,
        *,
        generators: Sequence[torch.Generator] | None = None,
        guidance: float | None = None,
        image_scale: float | None = None,
    ) -> Tensor:
        """See `vlgpt.models.decoders.ImageDecoder.decode`."""
        known = image_condition if image_condition is not None else text_condition
        if known is None:
            raise ValueError("decode needs at least one of image_condition and text_condition")
        batch = known.shape[0]
        image = self.image_absent.expand(batch, -1, -1) if image_condition is None else image_condition
        text = self.text_absent.expand(batch, -1, -1) if text_condition is None else text_condition
        return self(image, text).clamp(-1, 1)
