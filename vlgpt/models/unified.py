"""The whole model as one folder: language model, regression head, image tokenizer and detokenizer.

An export holds `config.json` (model_type vlgpt), safetensors weights, the text tokenizer, and, for drawing and
reading images, `image_encoder/` and `picture_decoder/` or references to them. No pickle, no deepspeed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.models.component import CONFIG_FILE, empty_parameters, load_weights
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import Attention, build_language_model
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.settings import LoraSettings
from vlgpt.tokens import MODEL_TYPE, Rendering


@dataclass
class UnifiedConfig:
    """Everything needed to build a `UnifiedModel` without weights; JSON only."""

    # The transformers configuration of the language model, with its model_type.
    text_config: JsonObject
    # Arguments of ImageTokenizer and ImageDetokenizer.
    image_tokenizer: JsonObject
    image_detokenizer: JsonObject
    num_tokens: int
    template: str
    # Of text, see DocumentTokenizer. Exports without it are older than the rendering `saved`.
    rendering: Rendering = "parts"
    head: str = "linear"
    head_options: JsonObject | None = None
    is_boundary_target: bool = True
    # Arguments of LoraSettings, and `tokens`, when the adapter is kept apart.
    lora: JsonObject | None = None
    # EncoderSettings; its path is relative to the export, or a name.
    image_encoder: JsonObject | None = None
    # {"kind": ..., "path": ...}
    picture_decoder: JsonObject | None = None

    def to_record(self) -> JsonObject:
        """What config.json holds; fields that are None are left out."""
        record = {k: v for k, v in vars(self).items() if v is not None}
        kind = {"model_type": MODEL_TYPE, "architectures": ["VLGPTForConditionalGeneration"]}
        return {**kind, "dtype": self.text_config.get("dtype", "float32"), **record}

    @staticmethod
    def from_folder(folder: Path) -> UnifiedConfig:
        """Raises UserError when the folder is no export of vlgpt."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise UserError(
                f"{folder} is no export of vlgpt: config.json is missing (make one with `vlgpt export RUN`)"
            )
        if (record := read_export(folder)) is None:
            found = json.loads(path.read_text()).get("model_type")
            raise UserError(f"{path}: model_type is {found!r}, wanted {MODEL_TYPE!r}")
        names = UnifiedConfig.__dataclass_fields__
        return UnifiedConfig(**{key: value for key, value in record.items() if key in names})


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds an export of vlgpt (and not, say, a plain language model)."""
    return read_export(folder) is not None


def read_export(folder: str | Path) -> JsonObject | None:
    """config.json of an export of vlgpt, or None when the folder is none."""
    path = Path(folder) / CONFIG_FILE
    record: JsonObject = json.loads(path.read_text()) if path.is_file() else {}
    return record if record.get("model_type") == MODEL_TYPE else None


class UnifiedModel(nn.Module):
    """The parts of VL-GPT together; see `MultimodalLM`, `ImageTokenizer`, `ImageDetokenizer`."""

    def __init__(
        self, *, lm: MultimodalLM, image_tokenizer: ImageTokenizer, image_detokenizer: ImageDetokenizer
    ):
        super().__init__()
        self.lm = lm
        self.image_tokenizer = image_tokenizer
        self.image_detokenizer = image_detokenizer

    @classmethod
    def from_config(cls, config: UnifiedConfig, *, attention: Attention = "auto") -> UnifiedModel:
        """Build with random weights (on whatever device is the default, `meta` included)."""
        tokenizer = ImageTokenizer(**config.image_tokenizer)
        lm = MultimodalLM(
            build_language_model(config.text_config, attention),
            num_tokens=config.num_tokens,
            num_visual=tokenizer.num_visual,
            visual_width=tokenizer.visual_width,
            head=config.head,
            head_options=config.head_options,
        )
        if config.lora is not None:
            settings = {name: value for name, value in config.lora.items() if name != "tokens"}
            lm.add_lora(LoraSettings(**settings), config.lora["tokens"])
        return cls(
            lm=lm, image_tokenizer=tokenizer, image_detokenizer=ImageDetokenizer(**config.image_detokenizer)
        )

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, attention: Attention = "auto", dtype: torch.dtype | None = None
    ) -> UnifiedModel:
        """Load an export, mapped from its files; the language model in `dtype`, None: in that of the files.

        Raises UserError when files or tensors are missing or differ.
        """
        folder = Path(folder)
        config = UnifiedConfig.from_folder(folder)
        if dtype is not None:
            config.text_config["dtype"] = str(dtype).removeprefix("torch.")
        with empty_parameters():
            model = cls.from_config(config, attention=attention)
        load_weights(model, folder / "model.safetensors")
        # peft makes adapters in fp32, whatever type the model has.
        for parameter in model.lm.parameters():
            parameter.data = parameter.data.to(model.lm.dtype)
        restore_original_rows(model)
        return model.eval()

    @torch.no_grad()
    def conditions_of(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised visual embeddings -> z_v, z_t of the decoder: (M, N, d) -> (M, Kv, Dv), (M, Kt, Dt)."""
        return self.image_detokenizer.decode(self.image_tokenizer.standardiser.inverse(visual))


def restore_original_rows(model: nn.Module) -> None:
    """Fill the copies of token rows by which peft undoes a merge: they were made before the weights were loaded."""
    for module in model.modules():
        originals: Any = getattr(module, "trainable_tokens_original", None)
        if originals is not None:
            layer: Any = module
            for adapter, rows in layer.token_indices.items():
                originals[adapter] = layer.base_layer.weight.detach()[rows].clone()
