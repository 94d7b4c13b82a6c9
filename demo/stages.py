"""Three stages for what the demo must train itself, since no pre-trained part can be had offline.

A tiny CLIP (open_clip's classes) stands in for the frozen encoders, and an image decoder for Stable Diffusion. They
train on the same loop as the paper's stages: `kind: demo.stages:ClipStage` in a run's YAML is all that it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from demo.clip import new_open_clip, save_open_clip
from demo.decoder import ConvDecoder
from vlgpt.batch import ConditionBatch, LossTerm
from vlgpt.models.augment import random_views
from vlgpt.models.encoders import pad_ids
from vlgpt.models.losses import sums_by_source
from vlgpt.settings import ConditionShapes, Fraction, ModelPath, Positive, RunSettings, StageSettings
from vlgpt.stages.base import Stage
from vlgpt.tokens import DocumentTokenizer

if TYPE_CHECKING:  # importing it takes seconds: diffusers
    from demo.diffusion import TinyDiffusionDecoder


class ClipStageSettings(StageSettings):
    """A tiny CLIP, trained from scratch."""

    text_tokenizer: ModelPath
    image_size_px: Positive = 48
    patch_size_px: Positive = 12
    width: Positive = 128
    image_depth: Positive = 4
    text_depth: Positive = 2
    head_width: Positive = 32
    context_length: Positive = 24

    def open_clip_config(self, *, vocabulary_size: int, eos_id: int) -> dict[str, object]:
        """The model in open_clip's own configuration format."""
        return {
            "embed_dim": self.width,
            # DeepSpeed cannot broadcast parameters without a dimension.
            "nonscalar_logit_scale": True,
            "vision_cfg": {
                "image_size": self.image_size_px,
                "patch_size": self.patch_size_px,
                "width": self.width,
                "layers": self.image_depth,
                "head_width": self.head_width,
            },
            "text_cfg": {
                "context_length": self.context_length,
                "vocab_size": vocabulary_size,
                "width": self.width,
                "heads": self.width // self.head_width,
                "layers": self.text_depth,
                "pool_type": "eos",
                "eos_id": eos_id,
            },
        }


class DecoderStageSettings(StageSettings):
    """An image decoder, trained on images and their frozen conditions."""

    shapes: ConditionShapes
    size_px: Positive = 48
    # Shares of samples trained without z_v or z_t, so that either can be drawn alone.
    image_drop: Fraction = 0.1
    text_drop: Fraction = 0.1


class DiffusionStageSettings(DecoderStageSettings):
    """A tiny diffusion decoder; `coarse` is the result of a `DecoderStage`, whose residual it models."""

    coarse: ModelPath
    # Of the noise that images start from.
    noise_scale: Annotated[float, Field(gt=0, le=1)] = 0.3


def summed(errors: Tensor) -> LossTerm:
    """A term of one source: (B,) -> sum, with its count for the log."""
    sources = torch.zeros(len(errors), dtype=torch.long, device=errors.device)
    return LossTerm(errors.sum(), by_source=sums_by_source(errors, sources, 1))


class ClipStage(Stage):
    """Contrastive training of a tiny CLIP. Equal captions in a batch count as matches of each other."""

    settings_class = ClipStageSettings
    batch_kind = "conditions"
    terms = ("contrastive",)

    def __init__(self, *, config: dict[str, Any], text_tokenizer: Any):
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.clip: Any = new_open_clip(config=config)

    @classmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> ClipStage:
        """The stage with a new CLIP model of the settings' sizes."""
        assert isinstance(run.stage, ClipStageSettings)
        return cls.build(run.stage)

    @classmethod
    def build(cls, settings: ClipStageSettings) -> ClipStage:
        """A CLIP with random weights for the vocabulary of the demo's text tokenizer."""
        tokenizer = DocumentTokenizer.load(settings.text_tokenizer, num_visual=1, template="short")
        tokenizer.text_tokenizer.add_bos_token = False  # CLIP's texts only have an end
        config = settings.open_clip_config(vocabulary_size=tokenizer.vocabulary_size, eos_id=tokenizer.eos_id)
        return cls(config=config, text_tokenizer=tokenizer.text_tokenizer)

    def text_ids(self, captions: tuple[str, ...]) -> Tensor:
        """Ids as `OpenClipEncoder` will make them: B strings -> (B, context length)."""
        length = self.config["text_cfg"]["context_length"]
        end = self.text_tokenizer.eos_token_id
        rows = [pad_ids([*self.text_tokenizer.encode(text)[: length - 1], end], length) for text in captions]
        return torch.tensor(rows)

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        """Contrastive targets: valid samples with a text."""
        return {"contrastive": float((batch.is_valid & batch.has_text).sum())}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Symmetric InfoNCE, summed over the pairs of the micro-batch."""
        chosen = (batch.is_valid & batch.has_text).nonzero().squeeze(1)
        pixels = batch.require("pixels")[chosen]
        captions = tuple(batch.captions[i] for i in chosen.tolist())
        images = F.normalize(
            self.clip.encode_image(random_views(pixels) if self.training else pixels), dim=-1
        )
        texts = F.normalize(self.clip.encode_text(self.text_ids(captions).to(pixels.device)), dim=-1)
        logits = self.clip.logit_scale.exp().clamp(max=100) * images @ texts.T
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        group = torch.tensor([numbers[caption] for caption in captions], device=pixels.device)
        wanted = (group[:, None] == group[None, :]).float()
        wanted = wanted / wanted.sum(1, keepdim=True)
        by_image = -(wanted * logits.log_softmax(1)).sum(1)
        by_text = -(wanted * logits.log_softmax(0).T).sum(1)
        return {"contrastive": summed(0.5 * (by_image + by_text))}

    def save(self, folder: Path) -> None:
        """Write the CLIP model in open_clip's format, with its text tokenizer."""
        save_open_clip(self.clip, config=self.config, folder=folder)
        self.text_tokenizer.save_pretrained(str(folder))


class DecoderStage(Stage):
    """Direct image decoder from the true conditions: L1 + MSE on pixels, conditions dropped now and then."""

    settings_class = DecoderStageSettings
    batch_kind = "conditions"
    terms = ("l1", "mse")

    def __init__(self, *, decoder: ConvDecoder, image_drop: float, text_drop: float):
        super().__init__()
        self.decoder = decoder
        self.image_drop, self.text_drop = image_drop, text_drop

    @classmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> DecoderStage:
        """The stage with a new convolutional decoder of the settings' sizes."""
        settings = run.stage
        assert isinstance(settings, DecoderStageSettings)
        shapes = settings.shapes.model_dump(exclude={"num_patches", "patch_width"})
        decoder = ConvDecoder(**shapes, size_px=settings.size_px)
        return cls(decoder=decoder, image_drop=settings.image_drop, text_drop=settings.text_drop)

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        """Images of the batch, the targets of both terms."""
        count = float(batch.is_valid.sum())
        return {"l1": count, "mse": count}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Pixel errors, mean over the image, summed over images."""
        image, text = batch.require("image_condition"), batch.require("text_condition")
        if self.training:
            draw = torch.rand(len(batch.documents), device=image.device)
            image = self.decoder.drop_conditions(image, self.decoder.image_absent, draw < self.image_drop)
            text = self.decoder.drop_conditions(text, self.decoder.text_absent, draw > 1 - self.text_drop)
        error = (self.decoder(image, text) - batch.require("pixels"))[batch.is_valid].float()
        return {"l1": summed(error.abs().mean((1, 2, 3))), "mse": summed(error.square().mean((1, 2, 3)))}

    def save(self, folder: Path) -> None:
        """Write the decoder as a component."""
        self.decoder.save(folder)


class DiffusionStage(Stage):
    """A tiny diffusion decoder on top of a trained direct one: the same denoising loop as Stable Diffusion's."""

    settings_class = DiffusionStageSettings
    batch_kind = "conditions"
    terms = ("denoising",)

    def __init__(self, *, decoder: TinyDiffusionDecoder):
        super().__init__()
        self.decoder = decoder

    @classmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> DiffusionStage:
        """The stage with a new diffusion decoder on top of a trained convolutional one."""
        from demo.diffusion import TinyDiffusionDecoder

        settings = run.stage
        assert isinstance(settings, DiffusionStageSettings)
        decoder = TinyDiffusionDecoder.on(
            ConvDecoder.from_folder(settings.coarse),
            image_drop=settings.image_drop,
            text_drop=settings.text_drop,
            noise_scale=settings.noise_scale,
        )
        return cls(decoder=decoder)

    def frozen_modules(self) -> dict[str, nn.Module]:
        """The coarse decoder, which a trained folder gives."""
        return {"coarse": self.decoder.coarse}

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        """Denoising targets: one for each valid image."""
        return {"denoising": float(batch.is_valid.sum())}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Error of the predicted clean residual, summed over images."""
        image, text = batch.require("image_condition"), batch.require("text_condition")
        errors = self.decoder.training_loss(image, text, batch.require("pixels"))
        return {"denoising": summed(errors[batch.is_valid])}

    def save(self, folder: Path) -> None:
        """Write the decoder, with its coarse part, as a component."""
        self.decoder.save(folder)
