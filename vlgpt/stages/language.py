"""Stages 2 and 3: train the multimodal language model on packed documents (paper §3.2, §3.3).

Stage 3 is stage 2 on chats, whose targets are the replies only: the difference is data, not code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vlgpt.batch import Batch, ImageInput, LossTerm
from vlgpt.models.encoders import ClipEncoder
from vlgpt.models.heads import Objective, regression_errors
from vlgpt.models.losses import count_targets, cross_entropies, sums_by_source, targets_of
from vlgpt.models.unified import UnifiedModel
from vlgpt.models.weights import fingerprint
from vlgpt.stages.base import Stage


class LanguageStage(Stage):
    """Cross-entropy on text, regression on visual embeddings, one shift for both.

    `first_visual_weight` weighs slot 1 of an image against the others, with mean weight 1 over the slots.
    `visual_input_drop` and `visual_input_noise` corrupt visual inputs in training (never targets).
    """

    batch_kind = "packed"
    terms = ("text", "visual")

    def __init__(
        self,
        *,
        model: UnifiedModel,
        encoder: ClipEncoder | None = None,
        objective: Objective = "mse",
        text_weight: float = 1.0,
        visual_weight: float = 1.0,
        first_visual_weight: float = 1.0,
        visual_input_drop: float = 0.0,
        visual_input_noise: float = 0.0,
        num_sources: int = 1,
    ):
        super().__init__()
        self.model, self.encoder = model, encoder
        self.objective = objective
        self.text_weight, self.visual_weight = text_weight, visual_weight
        self.visual_input_drop, self.visual_input_noise = visual_input_drop, visual_input_noise
        self.num_sources = num_sources
        self.exporter: Callable[[UnifiedModel, Path], None] | None = None  # set by who may import export
        num_visual = model.image_tokenizer.num_visual
        weights = torch.ones(num_visual)
        weights[0] = first_visual_weight
        self.register_buffer("slot_weights", weights / weights.mean(), persistent=False)
        model.image_tokenizer.requires_grad_(False)
        model.image_detokenizer.requires_grad_(False)

    def frozen_modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "image_tokenizer": self.model.image_tokenizer,
            "image_detokenizer": self.model.image_detokenizer,
            "encoder": self.encoder,
        }
        return {name: module for name, module in parts.items() if module is not None}

    def frozen_hashes(self) -> dict[str, str]:
        """Also a fingerprint of the language model under LoRA: an adapter on another base is worth nothing."""
        hashes = super().frozen_hashes()
        if self.model.lm.has_lora:
            hashes["language_model"] = fingerprint(self.model.lm.base_weights())
        return hashes

    @torch.no_grad()
    def visual_of(self, images: ImageInput | None) -> Tensor | None:
        """Standardised visual embeddings of a batch's images, whatever form they came in -> (M, N, d)."""
        if images is None:
            return None
        values = images.values
        if images.kind == "visual":
            return values
        if images.kind == "pixels":
            if self.encoder is None:
                raise ValueError("images came as pixels, but the stage has no encoder: set stage.encoder")
            values = self.encoder.patches(values)
        return self.model.image_tokenizer.encode(values)

    def corrupt(self, visual: Tensor) -> Tensor:
        """Visual inputs as training sees them: (M, N, d) -> (M, N, d)."""
        if self.visual_input_noise > 0:
            visual = visual + self.visual_input_noise * torch.randn_like(visual)
        if self.visual_input_drop > 0:
            is_kept = torch.rand(visual.shape[:2], device=visual.device) >= self.visual_input_drop
            visual = visual * is_kept[..., None]
        return visual

    def count_targets(self, batch: Batch) -> dict[str, float]:
        return {name: float(count) for name, count in count_targets(batch).items()}

    def forward(self, batch: Batch) -> dict[str, LossTerm]:
        """Sums over the targets of this batch."""
        lm = self.model.lm
        visual = self.visual_of(batch.images)
        inputs = self.corrupt(visual) if visual is not None and self.training else visual
        targets = targets_of(batch)
        logits, predicted = lm.predict(lm.hidden_states(batch, inputs), targets)
        text = cross_entropies(logits, targets.text_ids)
        by_text = sums_by_source(text, targets.text_sources, self.num_sources)
        if visual is None:
            errors = weights = predicted.new_zeros(0)
        else:
            errors = regression_errors(predicted, visual.flatten(0, 1)[targets.visual_rows], self.objective)
            weights = self.slot_weights[targets.visual_rows % batch.num_visual]  # type: ignore[index]
        by_visual = sums_by_source(errors, targets.visual_sources, self.num_sources)
        return {  # sums over no targets still hang on every parameter: a rank without targets reduces like the others
            "text": LossTerm(text.sum(), self.text_weight, by_text),
            "visual": LossTerm(
                (errors * weights).sum() + predicted.sum() * 0.0, self.visual_weight, by_visual
            ),
        }

    def save(self, folder: Path) -> None:
        if self.exporter is None:
            raise ValueError("no exporter is set: assign stage.exporter before saving")
        self.exporter(self.model, folder)
