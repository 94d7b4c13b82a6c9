"""Stage 1: train the image tokenizer and detokenizer on the frozen conditions of the diffusion decoder (paper §3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vlgpt.batch import ConditionBatch, LossTerm
from vlgpt.files import JsonObject
from vlgpt.models.component import Component, load_weights
from vlgpt.models.conditions import load_conditioner
from vlgpt.models.encoders import ClipEncoder, Conditioner
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.layers import set_backend
from vlgpt.models.losses import squared_errors, sums_by_source
from vlgpt.models.standardise import accumulate
from vlgpt.models.weights import WEIGHTS_FILE
from vlgpt.settings import RunSettings, TokenizerStageSettings
from vlgpt.stages.base import AllSum, Stage, is_trained, load_encoder


class ImageTokenizerStage(Stage):
    """patches -> x_v -> (z_v, z_t) against (e_v, e_t): L = image_weight * MSE + text_weight * MSE (eq. 2).

    Targets are compared in standardised space; images without text train the image term only.
    """

    settings_class = TokenizerStageSettings
    batch_kind = "conditions"
    terms = ("image", "text")

    def __init__(
        self,
        *,
        tokenizer: ImageTokenizer,
        detokenizer: ImageDetokenizer,
        image_weight: float = 1.0,
        text_weight: float = 1.0,
        encoder: ClipEncoder | None = None,
        conditioner: Conditioner | None = None,
        statistics_samples: int = 8192,
        num_sources: int = 1,
    ):
        super().__init__()
        self.tokenizer, self.detokenizer = tokenizer, detokenizer
        self.image_weight, self.text_weight = image_weight, text_weight
        self.encoder, self.conditioner = encoder, conditioner
        self.statistics_samples, self.num_sources = statistics_samples, num_sources

    @classmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> Self:
        """The stage with encoder and diffusion conditions loaded. Raises UserError when a part does not fit."""
        assert isinstance(run.stage, TokenizerStageSettings)
        return cls.build(run.stage, num_sources=num_sources)

    @classmethod
    def build(cls, settings: TokenizerStageSettings, *, num_sources: int) -> Self:
        """The stage with random image tokenizer and detokenizer (paper: random init), or those of another result."""
        shapes = settings.shapes
        tokenizer = ImageTokenizer(
            num_patches=shapes.num_patches,
            patch_width=shapes.patch_width,
            num_visual=settings.num_visual,
            visual_width=settings.visual_width,
            has_checkpointing=settings.has_checkpointing,
            **settings.tokenizer.model_dump(),
        )
        detokenizer = ImageDetokenizer(
            num_visual=settings.num_visual,
            visual_width=settings.visual_width,
            **shapes.model_dump(exclude={"num_patches", "patch_width"}),
            has_mean_token=settings.has_mean_token,
            has_checkpointing=settings.has_checkpointing,
            **settings.detokenizer.model_dump(),
        )
        parts: dict[str, tuple[Component, str | None]] = {
            "tokenizer": (tokenizer, settings.tokenizer_from),
            "detokenizer": (detokenizer, settings.detokenizer_from),
        }
        for name, (part, source) in parts.items():
            set_backend(part, settings.attention)
            if source is not None:
                load_weights(part, Path(source) / f"image_{name}" / WEIGHTS_FILE)
            if name in settings.frozen:
                part.requires_grad_(False)
        conditioner = settings.conditioner
        return cls(
            tokenizer=tokenizer,
            detokenizer=detokenizer,
            encoder=load_encoder(settings.encoder),
            conditioner=None if conditioner is None else load_conditioner(**conditioner.model_dump()),
            num_sources=num_sources,
            **cls.options(settings),
        )

    @classmethod
    def options(cls, settings: TokenizerStageSettings) -> JsonObject:
        """The settings that the constructor takes as they are; a subclass adds its own."""
        return settings.model_dump(include={"image_weight", "text_weight", "statistics_samples"})

    @property
    def image_parts(self) -> tuple[ImageTokenizer, ImageDetokenizer]:
        return self.tokenizer, self.detokenizer

    def frozen_modules(self) -> dict[str, torch.nn.Module]:
        """The image encoder and the conditioner, as far as the stage has them."""
        parts = {"encoder": self.encoder, "conditioner": self.conditioner}
        return {name: module for name, module in parts.items() if module is not None}

    def patches_of(self, batch: ConditionBatch) -> Tensor:
        """(B, P, C), read from features or computed from pixels."""
        if batch.patches is not None or self.encoder is None:
            return batch.require("patches")
        with torch.no_grad():
            return self.encoder.patches(batch.require("pixels"))

    def targets_of(self, batch: ConditionBatch) -> tuple[Tensor, Tensor]:
        """e_v (B, Kv, Dv) and e_t (B, Kt, Dt), read from features or computed online."""
        if self.conditioner is None:
            return batch.require("image_condition"), batch.require("text_condition")
        with torch.no_grad():
            image = batch.image_condition
            if image is None:
                image = self.conditioner.image_condition(batch.require("pixels"))
            text = batch.text_condition
            if text is None:
                text = self.conditioner.text_condition(batch.captions)
        return image, text

    def reconstruct(self, batch: ConditionBatch) -> tuple[Tensor, Tensor]:
        """What an image decoder draws a batch's images from: z_v (B, Kv, Dv) and z_t (B, Kt, Dt), in its scale."""
        return self.detokenizer.decode(self.tokenizer(self.patches_of(batch)))

    def count_targets(self, batch: ConditionBatch) -> dict[str, float]:
        """Valid images, and those of them with a text condition."""
        valid, with_text = batch.is_valid, batch.is_valid & batch.has_text
        return {"image": float(valid.sum()), "text": float(with_text.sum())}

    def forward(self, batch: ConditionBatch) -> dict[str, LossTerm]:
        """Sum over images of the mean squared error over the tokens of each condition."""
        image_target, text_target = self.targets_of(batch)
        predicted_image, predicted_text = self.detokenizer(self.tokenizer(self.patches_of(batch)))
        image = squared_errors(predicted_image, self.detokenizer.image_targets(image_target)).mean(1)
        text = squared_errors(predicted_text, self.detokenizer.text_targets(text_target)).mean(1)
        return {
            "image": self._term(image, batch.is_valid, batch, self.image_weight),
            "text": self._term(text, batch.is_valid & batch.has_text, batch, self.text_weight),
        }

    def _term(self, errors: Tensor, mask: Tensor, batch: ConditionBatch, weight: float) -> LossTerm:
        chosen = errors[mask]
        by_source = sums_by_source(chosen, batch.source_ids[mask].long(), self.num_sources)
        return LossTerm(
            chosen.sum(), weight, by_source
        )  # depends on all parameters, also when none is chosen

    @torch.no_grad()
    def prepare(self, batches: Iterable[ConditionBatch], all_sum: AllSum) -> None:
        """Statistics of e_v and e_t over about `statistics_samples` samples of the training stream.

        A frozen detokenizer keeps those that it was trained with.
        """
        if not is_trained(self.detokenizer):
            return
        image_sum: Any = 0.0
        text_sum: Any = 0.0
        num_seen = 0
        for batch in batches:
            image, text = self.targets_of(batch)
            image_sum = image_sum + accumulate(self.detokenizer.image_targets.split(image[batch.is_valid]))
            text_sum = text_sum + accumulate(text[batch.is_valid & batch.has_text])
            num_seen += len(batch.documents)
            if num_seen >= self.statistics_samples:
                break
        self.detokenizer.image_targets.set_statistics(all_sum(image_sum))
        self.detokenizer.text_targets.set_statistics(all_sum(text_sum))

    @torch.no_grad()
    def finish(self, batches: Iterable[ConditionBatch], all_sum: AllSum) -> None:
        """Statistics of the trained visual embeddings, by which the language model sees them standardised.

        A frozen tokenizer keeps its own: language models were trained on them.
        """
        if not is_trained(self.tokenizer):
            return
        moments: Any = 0.0
        num_seen = 0
        for batch in batches:
            moments = moments + accumulate(self.tokenizer(self.patches_of(batch))[batch.is_valid])
            num_seen += len(batch.documents)
            if num_seen >= self.statistics_samples:
                break
        self.tokenizer.standardiser.set_statistics(all_sum(moments))

    def save(self, folder: Path) -> None:
        """Write tokenizer and detokenizer as two components, `image_tokenizer` and `image_detokenizer`."""
        self.tokenizer.save(folder / "image_tokenizer")
        self.detokenizer.save(folder / "image_detokenizer")


def load_image_parts(folder: Path) -> tuple[ImageTokenizer, ImageDetokenizer]:
    """What stage 1 wrote: folder/image_tokenizer and folder/image_detokenizer."""
    tokenizer = ImageTokenizer.from_folder(folder / "image_tokenizer")
    return tokenizer, ImageDetokenizer.from_folder(folder / "image_detokenizer")
