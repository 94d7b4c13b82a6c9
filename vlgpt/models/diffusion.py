"""Diffusion decoders: z_v and z_t condition a U-Net that draws the image (paper §3.1).

The only file that imports diffusers: loading, image attention, schedulers and VAE. Sampling is in `denoise.py`, the
layout of IP-Adapter files in `ip_adapter.py`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models.component import freeze
from vlgpt.models.conditions import GUIDANCE, IMAGE_SCALE, Unconditional
from vlgpt.models.denoise import Conditions, check_generators, count_pictures, denoise, or_absent
from vlgpt.models.ip_adapter import IpAdapterWeights, check_attention, load_resampler, read_ip_adapter
from vlgpt.models.weights import load_part

Reading = Literal["tokens", "features"]
# UNet2DConditionModel, AutoencoderKL and the schedulers: diffusers' lazy modules hide their types from mypy.
UNet = Any
Vae = Any
Scheduler = Any


# --- IP-Adapter attention in a U-Net


def install_image_attention(unet: UNet, weights: IpAdapterWeights | None, *, num_tokens: int) -> None:
    """Give every cross-attention its key and value projections for image tokens.

    Without weights they start as copies of the text projections, as in IP-Adapter's training. Raises UserError when the
    weights do not fit this U-Net.
    """
    modules = dict(unet.named_modules())
    # In the order of the adapter's file: down blocks, up blocks, middle.
    processors: dict[str, Any] = dict(unet.attn_processors)
    attentions = {
        index: (name, modules[name.removesuffix(".processor")])
        for index, name in enumerate(processors)
        if name.endswith("attn2.processor")
    }
    context_width = unet.config.cross_attention_dim
    if weights is not None:
        widths = {index: attention.to_k.out_features for index, (_, attention) in attentions.items()}
        check_attention(weights, widths, context_width=context_width)
    for index, (name, attention) in attentions.items():
        processor: Any = IPAdapterAttnProcessor2_0(
            attention.to_k.out_features, cross_attention_dim=context_width, num_tokens=[num_tokens]
        ).to(attention.to_k.weight)
        key = attention.to_k.weight if weights is None else weights.ip_adapter[f"{index}.to_k_ip.weight"]
        value = attention.to_v.weight if weights is None else weights.ip_adapter[f"{index}.to_v_ip.weight"]
        with torch.no_grad():
            processor.to_k_ip[0].weight.copy_(key)
            processor.to_v_ip[0].weight.copy_(value)
        processors[name] = processor
    unet.set_attn_processor(processors)


# --- schedulers


def load_scheduler(
    pipeline: str | Path, *, class_name: str | None = None, steps_offset: int | None = 1
) -> Scheduler:
    """The pipeline's scheduler, or another class with the same configuration.

    UPSTREAM: latents are not confined to [-1, 1], so `clip_sample` is always off, and SD 1.5 wants `steps_offset` 1.
    diffusers' pipelines patch both when they load, and `from_config` silently undoes the patch for classes with other
    defaults. None keeps the stored `steps_offset`: SDXL's pipeline patches nothing. Raises UserError when there is no
    configuration or no such class.
    """
    try:
        config = dict(DDIMScheduler.load_config(str(pipeline), subfolder="scheduler"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no scheduler could be loaded from {pipeline}/scheduler: {reason}") from error
    name = class_name or config.get("_class_name", "")
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise UserError(f"diffusers has no scheduler {name!r}; one of its names is DDIMScheduler")
    accepts = inspect.signature(kind.__init__).parameters
    forced = {"clip_sample": False, "steps_offset": steps_offset}
    config.update({key: value for key, value in forced.items() if key in accepts and value is not None})
    return kind.from_config(config)


def zero_snr_ddim() -> Scheduler:
    """DDIM whose first step sees pure noise and whose network predicts the clean latents."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )


# --- latents to pixels


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """A VAE beside a float16 U-Net stays float32: SDXL's overflows in float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def cast_to(model: Any, dtype: torch.dtype) -> Any:
    """The model in this type. One that has it already is returned as it is: diffusers warns at every cast."""
    return model if model.dtype == dtype else model.to(dtype=dtype)


class VaeCodec(nn.Module):
    """The VAE of Stable Diffusion: latents to pixels."""

    def __init__(self, vae: Vae, *, dtype: torch.dtype):
        super().__init__()
        self.vae = cast_to(vae, vae_dtype(dtype))
        # One image at a time: peak memory does not grow with the batch.
        self.vae.enable_slicing()
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) float32 -> (B, 3, H, W) float32, not clipped."""
        config = self.vae.config
        latents = latents / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (
                torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype)).sample
        return pixels.float()


# --- the decoder


class DiffusionDecoder(nn.Module):
    """Stable Diffusion 1.5 or SDXL with IP-Adapter Plus: a frozen `ImageDecoder`.

    PAPER: e_v is not defined (§3.1). `reading="tokens"` (default) takes z_v as the 16 tokens that the U-Net attends
    to, `"features"` as the 257 x 1280 features of the image encoder, with the Resampler inside the decoder.
    SDXL's text condition carries the pooled embedding as its last token, see `SdxlTextConditioner`.
    """

    absent_image: Tensor
    absent_text: Tensor
    is_deterministic = False

    def __init__(
        self,
        *,
        unet: UNet,
        vae: Vae,
        scheduler: Scheduler,
        adapter: IpAdapterWeights,
        unconditional: Unconditional,
        reading: Reading = "tokens",
        num_steps: int = 50,
        guidance: float = GUIDANCE,
        image_scale: float = IMAGE_SCALE,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if unet.config.encoder_hid_dim_type is not None or unet.config.time_cond_proj_dim is not None:
            raise UserError(
                "this U-Net wants inputs that the decoder does not make (encoder_hid_dim_type "
                f"{unet.config.encoder_hid_dim_type}, time_cond_proj_dim {unet.config.time_cond_proj_dim}): "
                "use a plain Stable Diffusion 1.5 or SDXL"
            )
        resampler = load_resampler(adapter)
        install_image_attention(unet, adapter, num_tokens=resampler.num_tokens)
        self.unet, self.scheduler, self.num_steps = cast_to(unet, dtype), copy.deepcopy(scheduler), num_steps
        self.guidance, self.image_scale = guidance, image_scale
        self.codec = VaeCodec(vae, dtype=dtype)
        self.pooled_width = 0
        if is_sdxl(unet):
            # Its added embedding reads the pooled text and six sizes.
            sizes_width = 6 * unet.config.addition_time_embed_dim
            self.pooled_width = unet.config.projection_class_embeddings_input_dim - sizes_width
        self.size_px = int(unet.config.sample_size) * self.codec.scale_factor
        self.resampler = resampler if reading == "features" else None
        image_width = resampler.feature_width if reading == "features" else resampler.output_width
        _check_width("image", unconditional.image, image_width)
        _check_width("text", unconditional.text, unet.config.cross_attention_dim)
        self.register_buffer("absent_image", unconditional.image.float())
        self.register_buffer("absent_text", unconditional.text.float())
        freeze(self)

    @classmethod
    def load(
        cls,
        pipeline: str | Path,
        *,
        adapter: str | Path,
        unconditional: str | Path,
        vae: str | Path | None = None,
        scheduler: str | None = None,
        reading: Reading = "tokens",
        num_steps: int = 50,
        guidance: float = GUIDANCE,
        image_scale: float = IMAGE_SCALE,
        dtype: torch.dtype = torch.float32,
    ) -> DiffusionDecoder:
        """From a pipeline (folder or hub name; unet, vae, scheduler), an IP-Adapter file and the constants.

        `vae` is another VAE's folder or hub name (IP-Adapter's demos use sd-vae-ft-mse), `scheduler` another
        scheduler's class name. Raises UserError when a part is missing or the parts do not fit each other.
        """
        weights, constants = read_ip_adapter(adapter), Unconditional.from_file(unconditional)
        unet = load_part(UNet2DConditionModel, pipeline, subfolder="unet", torch_dtype=dtype)
        place: dict[str, Any] = {"path": pipeline, "subfolder": "vae"} if vae is None else {"path": vae}
        autoencoder = load_part(AutoencoderKL, **place, torch_dtype=vae_dtype(dtype))
        sampler = load_scheduler(pipeline, class_name=scheduler, steps_offset=None if is_sdxl(unet) else 1)
        get_logger("decoder").info("decoder %s, adapter %s, %s", pipeline, adapter, type(sampler).__name__)
        return cls(
            unet=unet,
            vae=autoencoder,
            scheduler=sampler,
            adapter=weights,
            unconditional=constants,
            reading=reading,
            num_steps=num_steps,
            guidance=guidance,
            image_scale=image_scale,
            dtype=dtype,
        )

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
        """(B, Kv, Dv) | None, (B, Kt, Dt) | None -> (B, 3, H, W) in [-1, 1]: see `ImageDecoder.decode`.

        Without generators every image starts from the same noise. An absent image condition means scale 0.
        """
        image_scale = self.image_scale if image_scale is None else image_scale
        num_pictures = count_pictures(image_condition, text_condition)
        latents = denoise(
            self.unet,
            self.scheduler,
            positive=self.conditions(image_condition, text_condition, num_pictures=num_pictures),
            negative=self.conditions(None, None, num_pictures=num_pictures),
            guidance=self.guidance if guidance is None else guidance,
            image_scale=0.0 if image_condition is None else image_scale,
            num_steps=self.num_steps,
            generators=check_generators(generators, num_pictures=num_pictures),
            size_px=self.size_px,
        )
        return self.codec.decode(latents).clamp(-1, 1)

    def conditions(self, image: Tensor | None, text: Tensor | None, *, num_pictures: int) -> Conditions:
        """What the U-Net attends to: (B, Kv, Dv) | None, (B, Kt, Dt) | None -> conditions of B images.

        The stored constants replace what is absent.
        """
        weight = next(self.unet.parameters())
        image = or_absent(image, self.absent_image, num_pictures=num_pictures, name="image").to(weight)
        text = or_absent(text, self.absent_text, num_pictures=num_pictures, name="text").to(weight)
        if self.resampler is not None:
            image = self.resampler(image.float()).to(weight)
        if self.pooled_width == 0:
            return Conditions(text, image)
        return Conditions(text[:, :-1], image, text[:, -1, : self.pooled_width])


def is_sdxl(unet: UNet) -> bool:
    """Whether the U-Net also wants pooled text and image sizes."""
    return bool(unet.config.addition_embed_type == "text_time")


def _check_width(name: str, constant: Tensor, width: int) -> None:
    if constant.shape[-1] != width:
        raise UserError(
            f"the unconditional {name} constant has width {constant.shape[-1]}, this decoder takes {width}: "
            "it was made with another encoder or another reading of e_v"
        )


def new_unet(*, config: Mapping[str, Any], num_image_tokens: int) -> UNet:
    """An untrained U-Net with image attention, for decoders that are trained from scratch."""
    unet: UNet = UNet2DConditionModel(**config)
    install_image_attention(unet, None, num_tokens=num_image_tokens)
    return unet
