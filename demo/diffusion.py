"""The tiny twin of the diffusion decoder: a U-Net that trains in minutes, drawing through the same `denoise`.

Two things stand in for Stable Diffusion's parts: pixel unshuffle for the VAE, and a `ConvDecoder` whose
coarse image the U-Net sees and corrects (it diffuses the residual). The schedule has four steps and the
network is trained at just those: predicting clean latents works at 48 pixels, predicting noise does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.decoder import ConvDecoder
from vlgpt.models.component import Component, freeze
from vlgpt.models.denoise import (
    Conditions,
    check_generators,
    count_pictures,
    denoise,
    or_absent,
    predict,
    set_image_scale,
)
from vlgpt.models.diffusion import new_unet, zero_snr_ddim


class PixelShuffleCodec(nn.Module):
    """Pixels as latents: every `factor` x `factor` patch becomes one position with 3 * factor^2 channels."""

    def __init__(self, factor: int, *, scaling_factor: float):
        super().__init__()
        self.factor, self.scaling_factor = factor, scaling_factor

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 * factor^2, H / factor, W / factor)."""
        return F.pixel_unshuffle(pixels, self.factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of `encode`."""
        return F.pixel_shuffle(latents / self.scaling_factor, self.factor)


class TinyDiffusionDecoder(Component):
    """A coarse image plus a diffused residual: a `ImageDecoder`.

    Args:
        coarse: arguments of the `ConvDecoder` inside; `on` takes a trained one.
        image_tokens, image_width, text_tokens, text_width: shapes of z_v and z_t.
        scaling_factor: 1 / standard deviation of the residual, so that latents have about unit variance.
        noise_scale: of the noise, in training and sampling; less noise, less variety, fewer steps needed.
        image_drop, text_drop: probability that a sample lacks that condition, in training mode only.
    """

    # Four steps on a coarse image that is already right: guidance only adds contrast.
    guidance = image_scale = 1.0
    is_deterministic = False

    def __init__(
        self,
        *,
        coarse: dict[str, Any],
        image_tokens: int = 16,
        image_width: int = 128,
        text_tokens: int = 24,
        text_width: int = 128,
        width: int = 128,
        channels: Sequence[int] = (48, 64),
        size_px: int = 48,
        factor: int = 4,
        num_steps: int = 4,
        noise_scale: float = 0.3,
        scaling_factor: float = 5.0,
        image_drop: float = 0.1,
        text_drop: float = 0.1,
    ):
        super().__init__()
        self.size_px, self.num_steps, self.noise_scale = size_px, num_steps, noise_scale
        self.image_drop, self.text_drop = image_drop, text_drop
        self.coarse = ConvDecoder(**coarse)
        freeze(self.coarse)
        self.codec = PixelShuffleCodec(factor, scaling_factor=scaling_factor)
        self.image_absent = nn.Parameter(torch.randn(image_tokens, image_width) * 0.1)
        self.text_absent = nn.Parameter(torch.randn(text_tokens, text_width) * 0.1)
        self.image_input = nn.Linear(image_width, width)
        self.text_input = nn.Linear(text_width, width)
        self.image_positions = nn.Parameter(torch.randn(image_tokens, width))
        self.text_positions = nn.Parameter(torch.randn(text_tokens, width))
        unet_config = {
            "sample_size": size_px // factor,
            "in_channels": 2 * 3 * factor**2,
            "out_channels": 3 * factor**2,
            "block_out_channels": channels,
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D"] * len(channels),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ["CrossAttnUpBlock2D"] * len(channels),
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        self.unet = new_unet(config=unet_config, num_image_tokens=image_tokens)
        self.scheduler: Any = zero_snr_ddim()
        self.scheduler.set_timesteps(num_steps)  # 999, 749, 499, 249 for four steps

    @classmethod
    def on(cls, coarse: ConvDecoder, **arguments: Any) -> TinyDiffusionDecoder:
        """Build on a trained coarse decoder, which is copied and stays frozen."""
        shapes = ("image_tokens", "image_width", "text_tokens", "text_width", "size_px")
        known = {name: coarse.arguments[name] for name in shapes}
        decoder = cls(coarse=coarse.arguments, **{**known, **arguments})
        decoder.coarse.load_state_dict(coarse.state_dict())
        return decoder

    def conditions(self, image: Tensor, text: Tensor, coarse: Tensor) -> Conditions:
        """What the U-Net sees: (B, Kv, Dv), (B, Kt, Dt), (B, 3, H, W) -> Conditions of one width."""
        return Conditions(
            text=self.text_input(text) + self.text_positions,
            image=self.image_input(image) + self.image_positions,
            guide=self.codec.encode(coarse) / self.codec.scaling_factor,
        )

    def training_loss(
        self,
        image_condition: Tensor,
        text_condition: Tensor,
        pixels: Tensor,
        coarse: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the predicted clean residual: (B, Kv, Dv), (B, Kt, Dt), (B, 3, H, W) -> (B,).

        `coarse` (B, 3, H, W) is what the coarse decoder makes of the full conditions; None computes it here.
        Samples that lose a condition get a coarse image of their own. `generator` (CPU) draws timesteps,
        noise and losses of conditions; None is torch's own, as for dropout.
        """
        batch, device = pixels.shape[0], pixels.device
        chances = torch.rand(2, batch, generator=generator).to(device)
        no_image = (chances[0] < self.image_drop) & self.training
        no_text = (chances[1] < self.text_drop) & self.training
        with torch.no_grad():
            if coarse is None or bool((no_image | no_text).any()):
                coarse = self.coarse_pictures(
                    image_condition, text_condition, no_image=no_image, no_text=no_text
                )
            clean = self.codec.encode(pixels - coarse)
        choice = torch.randint(self.num_steps, (batch,), generator=generator)
        timesteps = self.scheduler.timesteps[choice].to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device) * self.noise_scale
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        image = torch.where(no_image[:, None, None], self.image_absent, image_condition)
        text = torch.where(no_text[:, None, None], self.text_absent, text_condition)
        set_image_scale(self.unet, 1.0)
        predicted = predict(self.unet, noisy, timesteps, self.conditions(image, text, coarse))
        return (predicted - clean).square().flatten(1).mean(1)

    def coarse_pictures(self, image: Tensor, text: Tensor, *, no_image: Tensor, no_text: Tensor) -> Tensor:
        """Coarse images of what is left of the conditions: (B, Kv, Dv), (B, Kt, Dt) -> (B, 3, H, W)."""
        image = self.coarse.drop_conditions(image, self.coarse.image_absent, no_image)
        text = self.coarse.drop_conditions(text, self.coarse.text_absent, no_text)
        return self.coarse.decode(image, text)

    @torch.no_grad()
    def decode(
        self,
        image_condition: Tensor | None,
        text_condition: Tensor | None,
        *,
        generators: Any = None,
        guidance: float | None = None,
        image_scale: float | None = None,
    ) -> Tensor:
        """See `ImageDecoder.decode`. Without generators every image starts from the same noise."""
        num_pictures = count_pictures(image_condition, text_condition)
        image = or_absent(image_condition, self.image_absent, num_pictures=num_pictures, name="image")
        text = or_absent(text_condition, self.text_absent, num_pictures=num_pictures, name="text")
        nothing = self.image_absent.expand_as(image), self.text_absent.expand_as(text)
        coarse = self.coarse.decode(image_condition, text_condition)
        latents = denoise(
            self.unet,
            self.scheduler,
            positive=self.conditions(image, text, coarse),
            negative=self.conditions(*nothing, coarse),
            guidance=self.guidance if guidance is None else guidance,
            image_scale=self.image_scale if image_scale is None else image_scale,
            num_steps=self.num_steps,
            generators=check_generators(generators, num_pictures=num_pictures),
            noise_scale=self.noise_scale,
        )
        return (coarse + self.codec.decode(latents)).clamp(-1, 1)
