"""Frozen encoders: CLIP towers through open_clip or transformers, behind one interface."""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.models.component import freeze
from vlgpt.models.weights import load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Library = Literal["open_clip", "transformers", "ip_adapter"]


def hash_weights(module: nn.Module) -> str:
    """A hash of all parameters and buffers, the same on every machine (bytes of the tensors, names sorted)."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class PixelEncoder(nn.Module):
    """Base of frozen image encoders. Pixels come in [-1, 1]; each encoder applies its own size and statistics."""

    image_size_px: int
    mean: Tensor
    std: Tensor

    def _set_preprocessing(self, *, size_px: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size_px = size_px
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Resize if needed and normalise: (B, 3, H, W) in [-1, 1] -> (B, 3, size, size).

        Raises ValueError for uint8.
        """
        if pixels.dtype == torch.uint8:
            raise ValueError("pixels are still uint8: bring the batch to its device first (`to_device`)")
        size = (self.image_size_px, self.image_size_px)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return (pixels * 0.5 + 0.5 - self.mean.to(pixels)) / self.std.to(pixels)

    @property
    def preprocessing(self) -> str:
        """A text that changes with anything done to pixels before the first layer."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return json.dumps(
            {"size_px": self.image_size_px, "resize": "bicubic", "crop": "center", "mean": mean, "std": std}
        )


class Conditioner(PixelEncoder, ABC):
    """What makes the targets of stage 1: a CLIP, or the encoders of a diffusion decoder.

    `layer_name` says which hidden states e_v are, in the specifications of stored features.
    """

    layer_name: str

    @abstractmethod
    def image_condition(self, pixels: Tensor) -> Tensor:
        """Image condition e_v of pixels (B, 3, H, W) in [-1, 1]: (B, Kv, Dv)."""

    @abstractmethod
    def text_condition(self, captions: Sequence[str]) -> Tensor:
        """e_t: B strings -> (B, Kt, Dt)."""


class ClipEncoder(Conditioner):
    """An image tower and a text tower, frozen. Patch features and text states can also be the targets of stage 1."""

    def _settle(self, *, layer: int, has_cls: bool, depth: int, name: str) -> None:
        """Choose the hidden states that `patches` gives, see `block_of`, and freeze."""
        self.block, self.has_cls = block_of(layer, depth, name=name), has_cls
        self.layer_name = f"{layer}{'' if has_cls else ' without CLS'}"
        freeze(self)

    @abstractmethod
    def patches(self, pixels: Tensor) -> Tensor:
        """Hidden states of the chosen layer, CLS first when kept: (B, 3, H, W) -> (B, P, C)."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Projected image embedding, not normalised: (B, 3, H, W) -> (B, E)."""

    @abstractmethod
    def text_states(self, captions: Sequence[str]) -> Tensor:
        """Hidden states of the text tower after its final norm: B strings -> (B, Kt, Dt)."""

    @abstractmethod
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Projected text embedding, not normalised: B strings -> (B, E)."""

    def image_condition(self, pixels: Tensor) -> Tensor:
        """The patch features are the condition e_v of pixels (B, 3, H, W) in [-1, 1]: (B, P, C)."""
        return self.patches(pixels)

    def text_condition(self, captions: Sequence[str]) -> Tensor:
        """e_t: B strings -> (B, Kt, Dt)."""
        return self.text_states(captions)


class OpenClipEncoder(ClipEncoder):
    """A CLIP or SigLIP of open_clip: a folder with open_clip_config.json, an `hf-hub:` name, or a model name.

    A model name needs `pretrained`: a tag that open_clip knows, or a local file. Raises UserError when the weights
    cannot be loaded (nothing is ever left random), or when the image tower has no patch tokens. `has_weights=False`
    builds the classes alone, for planning on the meta device.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pretrained: str | None = None,
        layer: int = -2,
        has_cls: bool = True,
        has_weights: bool = True,
    ):
        super().__init__()
        import open_clip

        self.model: Any
        is_folder = (Path(path) / "open_clip_config.json").is_file()
        name = f"local-dir:{Path(path).resolve()}" if is_folder else str(path)
        has_schema = is_folder or name.startswith("hf-hub:")
        if has_weights and not has_schema and pretrained is None:
            raise UserError(
                f"open_clip model {name!r} without weights: it is no folder with open_clip_config.json, so set "
                "`pretrained` to a tag (such as laion2b_s32b_b79k) or a local file"
            )
        pretrained = None if has_schema else pretrained
        try:
            if has_weights:
                self.model = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
            else:
                self.model = _without_weights(open_clip, name)
        except (RuntimeError, OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"open_clip could not load {str(path)!r}: {reason}") from error
        visual, size = self.model.visual, self.model.visual.image_size
        self._set_preprocessing(
            size_px=size if isinstance(size, int) else size[0],
            mean=getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN,
            std=getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD,
        )
        self._settle(layer=layer, has_cls=has_cls, depth=_num_blocks(visual, name=str(path)), name=str(path))
        if has_weights:
            self.tokenizer = self._load_tokenizer(open_clip, Path(path) if is_folder else None, str(path))
        else:
            self.tokenizer = lambda texts: torch.zeros(
                len(texts), self.model.context_length, dtype=torch.long
            )

    def _load_tokenizer(
        self, open_clip: ModuleType, folder: Path | None, name: str
    ) -> Callable[[list[str]], Tensor]:
        """B strings -> (B, context length) int64."""
        if folder is not None and (folder / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            length = self.model.context_length
            return lambda texts: torch.tensor(
                [pad_ids([*tokenizer.encode(t)[: length - 1], tokenizer.eos_token_id], length) for t in texts]
            )
        found: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            name if folder is None else f"local-dir:{folder.resolve()}"
        )
        return found

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, C)."""
        found = self.model.visual.forward_intermediates(
            self.preprocess(pixels),
            indices=[self.block],
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens: Tensor = found["image_intermediates"][0]
        # SigLIP has no class token
        prefix = found.get("image_intermediates_prefix", [tokens[:, :0]])[0]
        return torch.cat([prefix, tokens], dim=1) if self.has_cls else tokens

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)."""
        embedding: Tensor = self.model.encode_image(self.preprocess(pixels))
        return embedding

    def _text_ids(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, context length) int64."""
        return self.tokenizer(list(captions)).to(self.mean.device)

    def text_states(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, Kt, Dt)."""
        found = self.model.forward_intermediates(
            text=self._text_ids(captions),
            text_indices=1,
            normalize_intermediates=True,
            intermediates_only=True,
        )
        states: Tensor = found["text_intermediates"][-1]
        return states

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, E)."""
        embedding: Tensor = self.model.encode_text(self._text_ids(captions))
        return embedding


def _without_weights(open_clip: ModuleType, name: str) -> nn.Module:
    """The classes of a model on the meta device, without open_clip's warning that its weights are random."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        model: nn.Module = open_clip.create_model(name, load_weights=False, device="meta")
        return model
    finally:
        logging.disable(before)


class TransformersClipEncoder(ClipEncoder):
    """A CLIP or SigLIP of transformers, or the image tower of one alone, from a folder or hub name.

    A tower alone (`CLIPVisionModel`, `SiglipVisionModel`) gives patches; asking it for more raises UserError, and so
    does whatever cannot be loaded or lacks weights. With `config` the classes alone are built, for planning on the meta
    device: they read no file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layer: int = -2,
        has_cls: bool = True,
        config: PreTrainedConfig | None = None,
    ):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.name = str(path)
        mean, std = ((0.5, 0.5, 0.5),) * 2
        self.model: Any
        self.text_tokenizer = None
        try:
            if config is not None:
                self.model = AutoModel.from_config(config)
            else:
                self.model = load_whole(AutoModel, self.name, ignore_mismatched_sizes=True)
                processor = AutoImageProcessor.from_pretrained(self.name)
                mean, std = processor.image_mean, processor.image_std
            is_whole = hasattr(self.model.config, "vision_config")
            if config is None and is_whole:
                self.text_tokenizer = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"transformers could not load a CLIP from {self.name!r}: {reason}") from error
        if not hasattr(self.model.config, "vision_config" if is_whole else "patch_size"):
            raise UserError(f"{self.name} holds a {type(self.model).__name__}, wanted a CLIP or SigLIP")
        vision = self.model.config.vision_config if is_whole else self.model.config
        self._set_preprocessing(size_px=vision.image_size, mean=mean, std=std)
        self._settle(layer=layer, has_cls=has_cls, depth=vision.num_hidden_layers, name=self.name)

    def patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, C)."""
        tower = getattr(self.model, "vision_model", self.model)
        states = tower(pixel_values=self.preprocess(pixels), output_hidden_states=True).hidden_states
        # the first hidden states are the embeddings
        hidden: Tensor = states[self.block + 1]
        has_class_token = hasattr(tower.embeddings, "class_embedding")
        return hidden if self.has_cls or not has_class_token else hidden[:, 1:]

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E)."""
        self._require_text_tower()
        embedding: Tensor = self.model.get_image_features(pixel_values=self.preprocess(pixels)).pooler_output
        return embedding

    def _require_text_tower(self) -> PreTrainedTokenizerBase:
        if self.text_tokenizer is None:
            raise UserError(f"{self.name} is an image tower alone: it embeds no texts, give a whole CLIP")
        return self.text_tokenizer

    def _text_ids(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, context length) int64. Raises UserError when there is no text tower."""
        tokenizer = self._require_text_tower()
        length = self.model.config.text_config.max_position_embeddings
        return padded_ids(tokenizer, captions, length=length).to(self.mean.device)

    def text_states(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, Kt, Dt)."""
        ids = self._text_ids(captions)  # refuses an image tower alone, which has no text_model
        states: Tensor = self.model.text_model(input_ids=ids).last_hidden_state
        return states

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """B strings -> (B, E)."""
        embedding: Tensor = self.model.get_text_features(input_ids=self._text_ids(captions)).pooler_output
        return embedding


def block_of(layer: int, depth: int, *, name: str) -> int:
    """The block whose output is hidden layer `layer`: -1 and `depth` are the last, -2 the one before, 1 the first.

    Raises UserError when there is no such layer.
    """
    if layer == 0 or not -depth <= layer <= depth:
        valid = f"-{depth}..-1 or 1..{depth}"
        raise UserError(f"layer {layer} of {name}: its image tower has {depth} layers, choose {valid}")
    return layer - 1 if layer > 0 else layer + depth


def _num_blocks(visual: nn.Module, *, name: str) -> int:
    """Depth of a ViT of open_clip or, through timm, of SigLIP. Raises UserError for ResNets and the like."""
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    blocks = getattr(getattr(visual, "trunk", None), "blocks", blocks)
    if blocks is None:
        raise UserError(
            f"the image tower of {name!r} is a {type(visual).__name__} without patch tokens: choose a ViT"
        )
    return len(blocks)


def padded_ids(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], *, length: int) -> Tensor:
    """Padded and cut to the context of a text tower, as CLIP was trained: B captions -> (B, length) int64."""
    encoded = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids: Tensor = encoded["input_ids"]
    return ids


def pad_ids(ids: Sequence[int], length: int) -> list[int]:
    """Pad with zeros to the tower's context length."""
    return [*ids, *([0] * (length - len(ids)))]


def load_clip(
    path: str | Path,
    *,
    library: Library = "open_clip",
    pretrained: str | None = None,
    layer: int = -2,
    has_cls: bool = True,
) -> ClipEncoder:
    """A frozen CLIP by library and path or name.

    Raises UserError when it cannot be loaded, and for `ip_adapter`, which is no CLIP: see `load_conditioner`.
    """
    if library == "ip_adapter":
        raise UserError(
            f"library ip_adapter ({path}) makes targets and no patch features: set library to transformers or open_clip"
        )
    if library == "open_clip":
        return OpenClipEncoder(path, pretrained=pretrained, layer=layer, has_cls=has_cls)
    return TransformersClipEncoder(path, layer=layer, has_cls=has_cls)
