"""Frozen encoders as numbers: their own classes without weights, on the meta device, run once under torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlgpt import settings as s
from vlgpt.planning.shapes import configuration, is_known

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlgpt.models.ip_adapter import Resampler


@dataclass(frozen=True)
class Tower:
    """One frozen tower. `flops` is its forward pass for one image or caption, two for each multiply-add."""

    num_parameters: int
    flops: int
    num_tokens: int
    width: int


def image_tower(encoder: s.EncoderSettings) -> Tower:
    """The image tower that makes patch features. Raises UserError when its shape is unknown."""
    import torch

    clip = _clip(encoder, has_text=False)
    pixels = torch.empty(1, 3, clip.image_size_px, clip.image_size_px, device="meta")
    return _measured(getattr(clip.model, "visual", clip.model), lambda: clip.patches(pixels))


def conditioner_towers(settings: s.EncoderSettings) -> dict[str, Tower]:
    """What makes e_v from pixels and e_t from captions, by name. Raises UserError when a shape is unknown."""
    if settings.library == "ip_adapter":
        return _diffusion_towers(settings.path)
    clip = _clip(settings, has_text=True)
    image = image_tower(settings)
    text = _measured(clip.model, lambda: _text_states(clip))
    rest = text.num_parameters - image.num_parameters
    return {
        "image_conditioner": image,
        "text_conditioner": Tower(rest, text.flops, text.num_tokens, text.width),
    }


def _clip(encoder: s.EncoderSettings, *, has_text: bool) -> Any:
    import torch

    from vlgpt.models.encoders import OpenClipEncoder, TransformersClipEncoder

    options: dict[str, Any] = {"layer": encoder.layer, "has_cls": encoder.has_cls}
    with torch.device("meta"):
        if encoder.library == "open_clip":
            return OpenClipEncoder(encoder.path, has_weights=False, **options)
        config = configuration(encoder.path)
        config = config if has_text else getattr(config, "vision_config", config)
        return TransformersClipEncoder(encoder.path, config=config, **options)


def _text_states(clip: Any) -> Tensor:
    """Of one caption: through the encoder's tokenizer where it has one (open_clip), else of as many ids."""
    return clip.text_states(["a"]) if hasattr(clip, "tokenizer") else _states_of_ids(clip.model.text_model)


def _states_of_ids(text_encoder: Any) -> Tensor:
    import torch

    ids = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=torch.long, device="meta")
    return text_encoder(input_ids=ids).last_hidden_state


def _diffusion_towers(description: str) -> dict[str, Tower]:
    """The encoders of a diffusion decoder that a JSON file names: ViT-H with its Resampler, one or two text towers."""
    import torch
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    from vlgpt.models.conditioners import IpAdapterImageConditioner
    from vlgpt.models.decoder_parts import image_encoder_of, is_sdxl_pipeline, read_parts

    parts = read_parts(description)
    pipeline = parts["pipeline"]
    is_sdxl = is_known(pipeline, "text_encoder_2") or is_sdxl_pipeline(pipeline)
    resampler = (
        None if parts.get("reading") == "features" else _resampler(parts["adapter"], is_sdxl).to("meta")
    )
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(configuration(*image_encoder_of(parts, description)))
        image = IpAdapterImageConditioner(vision, resampler=resampler)
        kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
        kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if is_sdxl else {}
        texts = [kind(configuration(pipeline, folder)) for folder, kind in kinds.items()]
        pixels = torch.empty(1, 3, image.image_size_px, image.image_size_px)
    found = [_measured(text, partial(_states_of_ids, text)) for text in texts]
    return {
        "image_conditioner": _measured(image, lambda: image.condition(pixels)),
        "text_conditioner": Tower(
            sum(tower.num_parameters for tower in found),
            sum(tower.flops for tower in found),
            found[0].num_tokens,
            sum(tower.width for tower in found),
        ),
    }


def _resampler(adapter: str, is_sdxl: bool) -> Resampler:
    """That of a local adapter file; of a hub name, that of the published IP-Adapter Plus for SD 1.5 or SDXL."""
    from vlgpt.models.ip_adapter import Resampler, load_resampler, read_ip_adapter

    if Path(adapter).is_file():
        return load_resampler(read_ip_adapter(adapter))
    return Resampler(width=1280, output_width=2048, num_heads=20) if is_sdxl else Resampler()


def _measured(module: nn.Module, run: Callable[[], Tensor]) -> Tower:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        states = run()
    _, num_tokens, width = states.shape
    count = sum(parameter.numel() for parameter in module.parameters())
    return Tower(count, counter.get_total_flops(), num_tokens, width)
