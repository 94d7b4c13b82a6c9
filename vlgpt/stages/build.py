"""The one place that turns stage settings into a stage with its weights loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from demo.stages import DemoClipStage, DemoDecoderStage, DemoDiffusionStage
from vlgpt import seeds
from vlgpt import settings as s
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models.component import Component, load_weights, read_arguments
from vlgpt.models.conditions import load_conditioner
from vlgpt.models.decoders import ConvDecoder
from vlgpt.models.encoders import ClipEncoder, load_clip
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.language_models import check_parts, load_language_model, resize_vocabulary
from vlgpt.models.layers import set_backend
from vlgpt.models.multimodal_lm import LoraSettings, MultimodalLM
from vlgpt.models.unified import UnifiedConfig, UnifiedModel, is_export
from vlgpt.models.weights import WEIGHTS_FILE
from vlgpt.stages.base import Stage
from vlgpt.stages.language import LanguageStage
from vlgpt.stages.tokenizer import ImageTokenizerStage
from vlgpt.stages.weights import load_trainable, newest_trainable
from vlgpt.tokens import DocumentTokenizer, Rendering


def build_stage(run: s.RunSettings, *, num_sources: int) -> tuple[Stage, DocumentTokenizer | None]:
    """Stage and, for language stages, its tokenizer. Raises UserError when a part is missing or does not fit.

    A language model is loaded in the precision of the run: weights stored in it stay mapped, shared by all processes.
    """
    seeds.seed_everything(run.seed, "initialisation")
    stage = run.stage
    if isinstance(stage, s.ImageTokenizerStage):
        return build_image_tokenizer_stage(stage, num_sources=num_sources), None
    if isinstance(stage, s.LanguageStage):
        return build_language_stage(stage, num_sources=num_sources, dtype=dtype_of(run))
    if isinstance(stage, s.DemoClipStage):
        return build_demo_clip(stage), None
    return build_demo_decoder(stage), None


def dtype_of(run: s.RunSettings) -> torch.dtype:
    """The type that the language model of a run is held in."""
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def load_encoder(settings: s.EncoderSettings | None) -> ClipEncoder | None:
    if settings is None:
        return None
    return load_clip(
        settings.path,
        library=settings.library,
        pretrained=settings.pretrained,
        layer=settings.layer,
        has_cls=settings.has_cls,
    )


def build_image_tokenizer_stage(stage: s.ImageTokenizerStage, *, num_sources: int) -> Stage:
    """Stage 1 with random image tokenizer and detokenizer (paper: random init)."""
    shapes = stage.shapes
    tokenizer = ImageTokenizer(
        num_patches=shapes.num_patches,
        patch_width=shapes.patch_width,
        num_visual=stage.num_visual,
        visual_width=stage.visual_width,
        has_checkpointing=stage.has_checkpointing,
        **stage.tokenizer.model_dump(),
    )
    detokenizer = ImageDetokenizer(
        num_visual=stage.num_visual,
        visual_width=stage.visual_width,
        image_tokens=shapes.image_tokens,
        image_width=shapes.image_width,
        text_tokens=shapes.text_tokens,
        text_width=shapes.text_width,
        has_mean_token=stage.has_mean_token,
        has_checkpointing=stage.has_checkpointing,
        **stage.detokenizer.model_dump(),
    )
    parts: dict[str, tuple[Component, str | None]] = {
        "tokenizer": (tokenizer, stage.tokenizer_from),
        "detokenizer": (detokenizer, stage.detokenizer_from),
    }
    for name, (part, source) in parts.items():
        set_backend(part, stage.attention)
        if source is not None:
            load_weights(part, Path(source) / f"image_{name}" / WEIGHTS_FILE)
        if name in stage.frozen:
            part.requires_grad_(False)
    return ImageTokenizerStage(
        tokenizer=tokenizer,
        detokenizer=detokenizer,
        image_weight=stage.image_weight,
        text_weight=stage.text_weight,
        encoder=load_encoder(stage.encoder),
        conditioner=None if stage.conditioner is None else load_conditioner(**stage.conditioner.model_dump()),
        statistics_samples=stage.statistics_samples,
        num_sources=num_sources,
    )


def build_language_stage(
    stage: s.LanguageStage, *, num_sources: int, dtype: torch.dtype = torch.float32
) -> tuple[Stage, DocumentTokenizer]:
    """Stages 2 and 3: the parts loaded and frozen or wrapped in LoRA as the settings say."""
    model, tokenizer = load_unified(stage, dtype=dtype)
    for part in (model.image_tokenizer, model.image_detokenizer):
        set_backend(part, stage.attention)
    if stage.trained == "lora":
        lora = LoraSettings(rank=stage.lora.rank, alpha=stage.lora.alpha, dropout=stage.lora.dropout)
        model.lm.add_lora(lora, [tokenizer.begin_image_id, tokenizer.end_image_id])
    model.lm.freeze_parts(stage.frozen)
    if stage.has_checkpointing:
        model.lm.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    built = LanguageStage(
        model=model,
        encoder=load_encoder(stage.encoder),
        objective=stage.objective,
        text_weight=stage.text_weight,
        visual_weight=stage.visual_weight,
        first_visual_weight=stage.first_visual_weight,
        visual_input_drop=stage.visual_input_drop,
        visual_input_noise=stage.visual_input_noise,
        num_sources=num_sources,
    )
    if stage.init_from is not None:
        load_trainable(built, newest_trainable(Path(stage.init_from)))
    return built, tokenizer


def load_tokenizer(stage: s.LanguageStage) -> DocumentTokenizer:
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
        is_boundary_target=stage.is_boundary_target,
        rendering=rendering,
    )
    _ = tokenizer.turns  # a template that does not fit is refused before anything is loaded
    return tokenizer


def load_unified(
    stage: s.LanguageStage, *, dtype: torch.dtype = torch.float32
) -> tuple[UnifiedModel, DocumentTokenizer]:
    """The whole model from an export of vlgpt, or from a plain causal LM and a stage-1 result; the LM in `dtype`."""
    path = Path(stage.language_model)
    tokenizer = load_tokenizer(stage)
    if is_export(path):
        model = UnifiedModel.from_folder(path, attention=stage.attention, dtype=dtype)
        check_parts(model.lm.language_model, name=str(path), trained=stage.trained)
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
    )
    return UnifiedModel(
        lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=image_detokenizer
    ), tokenizer


def stored_image_parts(stage: s.LanguageStage) -> tuple[ImageTokenizer, ImageDetokenizer]:
    """The frozen image parts of a run as its files hold them; training holds them in its own precision."""
    if stage.image_tokenizer is not None:
        return load_image_parts(Path(stage.image_tokenizer))
    folder = Path(stage.language_model)
    config = UnifiedConfig.from_folder(folder)
    parts = ImageTokenizer(**config.image_tokenizer), ImageDetokenizer(**config.image_detokenizer)
    for name, part in zip(("image_tokenizer", "image_detokenizer"), parts):
        load_weights(part, folder / WEIGHTS_FILE, prefix=f"{name}.")
    return parts


def load_image_parts(folder: Path) -> tuple[ImageTokenizer, ImageDetokenizer]:
    """What stage 1 wrote: folder/image_tokenizer and folder/image_detokenizer."""
    tokenizer = ImageTokenizer.from_folder(folder / "image_tokenizer")
    return tokenizer, ImageDetokenizer.from_folder(folder / "image_detokenizer")


def build_demo_clip(stage: s.DemoClipStage) -> Stage:
    """A tiny CLIP in open_clip's own configuration format."""
    tokenizer = DocumentTokenizer.load(stage.text_tokenizer, num_visual=1, template="short")
    tokenizer.text_tokenizer.add_bos_token = False  # CLIP's texts only have an end
    config = {
        "embed_dim": stage.width,
        "nonscalar_logit_scale": True,  # deepspeed cannot broadcast parameters without a dimension
        "vision_cfg": {
            "image_size": stage.image_size_px,
            "patch_size": stage.patch_size_px,
            "width": stage.width,
            "layers": stage.image_depth,
            "head_width": stage.head_width,
        },
        "text_cfg": {
            "context_length": stage.context_length,
            "vocab_size": tokenizer.vocabulary_size,
            "width": stage.width,
            "heads": stage.width // stage.head_width,
            "layers": stage.text_depth,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_id,
        },
    }
    return DemoClipStage(config=config, text_tokenizer=tokenizer.text_tokenizer)


def build_demo_decoder(stage: s.DemoDecoderStage) -> Stage:
    """The direct decoder, or the tiny diffusion decoder on top of a trained direct one."""
    shapes = stage.shapes
    if stage.decoder == "diffusion":
        if stage.coarse is None:
            raise UserError("decoder=diffusion needs stage.coarse: the folder of a trained direct decoder")
        from demo.diffusion import TinyDiffusionDecoder

        coarse = ConvDecoder.from_folder(stage.coarse)
        options = {
            "image_drop": stage.image_drop,
            "text_drop": stage.text_drop,
            "noise_scale": stage.noise_scale,
        }
        return DemoDiffusionStage(decoder=TinyDiffusionDecoder.on(coarse, **options))
    decoder = ConvDecoder(
        image_tokens=shapes.image_tokens,
        image_width=shapes.image_width,
        text_tokens=shapes.text_tokens,
        text_width=shapes.text_width,
        size_px=stage.size_px,
    )
    return DemoDecoderStage(decoder=decoder, image_drop=stage.image_drop, text_drop=stage.text_drop)
