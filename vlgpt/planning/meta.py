"""The real stage of a run on the meta device, and its frozen towers: configurations are read, weights never are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlgpt import settings as s
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.models.component import CONFIG_FILE
from vlgpt.models.conditions import IpAdapterImageConditioner, image_encoder_of, is_sdxl_pipeline, read_parts
from vlgpt.models.encoders import OpenClipEncoder, PixelEncoder, TransformersClipEncoder
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.ip_adapter import Resampler, load_resampler, read_ip_adapter
from vlgpt.models.language_models import check_parts, from_configuration
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel, read_export
from vlgpt.planning.costs import Cost, StageCosts, attend_in_plan, costs_of
from vlgpt.stages.base import dtype_of
from vlgpt.stages.language import LanguageStage
from vlgpt.stages.tokenizer import ImageTokenizerStage
from vlgpt.tokens import NUM_IMAGE_TOKENS, padded_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION = "vlgpt_plan"  # what transformers calls `attend_in_plan`
# Component -> what the names of its parameters in a stage contain. The first that fits counts.
COMPONENTS = {
    "lora_adapters": "lora_",
    "token_rows": "trainable_tokens",
    "regression_head": "lm.regression_head",
    "input_projection": "lm.projection",
    "language_model": "lm.",
    "image_detokenizer": "detokenizer",
    "image_tokenizer": "tokenizer",
}


@dataclass(frozen=True)
class Tower:
    """A frozen encoder. `flops` is its forward pass for one image or caption: `num_tokens` of `width` come out."""

    num_parameters: int
    flops: int
    num_tokens: int
    width: int


@dataclass(frozen=True)
class PlannedStage:
    """The stage of a run on the meta device, and its frozen towers by name. Towers in `idle` are held, but not run."""

    stage: LanguageStage | ImageTokenizerStage
    # Positions of a packed row, 0 in stage 1.
    length: int = 0
    towers: Mapping[str, Tower] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    # Where the shapes came from, in words.
    origins: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Component -> (all, trained)."""
        return parameters_of(self.stage) | {name: (t.num_parameters, 0) for name, t in self.towers.items()}

    @cached_property
    def costs(self) -> StageCosts:
        """Per unit. Raises UserError when the stage cannot run on the meta device."""
        running = sum(tower.flops for name, tower in self.towers.items() if name not in self.idle)
        try:
            return costs_of(self.stage, length=self.length, encoding=Cost(forward=running))
        except RuntimeError as error:
            raise UserError(
                f"the stage cannot run with these shapes, so it cannot be planned: {str(error).splitlines()[0]}"
            ) from error

    @property
    def number_bytes(self) -> int:
        """Of a weight in the precision of the run."""
        return next(self.stage.parameters()).element_size()


def parameters_of(stage: nn.Module) -> dict[str, tuple[int, int]]:
    """Component -> (all, trained), counted on the real stage; tied weights once."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in stage.named_parameters():
        part = next(part for part, words in COMPONENTS.items() if words in name)
        count, trained = found.get(part, (0, 0))
        found[part] = (count + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    image = ("image_tokenizer", "image_detokenizer")
    order = ("language_model", "lora_adapters", "token_rows", "regression_head", "input_projection", *image)
    return {name: found[name] for name in order if name in found}


def planned_stage(run: s.RunSettings) -> PlannedStage:
    """The parts of a run, in its precision. Raises UserError for an unknown shape or kind of stage."""
    settings = run.stage
    dtype = dtype_of(run)
    if isinstance(settings, s.TokenizerStageSettings):
        towers = {"image_encoder": image_tower(settings.encoder)} if settings.encoder else {}
        towers |= conditioner_towers(settings.conditioner) if settings.conditioner else {}
        # A tower whose features are read from disk does not run.
        idle = tuple(name.replace("_condition", "_conditioner") for name in run.data.features)
        idle += ("image_encoder",) if "patches" in idle else ()
        return PlannedStage(_image_tokenizer_stage(settings).to(dtype), towers=towers, idle=idle)
    if not isinstance(settings, s.LanguageStageSettings):
        raise UserError(f"stage.kind {settings.kind!r} cannot be planned; valid: {', '.join(s.STAGES)}")
    tokenizer, detokenizer, origin = image_parts(settings)
    stage = _language_stage(settings, tokenizer, detokenizer).to(dtype)
    towers = {"image_encoder": image_tower(settings.encoder)} if settings.encoder else {}
    return PlannedStage(stage, run.data.sequence_length, towers, origins=(f"image parts: {origin}",))


def _image_tokenizer_stage(settings: s.TokenizerStageSettings) -> ImageTokenizerStage:
    """As training builds it, without what it reads or chooses by the machine."""
    changes: dict[str, Any] = {
        "encoder": None,
        "conditioner": None,
        "tokenizer_from": None,
        "detokenizer_from": None,
    }
    changes |= {"attention": "sdpa", "has_checkpointing": False}
    with torch.device("meta"):
        return ImageTokenizerStage.build(settings.model_copy(update=changes), num_sources=1)


def _language_stage(
    settings: s.LanguageStageSettings, tokenizer: ImageTokenizer, detokenizer: ImageDetokenizer
) -> LanguageStage:
    """The LM of a configuration, its vocabulary grown by [IMG], [/IMG] and padding unless it is an export's."""
    config = configuration(settings.language_model)
    if read_export(settings.language_model) is None:
        config.vocab_size = padded_vocabulary(config.vocab_size + NUM_IMAGE_TOKENS)
    with torch.device("meta"):
        language_model = meta_language_model(config)
        check_parts(language_model, name=settings.language_model, trained=settings.trained)
        lm = MultimodalLM(
            language_model,
            num_tokens=config.vocab_size,
            num_visual=tokenizer.num_visual,
            visual_width=tokenizer.visual_width,
            head=settings.head,
            head_options=settings.head_options,
        )
        model = UnifiedModel(lm=lm, image_tokenizer=tokenizer, image_detokenizer=detokenizer)
        image_tokens = [config.vocab_size - 2, config.vocab_size - 1]
        chosen = settings.model_copy(
            update={"encoder": None, "attention": "sdpa", "has_checkpointing": False}
        )
        return LanguageStage.assemble(model, chosen, image_tokens=image_tokens, num_sources=1)


def meta_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM without weights, whose attention can run without numbers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_in_plan)
    with torch.device("meta"):
        return from_configuration(config, ATTENTION)


def image_arguments(settings: s.LanguageStageSettings) -> tuple[dict[str, Any], dict[str, Any], str] | None:
    """Arguments of image tokenizer and detokenizer, and whose: the export's or stage 1's. None: it is yet to run."""
    export = read_export(settings.language_model)
    if settings.image_tokenizer is None and export is not None:
        return export["image_tokenizer"], export["image_detokenizer"], settings.language_model
    folder = Path(settings.image_tokenizer or "")
    files = [folder / name / CONFIG_FILE for name in ("image_tokenizer", "image_detokenizer")]
    if not all(file.is_file() for file in files):
        return None
    tokenizer, detokenizer = (json.loads(file.read_text())["arguments"] for file in files)
    return tokenizer, detokenizer, str(folder)


def image_parts(settings: s.LanguageStageSettings) -> tuple[ImageTokenizer, ImageDetokenizer, str]:
    """Without weights, and where their shapes come from; of the paper's size as long as stage 1 has not run."""
    found = image_arguments(settings)
    if found is None:
        paper = _image_tokenizer_stage(s.TokenizerStageSettings(kind="image_tokenizer"))
        origin = f"the paper's size ({settings.image_tokenizer} is not there yet)"
        return paper.tokenizer, paper.detokenizer, origin
    tokenizer, detokenizer, origin = found
    with torch.device("meta"):
        return ImageTokenizer(**tokenizer), ImageDetokenizer(**detokenizer), origin


# ------------------------------------------------------------------------------------------------------ frozen encoders


def image_tower(encoder: s.EncoderSettings) -> Tower:
    """The image tower that makes patch features. Raises UserError when its shape is unknown."""
    clip = _clip(encoder, has_text=False)
    return _measured(getattr(clip.model, "visual", clip.model), lambda: clip.patches(_pixels(clip)))


def conditioner_towers(settings: s.EncoderSettings) -> dict[str, Tower]:
    """What makes e_v from pixels and e_t from captions, by name. Raises UserError when a shape is unknown."""
    if settings.library == "ip_adapter":
        image, texts = _diffusion_towers(settings.path)
    else:
        clip, image = _clip(settings, has_text=True), image_tower(settings)
        # open_clip makes ids without any file; a tokenizer of transformers is read from a folder.
        is_open = isinstance(clip, OpenClipEncoder)
        run = partial(clip.text_states, ["a"]) if is_open else partial(_states_of_ids, clip.model.text_model)
        whole = _measured(clip.model, run)
        texts = [replace(whole, num_parameters=whole.num_parameters - image.num_parameters)]
    count, flops = sum(t.num_parameters for t in texts), sum(t.flops for t in texts)
    return {
        "image_conditioner": image,
        "text_conditioner": replace(texts[0], num_parameters=count, flops=flops),
    }


def _clip(encoder: s.EncoderSettings, *, has_text: bool) -> OpenClipEncoder | TransformersClipEncoder:
    path, layer, has_cls = encoder.path, encoder.layer, encoder.has_cls
    with torch.device("meta"):
        if encoder.library == "open_clip":
            return OpenClipEncoder(path, has_weights=False, layer=layer, has_cls=has_cls)
        config = configuration(path)
        config = config if has_text else getattr(config, "vision_config", config)
        return TransformersClipEncoder(path, config=config, layer=layer, has_cls=has_cls)


def _pixels(encoder: PixelEncoder) -> Tensor:
    return torch.empty(1, 3, encoder.image_size_px, encoder.image_size_px, device="meta")


def _states_of_ids(text_encoder: PreTrainedModel) -> Tensor:
    """Hidden states of one caption: -> (1, Kt, Dt)."""
    ids = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=torch.long, device="meta")
    return text_encoder(input_ids=ids).last_hidden_state


def _diffusion_towers(description: str) -> tuple[Tower, list[Tower]]:
    """The encoders of a diffusion decoder that a JSON file names: ViT-H with its Resampler, one or two text towers."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    parts = read_parts(description)
    pipeline = parts["pipeline"]
    is_sdxl = _key(pipeline, "text_encoder_2") in published() or is_sdxl_pipeline(pipeline)
    resampler = (
        None if parts.get("reading") == "features" else _resampler(parts["adapter"], is_sdxl).to("meta")
    )
    kinds: dict[str, Any] = {"text_encoder": CLIPTextModel}
    kinds |= {"text_encoder_2": CLIPTextModelWithProjection} if is_sdxl else {}
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(configuration(*image_encoder_of(parts, description)))
        image = IpAdapterImageConditioner(vision, resampler=resampler)
        texts = [kind(configuration(pipeline, folder)) for folder, kind in kinds.items()]
    found = [_measured(text, partial(_states_of_ids, text)) for text in texts]
    return _measured(image, lambda: image.condition(_pixels(image))), found


def _resampler(adapter: str, is_sdxl: bool) -> Resampler:
    """That of a local adapter file; of a hub name, that of the published IP-Adapter Plus for SD 1.5 or SDXL."""
    if Path(adapter).is_file():
        return load_resampler(read_ip_adapter(adapter))
    return Resampler(width=1280, output_width=2048, num_heads=20) if is_sdxl else Resampler()


def _measured(module: nn.Module, run: Callable[[], Tensor]) -> Tower:
    """Forward FLOPs by torch's counter: on the meta device all attention is plain products, which it knows."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        states = run()
    count = sum(parameter.numel() for parameter in module.parameters())
    return Tower(count, counter.get_total_flops(), *states.shape[1:])


# ------------------------------------------------------------------------------------------------------- configurations


@cache
def published() -> dict[str, JsonObject]:
    """Configurations as published with the weights, so that no network is needed.

    Keys are the last part of the name, lower case, without "-hf", and the subfolder of a part.
    """
    found: dict[str, JsonObject] = json.loads(Path(__file__).with_name("shapes.json").read_text("utf-8"))
    return found


def configuration(path: str, subfolder: str = "") -> Any:
    """The transformers configuration of a model: a folder's, a published one's by name, else the hub's or its cache's.

    Raises UserError when there is none, with the way to get it.
    """
    from transformers import AutoConfig

    file = f"{subfolder}/{CONFIG_FILE}" if subfolder else CONFIG_FILE
    is_folder = (Path(path) / file).is_file()
    export = read_export(path)
    values = export["text_config"] if export is not None else published().get(_key(path, subfolder))
    try:
        if values is not None and (export is not None or not is_folder):
            return AutoConfig.for_model(**values)
        return AutoConfig.from_pretrained(path, subfolder=subfolder)
    except (OSError, ValueError, KeyError) as error:
        if is_folder:
            raise UserError(f"{path}/{file} cannot be read: {str(error).splitlines()[0]}") from error
        raise UserError(
            f"the shape of {path!r} is unknown: no folder with {file}, no name known here, and the hub gave nothing; "
            f"run `hf download {path} {file} --local-dir DIR` where there is a network, and name DIR in its place"
        ) from error


def _key(path: str, subfolder: str) -> str:
    """`meta-llama/Llama-2-7b-hf` -> `llama-2-7b`."""
    name = path.rstrip("/").rsplit("/", 1)[-1].lower()
    if subfolder:
        return f"{name}/{subfolder}"
    return name.removesuffix("-hf").replace("meta-llama", "llama").removesuffix("-instruct")
