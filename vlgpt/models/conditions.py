"""The targets of stage 1: frozen encoders make e_v from pixels and e_t from captions (paper §3.1).

Their outputs for a grey image and an empty caption are also the constants of classifier-free guidance. One JSON file
names the parts of a diffusion decoder, for drawing and for targets alike:

    {"pipeline": "stable-diffusion-v1-5", "adapter": "ip-adapter-plus_sd15.safetensors",
     "image_encoder": "ip-adapter/models/image_encoder", "unconditional": "unconditional.safetensors"}

Paths are relative to the file, or hub names. More keys are arguments of `DiffusionDecoder.load` (vae, scheduler,
reading, num_steps, guidance, image_scale). Conditioners need transformers; the decoder does not, it reads the stored
constants.

PAPER: the paper does not name these encoders or shapes (§3.1). IP-Adapter Plus reads OpenCLIP ViT-H/14, whatever
encoder the image tokenizer reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import JsonObject, write_atomic, write_once
from vlgpt.log import get_logger
from vlgpt.models.component import freeze
from vlgpt.models.encoders import Conditioner, Library, PixelEncoder, load_clip, padded_ids
from vlgpt.models.ip_adapter import Resampler, load_resampler, read_ip_adapter
from vlgpt.models.weights import load_part

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers import CLIPVisionModelWithProjection as VisionModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATHS = ("pipeline", "adapter", "unconditional", "vae", "image_encoder")
NEEDED = ("pipeline", "adapter", "unconditional")
# Keys that drawing does not need, and keys that only drawing needs.
FOR_TARGETS = ("image_encoder", "image_subfolder")
FOR_DRAWING = ("vae", "scheduler", "reading", "num_steps", "guidance", "image_scale")
# PAPER: guidance, scale and steps are not stated (§3.1). 7.5 and 50 steps are those of IP-Adapter's demos and of
# Emu; IP-Adapter's authors advise scale 1.0 for an image alone and about 0.5 where the text should weigh more.
GUIDANCE, IMAGE_SCALE = 7.5, 1.0


def load_conditioner(path: str | Path, *, library: Library = "open_clip", **options: Any) -> Conditioner:
    """By library: `ip_adapter` reads the JSON file of a diffusion decoder, the others load a CLIP with these options.

    Raises UserError when a part is missing or does not fit.
    """
    if library == "ip_adapter":
        return DiffusionConditioner.load(path)
    return load_clip(path, library=library, **options)


# ------------------------------------------------------------------------------------ the encoders of a diffusion model


class IpAdapterImageConditioner(PixelEncoder):
    """e_v: penultimate ViT-H features, resampled to 16 tokens, or as they are when `resampler` is None.

    The features are `hidden_states[-2]`: CLS and 256 patches, no final norm (257 x 1280). Raises UserError when the
    Resampler reads features of another width.
    """

    def __init__(
        self, vision: VisionModel, *, resampler: Resampler | None, name: str = "ip-adapter image encoder"
    ):
        super().__init__()
        self.vision, self.resampler = vision, resampler
        config = vision.config
        if resampler is not None and resampler.feature_width != config.hidden_size:
            raise UserError(
                f"the Resampler reads features of width {resampler.feature_width}, the image encoder {name} "
                f"makes width {config.hidden_size}: IP-Adapter Plus needs OpenCLIP ViT-H/14"
            )
        self._set_preprocessing(size_px=cast(int, config.image_size), mean=CLIP_MEAN, std=CLIP_STD)
        freeze(self)

    @classmethod
    def load(
        cls, image_encoder: str | Path, *, adapter: str | Path | None, subfolder: str = ""
    ) -> IpAdapterImageConditioner:
        """The image encoder's folder or hub name, and the IP-Adapter file; `adapter=None` keeps the features.

        Raises UserError when either cannot be loaded or they do not fit each other.
        """
        from transformers import CLIPVisionModelWithProjection

        vision = _pretrained(CLIPVisionModelWithProjection, image_encoder, subfolder=subfolder)
        resampler = None if adapter is None else load_resampler(read_ip_adapter(adapter))
        return cls(vision, resampler=resampler, name=str(image_encoder))

    def _tokens(self, normalised: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, Kv, Dv)."""
        normalised = normalised.to(next(self.vision.parameters()).dtype)
        output = self.vision(pixel_values=normalised, output_hidden_states=True)
        features: Tensor = output.hidden_states[-2]
        if self.resampler is not None:
            features = self.resampler(features)
        return features

    @torch.no_grad()
    def condition(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1]: (B, 3, H, W) -> (B, Kv, Dv)."""
        return self._tokens(self.preprocess(pixels))

    @torch.no_grad()
    def unconditional(self) -> Tensor:
        """The condition of pixels that are zero after normalisation: -> (Kv, Dv).

        UPSTREAM: IP-Adapter Plus uses zero *pixels* of the encoder, not zero tokens (ip_adapter.py,
        IPAdapterPlus.get_image_embeds).
        """
        size = self.image_size_px
        return self._tokens(torch.zeros(1, 3, size, size, device=self.mean.device))[0]


class TextConditioner(nn.Module):
    """e_t: last hidden state of SD 1.5's text encoder after its final norm, padded to 77 x 768."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.length: int = text_encoder.config.max_position_embeddings
        self.shape: tuple[int, int] = (self.length, text_encoder.config.hidden_size)
        freeze(self)

    @classmethod
    def load(cls, pipeline: str | Path) -> TextConditioner:
        """From `text_encoder` and `tokenizer` of a pipeline, local or on the hub. Raises UserError."""
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = _pretrained(CLIPTextModel, pipeline, subfolder="text_encoder")
        return cls(encoder, _tokenizer(CLIPTokenizer, pipeline, subfolder="tokenizer"))

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, Kt, Dt)."""
        ids = padded_ids(self.tokenizer, captions, length=self.length)
        states: Tensor = self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state
        return states

    def unconditional(self) -> Tensor:
        """The condition of the empty caption: -> (Kt, Dt)."""
        return self.condition([""])[0]


class SdxlTextConditioner(nn.Module):
    """e_t of SDXL: penultimate states of both text encoders side by side (77 x 2048), and one more token.

    SDXL also wants the pooled embedding of its second encoder (1280). It is token 78 of the condition, padded with
    zeros to the width of the others, so that every decoder takes one tensor (78 x 2048).
    """

    def __init__(
        self,
        encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
        tokenizers: Sequence[CLIPTokenizer],
    ):
        super().__init__()
        self.encoders, self.tokenizers = nn.ModuleList(encoders), list(tokenizers)
        self.length: int = encoders[0].config.max_position_embeddings
        self.shape: tuple[int, int] = (self.length + 1, sum(e.config.hidden_size for e in encoders))
        freeze(self)

    @classmethod
    def load(cls, pipeline: str | Path) -> SdxlTextConditioner:
        """From an SDXL pipeline, local or on the hub. Raises UserError."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        encoders = [_pretrained(kind, pipeline, subfolder=f"text_encoder{n}") for n, kind in kinds.items()]
        return cls(encoders, [_tokenizer(CLIPTokenizer, pipeline, subfolder=f"tokenizer{n}") for n in kinds])

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, Kt + 1, Dt)."""
        states = []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            ids = padded_ids(tokenizer, captions, length=self.length).to(next(encoder.parameters()).device)
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return with_pooled(torch.cat(states, dim=-1), output.text_embeds)

    def unconditional(self) -> Tensor:
        """The condition of "no text": -> (Kt + 1, Dt).

        UPSTREAM: SDXL's pipelines use zeros, not the empty caption (force_zeros_for_empty_prompt).
        """
        return torch.zeros(self.shape)


def with_pooled(states: Tensor, pooled: Tensor) -> Tensor:
    """Append the pooled embedding as one more token: (B, Kt, Dt), (B, Dp) -> (B, Kt + 1, Dt)."""
    token = nn.functional.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
    return torch.cat([states, token[:, None]], dim=1)


class DiffusionConditioner(Conditioner):
    """The `Conditioner` of a diffusion decoder: IP-Adapter's image encoder and the pipeline's text encoders."""

    layer_name = "-2"

    def __init__(self, image: IpAdapterImageConditioner, text: TextConditioner | SdxlTextConditioner):
        super().__init__()
        self.image, self.text = image, text
        self.image_size_px = image.image_size_px
        self.register_buffer("mean", image.mean.clone(), persistent=False)
        self.register_buffer("std", image.std.clone(), persistent=False)
        freeze(self)

    @classmethod
    def load(cls, path: str | Path) -> DiffusionConditioner:
        """From a JSON description; writes the constants of guidance to its `unconditional` file if there is none.

        Raises UserError when a part is missing or does not fit.
        """
        parts = read_parts(path)
        encoder, subfolder = image_encoder_of(parts, path)
        is_features = parts.get("reading", "tokens") == "features"
        adapter = None if is_features else parts["adapter"]
        image = IpAdapterImageConditioner.load(encoder, adapter=adapter, subfolder=subfolder)
        kind = SdxlTextConditioner if is_sdxl_pipeline(parts["pipeline"]) else TextConditioner
        text = kind.load(parts["pipeline"])
        constants = Path(path).parent / parts["unconditional"]  # an absolute path stays as it is
        if not constants.exists() and unconditional(image, text).save(constants, is_replaced=False):
            get_logger("decoder").info("wrote the unconditional constants %s", constants)
        return cls(image, text)

    def image_condition(self, pixels: Tensor) -> Tensor:
        """Image condition e_v of pixels (B, 3, H, W) in [-1, 1]: (B, Kv, Dv)."""
        return self.image.condition(pixels)

    def text_condition(self, captions: Sequence[str]) -> Tensor:
        """e_t: B strings -> (B, Kt, Dt)."""
        return self.text.condition(captions)


def _pretrained(kind: Any, path: str | Path, *, subfolder: str) -> Any:
    """In float32: transformers keeps the stored type; move or cast the whole conditioner instead. Raises UserError."""
    return load_part(kind, path, subfolder=subfolder, ignore_mismatched_sizes=True).float()


def _tokenizer(kind: type[CLIPTokenizer], path: str | Path, *, subfolder: str) -> CLIPTokenizer:
    try:
        tokenizer: CLIPTokenizer = kind.from_pretrained(str(path), subfolder=subfolder)
        return tokenizer
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"no {kind.__name__} could be loaded from {path}/{subfolder}: {str(error).splitlines()[0]}"
        ) from error


# ------------------------------------------------------------------------------------- constants of guidance


@dataclass(frozen=True)
class Unconditional:
    """The conditions that stand for "nothing": image (Kv, Dv), text (Kt, Dt). Neither is a zero tensor."""

    image: Tensor
    text: Tensor

    def save(self, path: Path, *, is_replaced: bool = True) -> bool:
        """Write both as one safetensors file, or leave the one that is there. -> whether it was written.

        The tasks of a job array each make these constants, and their last bits differ between devices: with
        `is_replaced=False` all tasks read the first one's.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"image": self.image, "text": self.text}
        data = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()})
        if not is_replaced:
            return write_once(path, data)
        write_atomic(path, data)
        return True

    @classmethod
    def from_file(cls, path: str | Path) -> Unconditional:
        """Load both conditions from a safetensors file. Raises UserError when it is missing, damaged, or lacks one."""
        if not Path(path).is_file():
            raise UserError(
                f"unconditional constants {path} are missing: make them once with "
                "vlgpt.models.conditions.unconditional(image, text).save(path)"
            )
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
        if set(stored) != {"image", "text"} or any(tensor.ndim != 2 for tensor in stored.values()):
            found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
            raise UserError(f"{path} holds {found}, wanted image (Kv, Dv) and text (Kt, Dt)")
        return cls(image=stored["image"], text=stored["text"])


def unconditional(
    image: IpAdapterImageConditioner, text: TextConditioner | SdxlTextConditioner
) -> Unconditional:
    """The two constants of classifier-free guidance, to be stored beside the detokenizer."""
    return Unconditional(image=image.unconditional().cpu(), text=text.unconditional().cpu())


# ------------------------------------------------------------------------------------- the JSON description


def read_parts(path: str | Path) -> dict[str, Any]:
    """The description, its relative paths resolved, guidance and scale filled in.

    Raises UserError for a missing file, bad JSON, unknown keys, and a guidance or scale that is no number from 0 on.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path} is no file: wanted a JSON that names {', '.join(NEEDED)} of a diffusion decoder"
        )
    try:
        parts: JsonObject = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    known = {*PATHS, *FOR_TARGETS, *FOR_DRAWING}
    wrong = [f"lacks {name!r}" for name in NEEDED if name not in parts]
    wrong += [f"has the unknown key {name!r}" for name in parts if name not in known]
    if wrong:
        raise UserError(f"{path} {', '.join(wrong)}; known keys: {', '.join(sorted(known))}")
    parts = {"guidance": GUIDANCE, "image_scale": IMAGE_SCALE, **parts}
    for name in ("guidance", "image_scale"):
        value = parts[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise UserError(
                f"{path}: {name} is {value!r}, wanted a number from 0 on (1: no guidance, full scale)"
            )
    for name in PATHS:
        near = path.parent / parts.get(name, "")
        if parts.get(name) and near.exists():
            parts[name] = str(near)
    return parts


def image_encoder_of(parts: Mapping[str, Any], path: str | Path) -> tuple[str, str]:
    """Folder or hub name of the image encoder, and the subfolder. Raises UserError when the description names none."""
    if "image_encoder" not in parts:
        raise UserError(f"{path} lacks 'image_encoder': the OpenCLIP ViT-H/14 that IP-Adapter Plus reads")
    return parts["image_encoder"], parts.get("image_subfolder", "")


def is_sdxl_pipeline(path: str) -> bool:
    """Whether a pipeline, local or on the hub, has a second text encoder."""
    if Path(path).is_dir():
        return (Path(path) / "text_encoder_2").is_dir()
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, subfolder="text_encoder_2")
    except (OSError, ValueError):
        return False
    return True
