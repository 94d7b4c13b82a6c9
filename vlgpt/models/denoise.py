"""The one sampling loop: Stable Diffusion 1.5, SDXL and the demo's tiny U-Net all draw through `denoise`.

It calls the U-Net directly instead of diffusers' pipelines, whose batched `ip_adapter_image_embeds` mixes the
tokens of neighbouring images (huggingface/diffusers issue 9813, still there in 0.42). U-Nets and schedulers
are diffusers' objects, used here by duck typing.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vlgpt.seeds import torch_generator


@dataclass(frozen=True)
class Conditions:
    """What one U-Net call sees beside the latents.

    text (B, Kt, D) and image (B, Kv, D) are attended to; pooled (B, Dp) is SDXL's; guide (B, Cg, h, w) is
    put beside the latents as more channels.
    """

    text: Tensor
    image: Tensor
    pooled: Tensor | None = None
    guide: Tensor | None = None

    def with_negative(self, negative: Conditions) -> Conditions:
        """Both halves of classifier-free guidance, the negative first: (B, ...) -> (2B, ...)."""
        joined: dict[str, Any] = {}
        for field in fields(self):
            first, second = getattr(negative, field.name), getattr(self, field.name)
            joined[field.name] = None if second is None else torch.cat([first, second])
        return Conditions(**joined)


@torch.no_grad()
def denoise(
    unet: Any,
    scheduler: Any,
    *,
    positive: Conditions,
    negative: Conditions,
    guidance: float,
    image_scale: float,
    num_steps: int,
    generators: Sequence[torch.Generator],
    noise_scale: float = 1.0,
    size_px: int = 0,
) -> Tensor:
    """From noise to latents: Conditions of B images -> (B, C, h, w) float32, on the U-Net's device.

    The scheduler is copied, so calls are independent. Latents stay float32 whatever the U-Net's type.
    Guidance 1 leaves the negative half out. Not thread-safe: `image_scale` is set on the U-Net. `size_px` is
    for SDXL.
    """
    weight = next(unet.parameters())
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps, device=weight.device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    size, channels = unet.config.sample_size, unet.config.out_channels
    noise = torch.cat([torch.randn((1, channels, size, size), generator=g) for g in generators])
    latents = noise.to(weight.device) * noise_scale * scheduler.init_noise_sigma
    set_image_scale(unet, image_scale)
    is_guided = guidance > 1
    conditions = positive.with_negative(negative) if is_guided else positive
    step_arguments = _step_arguments(scheduler, generators)
    for timestep in scheduler.timesteps:
        both = torch.cat([latents, latents]) if is_guided else latents
        both = scheduler.scale_model_input(both, timestep).to(weight.dtype)
        predicted = predict(unet, both, timestep, conditions, size_px=size_px).float()
        if is_guided:
            without, with_conditions = predicted.chunk(2)
            predicted = without + guidance * (with_conditions - without)
        latents = scheduler.step(predicted, timestep, latents, **step_arguments).prev_sample.float()
    return latents


def predict(
    unet: Any, latents: Tensor, timestep: Tensor, conditions: Conditions, *, size_px: int = 0
) -> Tensor:
    """One U-Net call: (B, C, h, w), () or (B,) timesteps -> (B, C, h, w)."""
    added: dict[str, Tensor] | None = None
    if conditions.pooled is not None:
        # SDXL: original size, crop corner, target size
        time_ids = torch.tensor([[size_px, size_px, 0, 0, size_px, size_px]]).to(latents)
        added = {"text_embeds": conditions.pooled, "time_ids": time_ids.expand(latents.shape[0], -1)}
    if conditions.guide is not None:
        latents = torch.cat([latents, conditions.guide], dim=1)
    # The image attention takes this tuple apart.
    context = (conditions.text, [conditions.image[:, None]])
    return unet(latents, timestep, encoder_hidden_states=context, added_cond_kwargs=added).sample


def set_image_scale(unet: Any, scale: float) -> None:
    """Weight of the image attention beside the text attention; 0 skips it."""
    for processor in unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [scale]


def _step_arguments(scheduler: Any, generators: Sequence[torch.Generator]) -> dict[str, Any]:
    """Stochastic schedulers draw from the images' own generators, one by one."""
    accepts = inspect.signature(scheduler.step).parameters
    return {"generator": list(generators)} if "generator" in accepts else {}


def count_pictures(image: Tensor | None, text: Tensor | None) -> int:
    """The batch size; raises ValueError when both conditions are absent or they differ in it."""
    sizes = {condition.shape[0] for condition in (image, text) if condition is not None}
    if len(sizes) != 1:
        found = "none of them" if not sizes else f"batch sizes {sorted(sizes)}"
        raise ValueError(f"decode needs image_condition, text_condition or both, of one size; found {found}")
    return sizes.pop()


def check_generators(
    generators: Sequence[torch.Generator] | None, *, num_pictures: int
) -> list[torch.Generator]:
    """One CPU generator per image; None gives every image the same noise. Raises ValueError otherwise."""
    if generators is None:
        return [torch_generator("decoder") for _ in range(num_pictures)]
    if len(generators) != num_pictures or any(g.device.type != "cpu" for g in generators):
        devices = sorted({g.device.type for g in generators})
        raise ValueError(
            f"found {len(generators)} generators on {devices} for {num_pictures} pictures: "
            "give one per picture, on cpu"
        )
    return list(generators)


def or_absent(condition: Tensor | None, absent: Tensor, *, num_pictures: int, name: str) -> Tensor:
    """The condition, or the constant for every image: (B, K, D) | None, (K, D) -> (B, K, D)."""
    if condition is None:
        return absent.expand(num_pictures, -1, -1)
    if condition.shape[1:] != absent.shape:
        found, wanted = tuple(condition.shape), f"(B, {absent.shape[0]}, {absent.shape[1]})"
        raise ValueError(f"{name}_condition has shape {found}, this decoder takes {wanted}")
    return condition
