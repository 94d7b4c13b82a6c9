"""Stages 2 and 3: train the multimodal language model on packed documents (paper §3.2, §3.3).

Stage 3 is stage 2 on chats, whose targets are the replies only: the difference is data, not code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from vlgpt.batch import Batch, ImageInput, LossTerm
from vlgpt.commits import newest_trainable, tag_of
from vlgpt.config import load_run
from vlgpt.decoding.load import cast_parameters
from vlgpt.errors import UserError
from vlgpt.export import export_model
from vlgpt.files import JsonObject, replacing_folder
from vlgpt.log import get_logger
from vlgpt.models.component import load_weights, read_arguments
from vlgpt.models.encoders import ClipEncoder
from vlgpt.models.heads import Objective, regression_errors
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import check_parts, load_language_model, resize_vocabulary
from vlgpt.models.layers import set_backend
from vlgpt.models.losses import count_targets, cross_entropies, sums_by_source, targets_of
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedConfig, UnifiedModel, is_export
from vlgpt.models.weights import WEIGHTS_FILE, fingerprint
from vlgpt.settings import LanguageStageSettings, RunSettings, SourceSettings
from vlgpt.shards.manifest import MANIFEST, read_manifest
from vlgpt.stages.base import Stage, dtype_of, load_encoder, load_trainable
from vlgpt.stages.build import build_stage
from vlgpt.stages.tokenizer import load_image_parts
from vlgpt.tokens import DocumentTokenizer, Rendering


class LanguageStage(Stage):
    """Cross-entropy on text, regression on visual embeddings, one shift for both.

    `first_visual_weight` weighs slot 1 of an image against the others, with mean weight 1 over the slots.
    `visual_input_drop` and `visual_input_noise` corrupt visual inputs in training (never targets).
    """

    settings_class = LanguageStageSettings
    batch_kind = "packed"
    terms = ("text", "visual")
    slot_weights: Tensor

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
        self.run: RunSettings | None = None
        num_visual = model.image_tokenizer.num_visual
        weights = torch.ones(num_visual)
        weights[0] = first_visual_weight
        self.register_buffer("slot_weights", weights / weights.mean(), persistent=False)
        model.image_tokenizer.requires_grad_(False)
        model.image_detokenizer.requires_grad_(False)

    @classmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> Self:
        """The stage with language model, tokenizers and encoder loaded. Raises UserError when one does not fit."""
        assert isinstance(run.stage, LanguageStageSettings)
        stage = cls.build(run.stage, num_sources=num_sources, dtype=dtype_of(run))
        stage.run = run
        return stage

    @classmethod
    def build(
        cls, settings: LanguageStageSettings, *, num_sources: int, dtype: torch.dtype = torch.float32
    ) -> Self:
        """The stage with its weights loaded.

        The language model is loaded in `dtype`: weights stored in it stay mapped, shared by all processes.
        """
        model, tokenizer = load_unified(settings, dtype=dtype)
        image_tokens = [tokenizer.begin_image_id, tokenizer.end_image_id]
        stage = cls.assemble(model, settings, image_tokens=image_tokens, num_sources=num_sources)
        stage.document_tokenizer = tokenizer
        if settings.init_from is not None:
            load_trainable(stage, newest_trainable(Path(settings.init_from)))
        return stage

    @classmethod
    def assemble(
        cls,
        model: UnifiedModel,
        settings: LanguageStageSettings,
        *,
        image_tokens: list[int],
        num_sources: int,
    ) -> Self:
        """The stage of a model, frozen or wrapped in LoRA as settings say; `image_tokens` are [IMG] and [/IMG]."""
        for part in (model.image_tokenizer, model.image_detokenizer):
            set_backend(part, settings.attention)
        if settings.trained == "lora":
            model.lm.add_lora(settings.lora, image_tokens)
        model.lm.freeze_parts(settings.frozen)
        if settings.has_checkpointing:
            model.lm.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        encoder = load_encoder(settings.encoder)
        return cls(model=model, encoder=encoder, num_sources=num_sources, **cls.options(settings))

    @classmethod
    def options(cls, settings: LanguageStageSettings) -> JsonObject:
        """The settings that the constructor takes as they are; a subclass adds its own."""
        weights = ("text_weight", "visual_weight", "first_visual_weight")
        names = ("objective", *weights, "visual_input_drop", "visual_input_noise")
        return {name: getattr(settings, name) for name in names}

    @property
    def image_parts(self) -> tuple[ImageTokenizer, ImageDetokenizer]:
        return self.model.image_tokenizer, self.model.image_detokenizer

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the attention kernel of the language model for this device and precision."""
        self.model.lm.settle_attention(device, dtype)

    def check(self) -> None:
        """Raise UserError when a token can see another document of its row, or later tokens."""
        self.model.lm.check_isolation()

    def frozen_modules(self) -> dict[str, nn.Module]:
        """The image tokenizer, the detokenizer and the encoder, as far as the stage has them."""
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
        """`text` tokens and `visual` embeddings that have a loss in this batch."""
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
            weights = self.slot_weights[targets.visual_rows % batch.num_visual]
        by_visual = sums_by_source(errors, targets.visual_sources, self.num_sources)
        return {  # sums over no targets still hang on every parameter: a rank without targets reduces like the others
            "text": LossTerm(text.sum(), self.text_weight, by_text),
            "visual": LossTerm(
                (errors * weights).sum() + predicted.sum() * 0.0, self.visual_weight, by_visual
            ),
        }

    def save(self, folder: Path) -> None:
        """Write an export with merged weights; its image parts are as they were read, not in training's precision."""
        if self.run is None or self.document_tokenizer is None:
            raise ValueError(
                "a stage that no run's settings built cannot be exported: use LanguageStage.from_settings"
            )
        settings = self.run.stage
        assert isinstance(settings, LanguageStageSettings)
        image_tokenizer, image_detokenizer = stored_image_parts(settings)
        model = UnifiedModel(
            lm=self.model.lm, image_tokenizer=image_tokenizer, image_detokenizer=image_detokenizer
        )
        export_with_settings(
            model, folder, run=self.run, tokenizer=self.document_tokenizer, tag=tag_of(self.run.steps)
        )


def load_tokenizer(stage: LanguageStageSettings) -> DocumentTokenizer:
    """The text tokenizer of a run with its N and template; reads no weights. Raises UserError."""
    path = Path(stage.language_model)
    rendering: Rendering = "template"
    if is_export(path):
        config = UnifiedConfig.from_folder(path)
        num_visual = config.image_tokenizer["num_visual"]
        if config.rendering == "parts" and config.template == stage.template:
            rendering = "parts"  # goes on as it was trained
    elif stage.image_tokenizer is None:
        raise UserError(
            f"{path} is a plain language model: set stage.image_tokenizer to the result of stage 1"
        )
    else:
        folder = Path(stage.image_tokenizer) / "image_tokenizer"
        num_visual = read_arguments(folder, ImageTokenizer.__name__)["num_visual"]
    tokenizer = DocumentTokenizer.load(
        stage.text_tokenizer or stage.language_model,
        num_visual=num_visual,
        template=stage.template,
        system_message=stage.system_message,
        is_boundary_target=stage.is_boundary_target,
        rendering=rendering,
    )
    _ = tokenizer.turns  # a template that does not fit is refused before anything is loaded
    return tokenizer


def load_unified(
    stage: LanguageStageSettings, *, dtype: torch.dtype = torch.float32
) -> tuple[UnifiedModel, DocumentTokenizer]:
    """The whole model from an export of vlgpt, or from a plain causal LM and a stage-1 result; the LM in `dtype`."""
    path = Path(stage.language_model)
    tokenizer = load_tokenizer(stage)
    if is_export(path):
        model = UnifiedModel.from_folder(path, attention=stage.attention, dtype=dtype)
        check_parts(model.lm.causal_lm, name=str(path), trained=stage.trained)
        if stage.image_tokenizer is not None:
            get_logger().warning("image_tokenizer %s replaces the one inside %s", stage.image_tokenizer, path)
            model.image_tokenizer, model.image_detokenizer = load_image_parts(Path(stage.image_tokenizer))
        return model, tokenizer
    assert stage.image_tokenizer is not None  # load_tokenizer asked for it
    image_tokenizer, image_detokenizer = load_image_parts(Path(stage.image_tokenizer))
    language_model = load_language_model(path, attention=stage.attention, dtype=dtype, trained=stage.trained)
    resize_vocabulary(language_model, tokenizer)
    lm = MultimodalLM(
        language_model,
        num_tokens=tokenizer.num_tokens,
        num_visual=image_tokenizer.num_visual,
        visual_width=image_tokenizer.visual_width,
        head=stage.head,
        head_options=stage.head_options,
    )
    return UnifiedModel(
        lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=image_detokenizer
    ), tokenizer


def stored_image_parts(stage: LanguageStageSettings) -> tuple[ImageTokenizer, ImageDetokenizer]:
    """The frozen image parts of a run as its files hold them; training holds them in its own precision."""
    if stage.image_tokenizer is not None:
        return load_image_parts(Path(stage.image_tokenizer))
    folder = Path(stage.language_model)
    config = UnifiedConfig.from_folder(folder)
    parts = ImageTokenizer(**config.image_tokenizer), ImageDetokenizer(**config.image_detokenizer)
    for name, part in zip(("image_tokenizer", "image_detokenizer"), parts):
        load_weights(part, folder / WEIGHTS_FILE, prefix=f"{name}.")
    return parts


def licences_of(sources: Sequence[SourceSettings]) -> list[str]:
    """Licence and attribution of every data set whose manifest is here, each once."""
    manifests = [Path(source.path) / MANIFEST for source in sources]
    lines = [read_manifest(m.read_bytes(), where=str(m)).licence for m in manifests if m.is_file()]
    return list(dict.fromkeys(filter(None, lines)))


def export_with_settings(
    model: UnifiedModel,
    folder: Path,
    *,
    run: RunSettings,
    tokenizer: DocumentTokenizer,
    tag: str,
    merge_lora: bool = True,
    picture_decoder: str | Path | None = None,
) -> None:
    """An export with the encoder, image decoder and model card of a run; `tag` names the commit of its weights."""
    settings = run.stage
    assert isinstance(settings, LanguageStageSettings)
    card = {
        "name": run.name,
        "checkpoint": tag,
        "sources": [f"{source.name} ({source.path})" for source in run.data.sources],
        "attribution": licences_of(run.data.sources),
        "steps": run.steps,
        "global_batch": run.global_batch,
    }
    export_model(
        model,
        folder,
        tokenizer=tokenizer,
        encoder=None if settings.encoder is None else settings.encoder.model_dump(),
        picture_decoder=picture_decoder or settings.picture_decoder,
        merge_lora=merge_lora,
        card=card,
    )


def export_run(
    run: str | Path, folder: str | Path, *, merge_lora: bool = True, picture_decoder: str | Path | None = None
) -> None:
    """Export the newest commit of a language run from its one file of trained weights: no GPU, no deepspeed.

    The export appears complete or not at all. `picture_decoder` replaces the one of the run's settings. Raises
    UserError when the run has no commit, is no language run, or its base weights are not those it was trained on.
    """
    run, folder = Path(run), Path(folder)
    settings = load_run(run / "config.yaml")
    if not isinstance(settings.stage, LanguageStageSettings):
        raise UserError(
            f"{run} trained a {settings.stage.kind}: its result folder is what later stages read, nothing to export"
        )
    if folder.exists() and not is_export(folder) and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is no export: choose another folder")
    stage = build_stage(settings, num_sources=len(settings.data.sources))
    assert isinstance(stage, LanguageStage)
    trained = newest_trainable(run)
    load_trainable(stage, trained)
    cast_parameters(stage.model.lm, dtype_of(settings))  # as at the end of training
    assert stage.document_tokenizer is not None
    with replacing_folder(folder) as new:
        export_with_settings(
            stage.model,
            new,
            run=settings,
            tokenizer=stage.document_tokenizer,
            tag=trained.tag,
            merge_lora=merge_lora,
            picture_decoder=picture_decoder,
        )
