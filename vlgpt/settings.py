"""The run's settings: strict, frozen pydantic models. A YAML file plus `a.b=c` overrides becomes one `RunSettings`.

Read from the end: `RunSettings` is one training run, and names all other classes. Names are nouns with units and one
meaning. Paper values are the defaults where the paper gives one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vlgpt.errors import UserError
from vlgpt.files import expand_paths
from vlgpt.registry import is_dotted, load_object

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True)
class Input:
    """Marks a setting that names what a run reads: a file, a folder or a URL; `may_be_name`: or a name on the hub."""

    may_be_name: bool = False

    def is_missing(self, path: str) -> bool:
        """Whether nothing is there. What may be a name (no slash, or `owner/name`) is not judged, and no URL."""
        may_be_elsewhere = self.may_be_name and path.count("/") < 2 and not path.startswith(("/", "."))
        if "://" in path or may_be_elsewhere:
            return False
        found = expand_paths(Path(path))
        return not found or not all(place.exists() for place in found)


DataPath = Annotated[str, Input()]
ModelPath = Annotated[str, Input(may_be_name=True)]
# Regression heads of vlgpt.models.heads, by name.
HEADS = ("linear", "mlp")


class Settings(BaseModel):
    """Base: unknown keys and wrong types are errors; values never change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=False)


# ---------------------------------------------------------------------------------------------------------------- data


class SourceSettings(Settings):
    """One data set of the mixture: a folder of shards (or of foreign webdataset tars)."""

    name: str
    path: DataPath
    # Share of the accepted sequences; "size": proportional to the number of samples.
    weight: NotNegative | Literal["size"] = "size"
    # Probability that an image stays before the text part that follows it; otherwise the two are swapped.
    image_first: Fraction = 1.0
    # Of a window with more images, as many are sampled (paper: 5). A chat ends before its first image too many.
    max_images: Positive = 5
    # Probability to keep a window with exactly one image (OBELICS: 0.2).
    keep_single_image: Fraction = 1.0
    # Where a window of a too long document begins.
    start: Literal["beginning", "random"] = "beginning"
    # Shares of the run between which the weight grows from 0 to its full value.
    ramp: tuple[Fraction, Fraction] = (0.0, 0.0)


class DataSettings(Settings):
    """The mixture and how it becomes batches."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    mixing: Literal["weights", "temperature"] = "weights"
    # With mixing=temperature: share ~ size ** (1 / temperature).
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    # Positions of a packed row (language stages).
    sequence_length: Positive = 512
    packing: Literal["best_fit", "none"] = "best_fit"
    # What is read from data_prep.features instead of being computed.
    features: tuple[Literal["patches", "image_condition", "text_condition", "visual"], ...] = ()
    # Decode images: for online encoders, and for training a CLIP or an image decoder.
    pixels: bool = False
    image_size_px: Positive = 224
    decoder: Literal["pillow", "fast"] = "pillow"
    num_workers: Annotated[int, Field(ge=0)] = 2
    # Batches prepared ahead per rank, at least one per worker. `prefetch_bytes` bounds their memory per rank, so that
    # batches of large features cannot fill it.
    prefetch_batches: Positive = 4
    prefetch_bytes: Positive = 2 << 30
    # Samples are shuffled inside blocks of this many shards of a source.
    shuffle_shards: Positive = 16
    # Where copies of remote shards and indexes of foreign tars are kept.
    cache_dir: str | None = None
    cache_bytes: Positive = 64 << 30
    seed: int = 0
    # Per source, over windows of 10,000 samples.
    max_bad_fraction: Fraction = 0.01
    allow_data_change: bool = False
    watchdog_s: Annotated[float, Field(gt=0)] = 300.0


# -------------------------------------------------------------------------------------------------------------- models


class ConditionShapes(Settings):
    """Shapes that the frozen encoders give; checked against features and encoders at start."""

    # P x C: CLIP ViT-L/14 at 224 px, class token kept.
    num_patches: Positive = 257
    patch_width: Positive = 1024
    # Kv x Dv of e_v: IP-Adapter Plus.
    image_tokens: Positive = 16
    image_width: Positive = 768
    # Kt x Dt of e_t: Stable Diffusion 1.5.
    text_tokens: Positive = 77
    text_width: Positive = 768


class TransformerSettings(Settings):
    """Width and depth of the image tokenizer or detokenizer. PAPER: only depth 12 is given (§4.1)."""

    width: Positive = 1024
    depth: Positive = 12
    num_heads: Positive = 16
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    init_std: Annotated[float, Field(gt=0)] = 0.02


class EncoderSettings(Settings):
    """A frozen CLIP: `path` is a folder or a name that the library knows.

    PAPER: "the CLIP-L image encoder" is all that is said (§4.1). Its penultimate hidden states with the class token
    (257 x 1024) are our choice: CLIP trains no patch output of its last layer.
    `ip_adapter` is for conditioners only: `path` is the JSON file that names a diffusion decoder's parts.
    """

    path: ModelPath
    library: Literal["open_clip", "transformers", "ip_adapter"] = "open_clip"
    pretrained: str | None = None
    layer: int = -2
    has_cls: bool = True


class LoraSettings(Settings):
    """LoRA on all linear layers (paper: rank 32; PAPER: alpha and dropout are not given, §4.1; as SEED-X)."""

    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.05


# -------------------------------------------------------------------------------------------------------------- stages


class StageSettings(Settings):
    """Base of what is trained. `kind` is one of STAGES, or `package.module:Class` of a `Stage` of your own."""

    kind: str


class TokenizerStageSettings(StageSettings):
    """Stage 1: image tokenizer and detokenizer, L = image_weight * MSE(z_v, e_v) + text_weight * MSE(z_t, e_t)."""

    shapes: ConditionShapes = ConditionShapes()
    num_visual: Positive = 32
    visual_width: Positive = 4096
    tokenizer: TransformerSettings = TransformerSettings()
    detokenizer: TransformerSettings = TransformerSettings()
    has_mean_token: bool = False
    image_weight: NotNegative = 1.0
    text_weight: NotNegative = 1.0
    # `encoder` computes patches online, `conditioner` e_v and e_t; None: they are read from features.
    encoder: EncoderSettings | None = None
    conditioner: EncoderSettings | None = None
    # A stage-1 result whose tokenizer or detokenizer is the start; None: random weights.
    tokenizer_from: ModelPath | None = None
    detokenizer_from: ModelPath | None = None
    # Not trained.
    frozen: tuple[Literal["tokenizer", "detokenizer"], ...] = ()
    # Samples from which the statistics of the targets are taken.
    statistics_samples: Positive = 8192
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    has_checkpointing: bool = False

    @model_validator(mode="after")
    def _has_a_target(self) -> TokenizerStageSettings:
        if self.image_weight == 0 and self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0: nothing would be trained")
        if set(self.frozen) == {"tokenizer", "detokenizer"}:
            raise ValueError("frozen names both the tokenizer and the detokenizer: nothing would be trained")
        return self


class LanguageStageSettings(StageSettings):
    """Stages 2 and 3: the multimodal language model. Which data it reads makes the difference between the two."""

    # An export of vlgpt, or any causal language model of transformers.
    language_model: ModelPath
    # A stage-1 result; None: the tokenizer inside the vlgpt export.
    image_tokenizer: ModelPath | None = None
    # None: the one beside the language model.
    text_tokenizer: ModelPath | None = None
    # A run folder whose newest trainable weights are loaded (stage 3 continues LoRA).
    init_from: ModelPath | None = None
    template: str = "vlgpt"
    # With template=own: what chats begin with instead of the template's default; "" leaves the system message empty.
    system_message: str | None = None
    trained: Literal["lora", "all"] = "lora"
    # Not trained. `token_rows` goes with trained=lora, `embeddings` with trained=all.
    frozen: tuple[Literal["regression_head", "input_projection", "token_rows", "embeddings"], ...] = ()
    lora: LoraSettings = LoraSettings()
    # The regression head: linear (paper), mlp, or `package.module:Class` of your own; and options of its constructor.
    head: str = "linear"
    head_options: dict[str, str | int | float | bool] = {}
    objective: Literal["mse", "mse_cosine", "smooth_l1"] = "mse"
    text_weight: NotNegative = 1.0
    visual_weight: NotNegative = 1.0
    # Weight of slot 1 against the other slots of an image.
    first_visual_weight: Annotated[float, Field(gt=0)] = 1.0
    # Corruption of visual inputs in training, against exposure bias: the share that is set to zero, and the standard
    # deviation of noise in standardised scale.
    visual_input_drop: Fraction = 0.0
    visual_input_noise: NotNegative = 0.0
    is_boundary_target: bool = True
    # Computes patches online, and goes into the export.
    encoder: EncoderSettings | None = None
    # Goes into the export, so that it can draw.
    picture_decoder: ModelPath | None = None
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    has_checkpointing: bool = False

    @field_validator("head")
    @classmethod
    def _head_has_a_name(cls, head: str) -> str:
        if head not in HEADS and not is_dotted(head):
            raise ValueError(
                f"unknown; valid: {', '.join(HEADS)}, or package.module:Class of a head of your own"
            )
        return head

    @model_validator(mode="after")
    def _freezes_what_is_there(self) -> LanguageStageSettings:
        wrong = "embeddings" if self.trained == "lora" else "token_rows"
        if wrong in self.frozen:
            other = "all" if self.trained == "lora" else "lora"
            raise ValueError(f"frozen names {wrong}, which only trained={other} trains: leave it out")
        return self


STAGES: Mapping[str, type[StageSettings]] = {
    "image_tokenizer": TokenizerStageSettings,
    "language": LanguageStageSettings,
}
RENAMED_STAGES = {
    "demo_clip": "demo.stages:ClipStage",
    "demo_decoder": "demo.stages:DecoderStage (with decoder=diffusion: demo.stages:DiffusionStage)",
}


def stage_settings(kind: str) -> type[StageSettings]:
    """The settings class of a stage kind; a stage of another package names its own as `settings_class`.

    Raises UserError for an unknown kind.
    """
    if kind in STAGES:
        return STAGES[kind]
    if kind in RENAMED_STAGES:
        raise UserError(f"{kind} is now {RENAMED_STAGES[kind]}")
    if ":" not in kind:
        raise UserError(
            f"unknown; valid: {', '.join(STAGES)}, or package.module:Class of a stage of your own"
        )
    found = getattr(load_object(kind, key="stage.kind"), "settings_class", None)
    if not (isinstance(found, type) and issubclass(found, StageSettings)):
        raise UserError("this class has no settings_class derived from StageSettings: it is no stage")
    return found


def _of_its_kind(values: object) -> object:
    """Plain values -> settings of the class that their `kind` means, so that errors name its keys."""
    if not isinstance(values, dict) or not isinstance(kind := values.get("kind"), str):
        return values
    try:
        found = stage_settings(kind)
    except UserError as error:
        problem = PydanticCustomError("stage_kind", "{reason}", {"reason": str(error)})
        raise ValidationError.from_exception_data(
            "stage", [{"type": problem, "loc": ("kind",), "input": kind}]
        ) from error
    return found.model_validate(values)


# ------------------------------------------------------------------------------------------------------------ training


class OptimizerSettings(Settings):
    """AdamW with warm-up and cosine to a floor. PAPER: AdamW, cosine, lr are given (§4.1); the rest as SEED-X."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    # Not on norms, biases, embeddings and other vectors.
    weight_decay: NotNegative = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    min_lr_ratio: Fraction = 0.05
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    # Of a moving average of the weights, which becomes the result; 0: none.
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0


class CheckpointSettings(Settings):
    """Commits every `interval_steps`, the newest `keep` are kept; each holds trained weights and optimizer state."""

    interval_steps: Positive = 1000
    keep: Annotated[int, Field(ge=2)] = 3
    resume: Literal["auto", "never"] = "auto"
    # Any fsspec URL: every commit is copied there in the background, its marker last.
    upload: str | None = None
    # When a commit does not fit on the disk: train on, or exit with code 74.
    on_disk_full: Literal["continue", "stop"] = "continue"


class PictureCheckSettings(Settings):
    """Stage 1: held-out images through tokenizer, detokenizer and image decoder at every validation."""

    picture_decoder: DataPath
    # A CLIP whose similarity is logged (paper: ViT-L/14); None: only the contact sheet.
    judge: EncoderSettings | None = None
    num_pictures: Positive = 256
    num_on_sheet: Positive = 8


class ProbeSettings(Settings):
    """A benchmark of `evaluation` on a few examples at every validation (language stages)."""

    benchmark: str
    data: DataPath
    num_examples: Positive = 200
    batch_size: Positive = 8
    prompts: str = "vlgpt"
    options: dict[str, str | int | float | bool] = {}


class ValidationSettings(Settings):
    """Held-out loss every `interval_steps`; `sources` are shards that training never reads."""

    interval_steps: Positive = 1000
    sources: tuple[SourceSettings, ...] = ()
    max_batches: Positive = 32
    pictures: PictureCheckSettings | None = None
    probes: tuple[ProbeSettings, ...] = ()

    @model_validator(mode="after")
    def _pictures_come_from_sources(self) -> ValidationSettings:
        if self.pictures is not None and not self.sources:
            raise ValueError("pictures shows held-out images: name validation.sources, or remove it")
        return self


class FaultSettings(Settings):
    """What is watched while a run goes on."""

    # Compare weights between ranks this often; 0: never.
    replica_check_steps: Annotated[int, Field(ge=0)] = 1000
    # A loss this many standard deviations above its moving mean is an event; 0: off.
    spike_sigma: NotNegative = 6.0
    # After a spike, go back to the newest commit and leave out the data since then.
    spike_rollback: bool = False
    max_rollbacks: Positive = 3


class ProfileSettings(Settings):
    """`torch.profiler` over `num_steps` steps from `start_step` on; 0 steps: off. Traces lie in RUN/profile/."""

    start_step: Positive = 10
    num_steps: Annotated[int, Field(ge=0)] = 0


class RunSettings(Settings):
    """One training run: everything that decides its result."""

    name: str
    output_dir: str
    stage: Annotated[SerializeAsAny[StageSettings], BeforeValidator(_of_its_kind)]
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: Positive
    # Samples (stage 1) or packed rows (stages 2, 3) per optimizer step, over all ranks.
    global_batch: Positive
    micro_batch: Positive
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    # torch threads per process on CPU.
    threads: Positive = 1
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    log_interval_steps: Positive = 10
    # Also send the numbers to Weights & Biases.
    wandb_project: str | None = None
    # Non-finite steps in a row before the run stops.
    max_skipped_steps: Positive = 5
    # When no step ends for so long, all stacks are written and the process exits with code 72.
    step_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    faults: FaultSettings = FaultSettings()
    profile: ProfileSettings = ProfileSettings()
    # Of one device, for MFU; None: known GPUs only.
    peak_tflops: Annotated[float, Field(gt=0)] | None = None

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step and rank. Raises ValueError when the global batch cannot be divided."""
        per_micro_step = self.micro_batch * world_size
        if self.global_batch % per_micro_step:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x "
                f"{world_size} processes"
            )
        return self.global_batch // per_micro_step

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir)
