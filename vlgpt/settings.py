"""The run's settings: strict, frozen pydantic models. A YAML file plus `a.b=c` overrides becomes one `RunSettings`.

Names are nouns with units and one meaning. Paper values are the defaults where the paper gives one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base: unknown keys and wrong types are errors; values never change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=False)


# ---------------------------------------------------------------------------------------------------------------- data


class SourceSettings(Settings):
    """One data set of the mixture: a folder of shards (or of foreign webdataset tars)."""

    name: str
    path: str
    weight: Annotated[float, Field(ge=0.0)] | Literal["size"] = (
        "size"  # share of the accepted sequences; "size": proportional to its samples
    )
    image_first: Fraction = (
        1.0  # probability that an image stays before the text part that follows it; else swapped
    )
    max_images: Positive = 5  # of a window with more, as many are sampled (paper: 5); chats end before
    keep_single_image: Fraction = 1.0  # probability to keep a window with exactly one image (OBELICS: 0.2)
    start: Literal["beginning", "random"] = "beginning"  # where a window of a too long document begins
    ramp: tuple[Fraction, Fraction] = (
        0.0,
        0.0,
    )  # shares of the run between which the weight grows from 0 to full


class DataSettings(Settings):
    """The mixture and how it becomes batches."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    mixing: Literal["weights", "temperature"] = "weights"
    temperature: Annotated[float, Field(gt=0.0)] = (
        1.0  # with mixing=temperature: share ~ size ** (1 / temperature)
    )
    sequence_length: Positive = 512  # positions of a packed row (language stages)
    packing: Literal["best_fit", "none"] = "best_fit"
    features: tuple[
        Literal["patches", "image_condition", "text_condition", "visual"], ...
    ] = ()  # read, not computed
    pixels: bool = False  # decode images (online encoders, CLIP and picture decoder training)
    image_size_px: Positive = 224
    decoder: Literal["pillow", "fast"] = "pillow"
    num_workers: Annotated[int, Field(ge=0)] = 2
    prefetch_batches: Positive = 4  # prepared ahead per rank, at least one per worker; or fewer:
    prefetch_bytes: Positive = 2 << 30  # per rank, so that batches of large features cannot fill the memory
    shuffle_shards: Positive = 16  # samples are shuffled inside blocks of this many shards of a source
    cache_dir: str | None = None  # where copies of remote shards and indexes of foreign tars are kept
    cache_bytes: Positive = 64 << 30
    seed: int = 0
    max_bad_fraction: Fraction = 0.01  # per source, over windows of 10,000 samples
    allow_data_change: bool = False
    watchdog_s: Annotated[float, Field(gt=0)] = 300.0


# -------------------------------------------------------------------------------------------------------------- models


class ConditionShapes(Settings):
    """Shapes that the frozen encoders give; checked against features and encoders at start."""

    num_patches: Positive = 257  # P: CLIP ViT-L/14 at 224 px, CLS kept
    patch_width: Positive = 1024  # C
    image_tokens: Positive = 16  # Kv of e_v: IP-Adapter Plus
    image_width: Positive = 768  # Dv
    text_tokens: Positive = 77  # Kt of e_t: SD 1.5
    text_width: Positive = 768  # Dt


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

    path: str
    library: Literal["open_clip", "transformers", "ip_adapter"] = "open_clip"
    pretrained: str | None = None
    layer: int = -2
    has_cls: bool = True


class LoraConfiguration(Settings):
    """LoRA on all linear layers (paper: rank 32; PAPER: alpha and dropout are not given, §4.1; as SEED-X)."""

    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.05


class ImageTokenizerStage(Settings):
    """Stage 1: image tokenizer and detokenizer, L = image_weight * MSE(z_v, e_v) + text_weight * MSE(z_t, e_t)."""

    kind: Literal["image_tokenizer"]
    shapes: ConditionShapes = ConditionShapes()
    num_visual: Positive = 32
    visual_width: Positive = 4096
    tokenizer: TransformerSettings = TransformerSettings()
    detokenizer: TransformerSettings = TransformerSettings()
    has_mean_token: bool = False
    image_weight: Annotated[float, Field(ge=0)] = 1.0
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    encoder: EncoderSettings | None = None  # computes patches online; None: patches come from features
    conditioner: EncoderSettings | None = None  # computes e_v and e_t online; None: from features
    tokenizer_from: str | None = None  # a stage-1 result whose image tokenizer is the start; None: random
    detokenizer_from: str | None = None  # the same for the detokenizer
    frozen: tuple[Literal["tokenizer", "detokenizer"], ...] = ()  # not trained
    statistics_samples: Positive = 8192  # samples from which target statistics are taken
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    has_checkpointing: bool = False

    @model_validator(mode="after")
    def _has_a_target(self) -> ImageTokenizerStage:
        if self.image_weight == 0 and self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0: nothing would be trained")
        if set(self.frozen) == {"tokenizer", "detokenizer"}:
            raise ValueError("frozen names both the tokenizer and the detokenizer: nothing would be trained")
        return self


class LanguageStage(Settings):
    """Stages 2 and 3: the multimodal language model. Which data it reads makes the difference between the two."""

    kind: Literal["language"]
    language_model: str  # an export of vlgpt, or any transformers causal LM
    image_tokenizer: str | None = None  # stage-1 export; None: the one inside the vlgpt export
    text_tokenizer: str | None = None  # None: the one beside the language model
    init_from: str | None = (
        None  # a run folder whose newest trainable weights are loaded (stage 3 continues LoRA)
    )
    template: str = "vlgpt"
    trained: Literal["lora", "all"] = "lora"
    frozen: tuple[
        Literal["regression_head", "input_projection", "token_rows", "embeddings"], ...
    ] = ()  # not trained; token_rows go with trained=lora, embeddings with trained=all
    lora: LoraConfiguration = LoraConfiguration()
    head: Literal["linear", "mlp"] = "linear"
    objective: Literal["mse", "mse_cosine", "smooth_l1"] = "mse"
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    visual_weight: Annotated[float, Field(ge=0)] = 1.0
    first_visual_weight: Annotated[float, Field(gt=0)] = (
        1.0  # weight of slot 1 against the others of an image
    )
    visual_input_drop: Fraction = (
        0.0  # share of visual inputs set to zero in training (against exposure bias)
    )
    visual_input_noise: Annotated[float, Field(ge=0)] = (
        0.0  # std of noise on visual inputs, standardised scale
    )
    is_boundary_target: bool = True
    encoder: EncoderSettings | None = None  # computes patches online, and goes into the export
    picture_decoder: str | None = None  # goes into the export, so that it can draw
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    has_checkpointing: bool = False

    @model_validator(mode="after")
    def _freezes_what_is_there(self) -> LanguageStage:
        wrong = "embeddings" if self.trained == "lora" else "token_rows"
        if wrong in self.frozen:
            other = "all" if self.trained == "lora" else "lora"
            raise ValueError(f"frozen names {wrong}, which only trained={other} trains: leave it out")
        return self


class DemoClipStage(Settings):
    """Demo only: a tiny CLIP, trained from scratch because no pre-trained one can be had offline."""

    kind: Literal["demo_clip"]
    text_tokenizer: str
    image_size_px: Positive = 48
    patch_size_px: Positive = 12
    width: Positive = 128
    image_depth: Positive = 4
    text_depth: Positive = 2
    head_width: Positive = 32
    context_length: Positive = 24


class DemoDecoderStage(Settings):
    """Demo only: the picture decoder, trained on pictures and their frozen conditions."""

    kind: Literal["demo_decoder"]
    decoder: Literal["conv", "diffusion"] = "conv"
    coarse: str | None = None  # diffusion: the trained conv decoder whose residual is modelled
    noise_scale: Annotated[float, Field(gt=0, le=1)] = 0.3  # diffusion: of the noise that pictures start from
    shapes: ConditionShapes
    size_px: Positive = 48
    image_drop: Fraction = 0.1  # share of samples trained without z_v, so that z_t alone can be drawn
    text_drop: Fraction = 0.1


StageSettings = Annotated[
    ImageTokenizerStage | LanguageStage | DemoClipStage | DemoDecoderStage, Field(discriminator="kind")
]


# ------------------------------------------------------------------------------------------------------------ training


class OptimizerSettings(Settings):
    """AdamW with warm-up and cosine to a floor. PAPER: AdamW, cosine, lr are given (§4.1); the rest as SEED-X."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # not on norms, biases, embeddings and other vectors
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    min_lr_ratio: Fraction = 0.05
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # of a moving average that becomes the result; 0: none
    )


class CheckpointSettings(Settings):
    """Commits every `interval_steps`, the newest `keep` are kept; each holds trained weights and optimizer state."""

    interval_steps: Positive = 1000
    keep: Annotated[int, Field(ge=2)] = 3
    resume: Literal["auto", "never"] = "auto"
    upload: str | None = None  # any fsspec URL: every commit is copied there in the background, marker last
    on_disk_full: Literal["continue", "stop"] = "continue"  # when a commit does not fit: train on, or exit 74


class PictureCheckSettings(Settings):
    """Stage 1: held-out pictures through tokenizer, detokenizer and picture decoder at every validation."""

    picture_decoder: str
    judge: EncoderSettings | None = (
        None  # CLIP whose similarity is logged (paper: ViT-L/14); None: sheet only
    )
    num_pictures: Positive = 256
    num_on_sheet: Positive = 8


class ProbeSettings(Settings):
    """A benchmark of `evaluation` on a few examples at every validation (language stages)."""

    benchmark: str
    data: str
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
            raise ValueError("pictures shows held-out pictures: name validation.sources, or remove it")
        return self


class FaultSettings(Settings):
    """What is watched while a run goes on."""

    replica_check_steps: Annotated[int, Field(ge=0)] = 1000  # compare weights between ranks; 0: never
    spike_sigma: Annotated[float, Field(ge=0)] = (
        6.0  # loss this far above its moving mean is an event; 0: off
    )
    spike_rollback: bool = False  # go back to the newest commit and leave out the data since then
    max_rollbacks: Positive = 3


class ProfileSettings(Settings):
    """`torch.profiler` over `num_steps` steps from `start_step` on; 0 steps: off. Traces lie in RUN/profile/."""

    start_step: Positive = 10
    num_steps: Annotated[int, Field(ge=0)] = 0


class RunSettings(Settings):
    """One training run: everything that decides its result."""

    name: str
    output_dir: str
    stage: StageSettings
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: Positive
    global_batch: (
        Positive  # samples (stage 1) or packed rows (stages 2, 3) per optimizer step, over all ranks
    )
    micro_batch: Positive
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0
    threads: Positive = 1  # torch threads per process on CPU
    checkpoint: CheckpointSettings = CheckpointSettings()
    validation: ValidationSettings = ValidationSettings()
    log_interval_steps: Positive = 10
    wandb_project: str | None = None  # also send numbers to Weights & Biases
    max_skipped_steps: Positive = 5  # non-finite steps in a row before the run stops
    step_timeout_s: Annotated[float, Field(gt=0)] = 1800.0  # no step ends for so long: stacks, then exit 72
    faults: FaultSettings = FaultSettings()
    profile: ProfileSettings = ProfileSettings()
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # of one device, for MFU; None: known GPUs only

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
