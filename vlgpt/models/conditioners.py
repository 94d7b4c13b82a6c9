"""The frozen encoders of the diffusion decoder: they make e_v from pixels and e_t from captions (paper §3.1).

Their outputs are the targets of the detokenizer, and for a grey picture and an empty caption the constants of
classifier-free guidance. Needs transformers; the decoder itself does not, it reads the stored constants.
PAPER: the paper does not name these encoders or shapes (§3.1). IP-Adapter Plus reads OpenCLIP ViT-H/14, whatever
encoder the image tokenizer reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import write_atomic, write_once
from vlgpt.models.component import freeze
from vlgpt.models.encoders import PixelEncoder, hash_weights
from vlgpt.models.ip_adapter import Resampler, load_resampler, read_ip_adapter
from vlgpt.models.weights import load_whole
from vlgpt.shards.schema import FeatureSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
        """Raises UserError when the file is missing, damaged, or lacks one of the two."""
        if not Path(path).is_file():
            raise UserError(
                f"unconditional constants {path} are missing: make them once with "
                "vlgpt.models.conditioners.unconditional(image, text).save(path)"
            )
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
        if set(stored) != {"image", "text"} or any(tensor.ndim != 2 for tensor in stored.values()):
            found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
            raise UserError(f"{path} holds {found}, wanted image (Kv, Dv) and text (Kt, Dt)")
        return cls(image=stored["image"], text=stored["text"])


class IpAdapterImageConditioner(PixelEncoder):
    """e_v: penultimate ViT-H features, resampled to 16 tokens, or as they are when `resampler` is None.

    The features are `hidden_states[-2]`: CLS and 256 patches, no final norm (257 x 1280).
    """

    def __init__(
        self, vision: nn.Module, *, resampler: Resampler | None, name: str = "ip-adapter image encoder"
    ):
        super().__init__()
        self.vision, self.resampler, self.name = vision, resampler, name
        config: Any = vision.config
        if resampler is not None and resampler.feature_width != config.hidden_size:
            raise UserError(
                f"the Resampler reads features of width {resampler.feature_width}, the image encoder {name} "
                f"makes width {config.hidden_size}: IP-Adapter Plus needs OpenCLIP ViT-H/14"
            )
        self._set_preprocessing(size_px=config.image_size, mean=CLIP_MEAN, std=CLIP_STD)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.shape = (
            (num_patches + 1, config.hidden_size)
            if resampler is None
            else (resampler.num_tokens, resampler.output_width)
        )
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
        name = str(image_encoder) if adapter is None else f"{image_encoder} + {adapter}"
        return cls(vision, resampler=resampler, name=name)

    def _tokens(self, normalised: Tensor) -> Tensor:
        normalised = normalised.to(next(self.vision.parameters()).dtype)
        features = self.vision(pixel_values=normalised, output_hidden_states=True).hidden_states[-2]
        return features if self.resampler is None else self.resampler(features)

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

    def feature_spec(
        self, *, dtype: Literal["float16", "float32", "int8"] = "float16", views: int = 1
    ) -> FeatureSpec:
        """How precomputed e_v are described in a data set."""
        return FeatureSpec(
            name="image_condition",
            encoder=self.name,
            weights_hash=hash_weights(self),
            layer="hidden_states[-2]" if self.resampler is None else "hidden_states[-2] + resampler",
            preprocessing=self.preprocessing,
            shape=self.shape,
            dtype=dtype,
            views=views,
            per="image",
        )


class TextConditioner(nn.Module):
    """e_t: last hidden state of SD 1.5's text encoder after its final norm, padded to 77 x 768."""

    def __init__(
        self, text_encoder: nn.Module, tokenizer: Any, *, name: str = "stable diffusion text encoder"
    ):
        super().__init__()
        self.text_encoder, self.tokenizer, self.name = text_encoder, tokenizer, name
        config: Any = text_encoder.config
        self.length: int = config.max_position_embeddings
        self.shape: tuple[int, int] = (self.length, config.hidden_size)
        freeze(self)

    @classmethod
    def load(cls, pipeline: str | Path) -> TextConditioner:
        """From `text_encoder` and `tokenizer` of a pipeline, local or on the hub. Raises UserError."""
        from transformers import CLIPTextModel, CLIPTokenizer

        encoder = _pretrained(CLIPTextModel, pipeline, subfolder="text_encoder")
        return cls(encoder, _tokenizer(CLIPTokenizer, pipeline, subfolder="tokenizer"), name=str(pipeline))

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, Kt, Dt)."""
        ids = token_ids(self.tokenizer, captions, length=self.length)
        return self.text_encoder(ids.to(next(self.text_encoder.parameters()).device)).last_hidden_state

    def unconditional(self) -> Tensor:
        """The condition of the empty caption: -> (Kt, Dt)."""
        return self.condition([""])[0]

    def feature_spec(self, *, dtype: Literal["float16", "float32", "int8"] = "float16") -> FeatureSpec:
        """How precomputed e_t are described in a data set."""
        return text_spec(
            self, self.name, layer="last_hidden_state", length=self.length, shape=self.shape, dtype=dtype
        )


class SdxlTextConditioner(nn.Module):
    """e_t of SDXL: penultimate states of both text encoders side by side (77 x 2048), and one more token.

    SDXL also wants the pooled embedding of its second encoder (1280). It travels as token 78 of the
    condition, padded with zeros to its width, so that every decoder takes one tensor (78 x 2048).
    """

    def __init__(
        self, encoders: Sequence[nn.Module], tokenizers: Sequence[Any], *, name: str = "sdxl text encoders"
    ):
        super().__init__()
        self.encoders, self.tokenizers, self.name = nn.ModuleList(encoders), list(tokenizers), name
        configs: list[Any] = [encoder.config for encoder in encoders]
        self.length: int = configs[0].max_position_embeddings
        self.shape: tuple[int, int] = (self.length + 1, sum(config.hidden_size for config in configs))
        freeze(self)

    @classmethod
    def load(cls, pipeline: str | Path) -> SdxlTextConditioner:
        """From an SDXL pipeline, local or on the hub. Raises UserError."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        classes = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        encoders = [_pretrained(kind, pipeline, subfolder=f"text_encoder{n}") for n, kind in classes.items()]
        tokenizers = [_tokenizer(CLIPTokenizer, pipeline, subfolder=f"tokenizer{n}") for n in classes]
        return cls(encoders, tokenizers, name=str(pipeline))

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, Kt + 1, Dt)."""
        states = []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            ids = token_ids(tokenizer, captions, length=self.length).to(next(encoder.parameters()).device)
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        return with_pooled(torch.cat(states, dim=-1), output.text_embeds)

    def unconditional(self) -> Tensor:
        """The condition of "no text": -> (Kt + 1, Dt).

        UPSTREAM: SDXL's pipelines use zeros, not the empty caption (force_zeros_for_empty_prompt).
        """
        return torch.zeros(self.shape)

    def feature_spec(self, *, dtype: Literal["float16", "float32", "int8"] = "float16") -> FeatureSpec:
        """How precomputed e_t are described in a data set."""
        layer = "hidden_states[-2] of both + pooled"
        return text_spec(self, self.name, layer=layer, length=self.length, shape=self.shape, dtype=dtype)


def with_pooled(states: Tensor, pooled: Tensor) -> Tensor:
    """Append the pooled embedding as one more token: (B, Kt, Dt), (B, Dp) -> (B, Kt + 1, Dt)."""
    token = nn.functional.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
    return torch.cat([states, token[:, None]], dim=1)


def unconditional(
    image: IpAdapterImageConditioner, text: TextConditioner | SdxlTextConditioner
) -> Unconditional:
    """The two constants of classifier-free guidance, to be stored beside the detokenizer."""
    return Unconditional(image=image.unconditional().cpu(), text=text.unconditional().cpu())


def token_ids(tokenizer: Any, captions: Sequence[str], *, length: int) -> Tensor:
    """Padded and cut as in Stable Diffusion's pipelines: B captions -> (B, length) int64."""
    encoded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return encoded["input_ids"]


def text_spec(
    module: nn.Module,
    name: str,
    *,
    layer: str,
    length: int,
    shape: tuple[int, int],
    dtype: Literal["float16", "float32", "int8"],
) -> FeatureSpec:
    """The FeatureSpec shared by the text conditioners."""
    return FeatureSpec(
        name="text_condition",
        encoder=name,
        weights_hash=hash_weights(module),
        layer=layer,
        preprocessing=f"clip tokens, padded and cut to {length}",
        shape=shape,
        dtype=dtype,
        views=1,
        per="text",
    )


def _pretrained(kind: Any, path: str | Path, *, subfolder: str) -> nn.Module:
    try:
        model = load_whole(kind, str(path), subfolder=subfolder, ignore_mismatched_sizes=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = f"{path}/{subfolder}" if subfolder else str(path)
        raise UserError(
            f"no {kind.__name__} could be loaded from {where}: {str(error).splitlines()[0]}"
        ) from error
    return model.float()  # transformers 5 keeps the stored type; move or cast the whole conditioner instead


def _tokenizer(kind: Any, path: str | Path, *, subfolder: str) -> Any:
    try:
        return kind.from_pretrained(str(path), subfolder=subfolder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"no {kind.__name__} could be loaded from {path}/{subfolder}: {str(error).splitlines()[0]}"
        ) from error
