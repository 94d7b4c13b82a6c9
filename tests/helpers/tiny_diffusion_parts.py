"""Miniatures of the published checkpoints: same classes, folders and key layout, few parameters."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from vlgpt.models.conditions import Unconditional
from vlgpt.models.ip_adapter import IpAdapterWeights, Resampler

TEXT_TOKENS, IMAGE_TOKENS, WIDTH, FEATURES, FEATURE_WIDTH = 7, 4, 32, 17, 48
POOLED = 24


def unet(*, is_sdxl: bool = False) -> UNet2DConditionModel:
    """8 x 8 latents, cross-attention in a down, an up and the middle block."""
    torch.manual_seed(0)
    sdxl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[16, 32],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        **(sdxl if is_sdxl else {}),
    ).eval()


def vae() -> AutoencoderKL:
    """Two levels: 16 x 16 pixels from 8 x 8 latents."""
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def adapter() -> IpAdapterWeights:
    """Weights in the layout of ip-adapter-plus_sd15 for `unet()`. 1 down, 2 up, 1 middle attention."""
    torch.manual_seed(2)
    resampler = Resampler(
        feature_width=FEATURE_WIDTH,
        width=64,
        output_width=WIDTH,
        num_tokens=IMAGE_TOKENS,
        depth=4,
        num_heads=2,
    )
    widths = {1: 16, 3: 16, 5: 16, 7: 32}
    attention = {
        f"{index}.{kind}.weight": torch.randn(width, WIDTH)
        for index, width in widths.items()
        for kind in ("to_k_ip", "to_v_ip")
    }
    image_proj = {name: x + 0.2 * torch.randn_like(x) for name, x in resampler.state_dict().items()}
    return IpAdapterWeights(image_proj, attention, "ip-adapter-plus_tiny")


def write_adapter(path: Path, weights: IpAdapterWeights) -> Path:
    """As the authors publish it: nested dicts in a `.bin`, flat names in a `.safetensors`."""
    if path.suffix == ".bin":
        torch.save({"image_proj": dict(weights.image_proj), "ip_adapter": dict(weights.ip_adapter)}, path)
    else:
        flat = {f"image_proj.{name}": tensor for name, tensor in weights.image_proj.items()}
        flat |= {f"ip_adapter.{name}": tensor for name, tensor in weights.ip_adapter.items()}
        save_file({name: tensor.contiguous() for name, tensor in flat.items()}, path)
    return path


def write_pipeline(folder: Path, *, is_sdxl: bool = False, scheduler=None) -> Path:
    """The unet, vae and scheduler folders of a pipeline. The default DDIM still clips, as old files do."""
    unet(is_sdxl=is_sdxl).save_pretrained(folder / "unet")
    vae().save_pretrained(folder / "vae")
    (scheduler or DDIMScheduler(clip_sample=True, steps_offset=0)).save_pretrained(folder / "scheduler")
    return folder


def normals(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def constants(*, reading: str = "tokens", text_tokens: int = TEXT_TOKENS) -> Unconditional:
    shape = (IMAGE_TOKENS, WIDTH) if reading == "tokens" else (FEATURES, FEATURE_WIDTH)
    return Unconditional(image=normals(*shape, seed=3), text=normals(text_tokens, WIDTH, seed=4))
