"""Two stages for what the demo must train itself, since no pre-trained part can be had offline.

A tiny CLIP (open_clip's classes) stands in for the frozen encoders, and a picture decoder for Stable Diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlgpt.batch import ConditionBatch, LossTerm
from vlgpt.models.augment import random_views
from vlgpt.models.decoders import ConvDecoder
from vlgpt.models.encoders import new_open_clip, pad_ids, save_open_clip
from vlgpt.models.losses import sums_by_source
from vlgpt.stages.base import Stage

if TYPE_CHECKING:  # importing it takes seconds: diffusers
    from demo.diffusion import TinyDiffusionDecoder


def summed(errors: Tensor) -> LossTerm:
    """A term of one source: (B,) -> sum, with its count for the log."""
    sources = torch.zeros(len(errors), dtype=torch.long, device=errors.device)
    return LossTerm(errors.sum(), by_source=sums_by_source(errors, sources, 1))


class DemoClipStage(Stage):
    """Contrastive training of a tiny CLIP. Equal captions in a batch count as matches of each other."""

    batch_kind = "conditions"
    terms = ("contrastive",)

    def __init__(self, *, config: dict[str, Any], text_tokenizer: Any):
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.clip: Any = new_open_clip(config=config)

    def text_ids(self, captions: tuple[str, ...]) -> Tensor:
        """Ids as `OpenClipEncoder` will make them: B strings -> (B, context length)."""
        length = self.config["text_cfg"]["context_length"]
        end = self.text_tokenizer.eos_token_id
        rows = [pad_ids([*self.text_tokenizer.encode(text)[: length - 1], end], length) for text in captions]
        return torch.tensor(rows)

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
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
        save_open_clip(self.clip, config=self.config, folder=folder)
        self.text_tokenizer.save_pretrained(str(folder))


class DemoDecoderStage(Stage):
    """Direct picture decoder from the true conditions: L1 + MSE on pixels, conditions dropped now and then."""

    batch_kind = "conditions"
    terms = ("l1", "mse")

    def __init__(self, *, decoder: ConvDecoder, image_drop: float, text_drop: float):
        super().__init__()
        self.decoder = decoder
        self.image_drop, self.text_drop = image_drop, text_drop

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        count = float(batch.is_valid.sum())
        return {"l1": count, "mse": count}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Pixel errors, mean over the picture, summed over pictures."""
        image, text = batch.require("image_condition"), batch.require("text_condition")
        if self.training:
            draw = torch.rand(len(batch.documents), device=image.device)
            image = self.decoder.drop_conditions(image, self.decoder.image_absent, draw < self.image_drop)
            text = self.decoder.drop_conditions(text, self.decoder.text_absent, draw > 1 - self.text_drop)
        error = (self.decoder(image, text) - batch.require("pixels"))[batch.is_valid].float()
        return {"l1": summed(error.abs().mean((1, 2, 3))), "mse": summed(error.square().mean((1, 2, 3)))}

    def save(self, folder: Path) -> None:
        self.decoder.save(folder)


class DemoDiffusionStage(Stage):
    """A tiny diffusion decoder on top of a trained direct one: the same denoising loop as Stable Diffusion's."""

    batch_kind = "conditions"
    terms = ("denoising",)

    def __init__(self, *, decoder: TinyDiffusionDecoder):
        super().__init__()
        self.decoder = decoder

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"coarse": self.decoder.coarse}

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        return {"denoising": float(batch.is_valid.sum())}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Error of the predicted clean residual, summed over pictures."""
        image, text = batch.require("image_condition"), batch.require("text_condition")
        errors = self.decoder.training_loss(image, text, batch.require("pixels"))
        return {"denoising": summed(errors[batch.is_valid])}

    def save(self, folder: Path) -> None:
        self.decoder.save(folder)
