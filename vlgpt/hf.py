"""transformers' idioms: importing this module registers vlgpt's exports with its Auto classes.

`AutoModel.from_pretrained(export)` and `AutoProcessor.from_pretrained(export)` then work without remote code, and
`generate` decodes interleaved replies with transformers' own logits processors, stopping criteria and streamers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.cache import RenderedPrompt
from vlgpt.decoding.generator import decode
from vlgpt.decoding.hypothesis import Hypothesis
from vlgpt.decoding.load import load_encoder, load_tokenizer
from vlgpt.decoding.prompts import ImageReader, empty_prompt, render, square_pixels
from vlgpt.decoding.stepwise import Hooks
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError
from vlgpt.models.language_models import cache_argument
from vlgpt.models.unified import UnifiedConfig, UnifiedModel
from vlgpt.tokens import MODEL_TYPE, DocumentTokenizer, Rendering

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name that this version of transformers gives the KV cache of an output."""


class VLGPTConfig(PreTrainedConfig):
    """`UnifiedConfig` as transformers wants it; `text_config` is the language model's own configuration."""

    model_type = MODEL_TYPE
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - transformers reads it from the class

    def __init__(self, **values: Any):
        own = {name: values.pop(name) for name in list(values) if name in UnifiedConfig.__dataclass_fields__}
        text = own.get("text_config", {"model_type": "llama"})
        if isinstance(text, dict):
            text = AutoConfig.for_model(**{"model_type": "llama", **text})
        self.text_config = text
        values["tie_word_embeddings"] = bool(getattr(text, "tie_word_embeddings", False))
        super().__init__(**values)
        for name, value in {**own, "text_config": text}.items():
            setattr(self, name, value)

    def unified(self) -> UnifiedConfig:
        """The configuration that our own classes are built from. Raises UserError when it names no image tokenizer."""
        if not hasattr(self, "image_tokenizer"):
            raise UserError("this VLGPTConfig has no image_tokenizer: load one from an export of vlgpt")
        values = {
            name: getattr(self, name) for name in UnifiedConfig.__dataclass_fields__ if hasattr(self, name)
        }
        return UnifiedConfig(**{**values, "text_config": self.text_config.to_dict()})


@dataclass
class InterleavedOutput(ModelOutput):
    """`sequences` (B, L): prompt and reply, padded on the right; `visual`: per reply, its images (N, d)."""

    sequences: Tensor | None = None
    visual: tuple[tuple[Tensor, ...], ...] | None = None
    log_likelihoods: tuple[float, ...] | None = None


class VLGPTForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The unified model behind transformers' interface; state names equal those of `UnifiedModel`."""

    config_class = VLGPTConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"image_tokenizer", "image_detokenizer", "visual_scale"}  # noqa: RUF012

    def __init__(self, config: VLGPTConfig):
        super().__init__(config)
        attention: Any = getattr(config, "_attn_implementation", None) or "auto"
        # transformers' own choice for this class; the language model may have eager only.
        if attention == "sdpa":
            attention = "sdpa_or_eager"
        unified = UnifiedModel.from_config(config.unified(), attention=attention)
        self.lm = unified.lm
        self.image_tokenizer = unified.image_tokenizer
        self.image_detokenizer = unified.image_detokenizer
        self.post_init()
        # transformers looks for tied weights in direct children only.
        if getattr(config, "lora", None) is None:
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_input_embeddings(self) -> torch.nn.Module:
        """Token embeddings of the language model, a module (B, L) -> (B, L, D)."""
        return self.lm.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head of the language model, a module (B, L, D) -> (B, L, V)."""
        return self.lm.lm_head

    @property
    def folder(self) -> Path:
        """Where this model was loaded from."""
        return Path(self.config._name_or_path)

    @cached_property
    def tokenizer(self) -> DocumentTokenizer:
        """The document tokenizer of the export folder, read at the first use."""
        return load_tokenizer(self.folder, self.config.unified())

    @cached_property
    def _read_images(self) -> ImageReader:
        """The encoder is loaded when the first image comes; it is no part of this model's weights."""
        encoder = load_encoder(self.folder, self.config.unified().image_encoder)
        return ImageReader(
            image_tokenizer=self.image_tokenizer, encoder=None if encoder is None else encoder.to(self.device)
        )

    def visual_of(
        self,
        *,
        visual: Tensor | None = None,
        patches: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor | None:
        """Visual embeddings of images in whichever form they come: -> (M, N, d) | None."""
        if visual is not None:
            return visual
        if patches is not None:
            return self._encode("patches", patches)
        return None if pixel_values is None else self._encode("pixels", pixel_values)

    def _encode(self, kind: Literal["patches", "pixels"], values: Tensor) -> Tensor:
        if kind == "patches":
            return self.image_tokenizer.encode(values)
        return self._read_images([(kind, value) for value in values])

    def visual_positions(self, input_ids: Tensor) -> Tensor:
        """The N positions after every [IMG]: (B, L) -> (B, L) bool."""
        is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
        rows, starts = (input_ids == self.tokenizer.begin_image_id).nonzero(as_tuple=True)
        for offset in range(1, self.image_tokenizer.num_visual + 1):
            inside = starts + offset < input_ids.shape[1]
            is_visual[rows[inside], starts[inside] + offset] = True
        return is_visual

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        cache: object = None,
        inputs_embeds: Tensor | None = None,
        visual: Tensor | None = None,
        patches: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens (B, L, vocabulary), and in `hidden_states` what the regression head predicts."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            images = self.visual_of(visual=visual, patches=patches, pixel_values=pixel_values)
            is_visual = torch.zeros_like(input_ids, dtype=torch.bool)
            if images is not None:
                is_visual = self.visual_positions(input_ids)
                if int(is_visual.sum()) != images.shape[0] * images.shape[1]:
                    raise UserError(f"{int(is_visual.sum())} visual positions for {images.shape[0]} images")
                images = images.to(self.dtype)
            inputs_embeds = self.lm.embed(input_ids, is_visual, images)
        kept = past_key_values if cache is None else cache
        output = self.lm.backbone(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=bool(use_cache) or kept is not None,
            **cache_argument(self.lm.backbone, kept),
        )
        hidden = output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm.logits(hidden),
            hidden_states=(self.lm.regression_head(hidden),),
            **{CACHE: output.get(CACHE)},
        )

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate` with interleaved decoding, unless another `custom_generate` is given.

        Further arguments: `images` (free, never, force), `max_images`, `visual_guidance`, `seed` as in DecodeSettings,
        and `visual`, `patches` or `pixel_values`. `max_new_tokens` counts text tokens and [IMG]. Returns an
        `InterleavedOutput` (a plain tensor of ids with `return_dict_in_generate=False`).
        """
        if kwargs.get("custom_generate") is None:
            kwargs["custom_generate"] = interleaved_generate
            kwargs.setdefault("return_dict_in_generate", True)
            kwargs["token_streamer"] = streamer  # transformers drops a streamer when a callable is given
            streamer = None
        return super().generate(*args, streamer=streamer, **kwargs)  # type: ignore[misc]

    def conditions_of(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """See `UnifiedModel.conditions_of`."""
        return self.unified().conditions_of(visual)

    def unified(self) -> UnifiedModel:
        """The same parts as our own class has them."""
        return UnifiedModel(
            lm=self.lm, image_tokenizer=self.image_tokenizer, image_detokenizer=self.image_detokenizer
        )


def interleaved_generate(
    model: VLGPTForConditionalGeneration,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    visual: Tensor | None = None,
    patches: Tensor | None = None,
    pixel_values: Tensor | None = None,
    images: Literal["free", "never", "force"] = "free",
    max_images: int = 1,
    visual_guidance: float = 1.0,
    seed: int = 0,
    token_streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | InterleavedOutput:
    """What `generate(custom_generate=...)` calls once it has prepared everything.

    Draws come from generators addressed by (seed, row). Raises UserError for several sequences per prompt.
    """
    if generation_config.num_return_sequences not in (None, 1):
        raise UserError("num_return_sequences must be 1: ask with several seeds instead")
    num_beams = generation_config.num_beams or 1
    is_sampling = bool(generation_config.do_sample)
    settings = DecodeSettings(
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        num_beams=num_beams,
        length_penalty=1.0 if generation_config.length_penalty is None else generation_config.length_penalty,
        temperature=1.0 if is_sampling else 0.0,  # warpers are among the processors
        images=images,
        max_images=max_images,
        visual_guidance=visual_guidance,
        seed=seed,
    )
    mask = model_kwargs.get("attention_mask")
    embeddings = model.visual_of(visual=visual, patches=patches, pixel_values=pixel_values)
    prompts = rows_of(model, input_ids[::num_beams], None if mask is None else mask[::num_beams], embeddings)
    empty = []
    if settings.has_guidance:
        is_chat = [_is_chat(model.tokenizer, prompt) for prompt in prompts]
        documents = [Document("", "", (TextPart("", "user"),) if chat else ()) for chat in is_chat]
        empty = [empty_prompt(document, tokenizer=model.tokenizer) for document in documents]
    hypotheses = decode(
        model.unified(),
        model.tokenizer,
        prompts,
        settings,
        empty_prompts=empty,
        hooks=Hooks(
            process=logits_processor if len(logits_processor) else None,  # type: ignore[arg-type]
            should_stop=_criteria(stopping_criteria),
            on_token=_streaming(token_streamer),
        ),
    )
    if token_streamer is not None:
        token_streamer.end()
    pad_id, device = model.tokenizer.eos_id, input_ids.device
    return _output(prompts, hypotheses, pad_id, generation_config, device)


def _streaming(streamer: Any) -> Callable[[int], None] | None:
    """Give every token to a streamer of transformers, if there is one."""
    return None if streamer is None else lambda token: streamer.put(torch.tensor([token]))


def _output(
    prompts: Sequence[RenderedPrompt],
    hypotheses: Sequence[Hypothesis],
    pad_id: int,
    config: GenerationConfig,
    device: torch.device,
) -> Tensor | InterleavedOutput:
    rows = [
        [*prompt.token_ids.tolist(), *hypothesis.token_ids] for prompt, hypothesis in zip(prompts, hypotheses)
    ]
    width = max(len(row) for row in rows)
    sequences = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    if not config.return_dict_in_generate:
        return sequences
    return InterleavedOutput(
        sequences=sequences,
        visual=tuple(tuple(hypothesis.visual) for hypothesis in hypotheses),
        log_likelihoods=tuple(hypothesis.log_likelihood for hypothesis in hypotheses),
    )


def _is_chat(tokenizer: DocumentTokenizer, prompt: RenderedPrompt) -> bool:
    """Whether a prompt begins as all chats do: start, system message, header of the user."""
    head = [token for piece in tokenizer.chat_head for token in piece.ids]
    return prompt.token_ids[: len(head)].tolist() == head


def _criteria(criteria: StoppingCriteriaList) -> Callable[[Tensor], bool] | None:
    """Criteria but length and end token, which are ours; None when there are none."""
    rest = [c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
    if not rest:
        return None
    return lambda ids: any(bool(torch.as_tensor(criterion(ids, None)).any()) for criterion in rest)


def rows_of(
    model: VLGPTForConditionalGeneration, input_ids: Tensor, mask: Tensor | None, visual: Tensor | None
) -> list[RenderedPrompt]:
    """A padded batch as prompts: (B, L), (B, L) | None, (M, N, d) | None -> B prompts."""
    prompts = []
    first = 0
    for row, ids in enumerate(input_ids.cpu()):
        kept = ids if mask is None else ids[mask[row].bool().cpu()]
        is_visual = model.visual_positions(kept[None])[0]
        count = int(is_visual.sum()) // model.image_tokenizer.num_visual
        own = None if visual is None or count == 0 else visual[first : first + count]
        prompts.append(RenderedPrompt(f"row {row}", kept, is_visual, own))
        first += count
    if first != (0 if visual is None else len(visual)):
        raise UserError(f"the prompts have {first} images, {0 if visual is None else len(visual)} are given")
    return prompts


class VLGPTProcessor(ProcessorMixin):
    """Documents and images -> `input_ids`, `attention_mask` (padded on the left), `pixel_values`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_visual: int = 32,
        template: str = "vlgpt",
        is_boundary_target: bool = True,
        image_size_px: int = 224,
        rendering: Rendering = "parts",
        **kwargs: Any,
    ):
        self.num_visual, self.template, self.rendering = num_visual, template, rendering
        self.is_boundary_target, self.image_size_px = is_boundary_target, image_size_px
        self.documents = DocumentTokenizer(
            tokenizer,
            num_visual=num_visual,
            template=template,
            is_boundary_target=is_boundary_target,
            rendering=rendering,
        )
        super().__init__(tokenizer, **kwargs)

    def __call__(
        self,
        documents: Document | str | Sequence[Document | str],
        images: Sequence[Image.Image | bytes] = (),
        **kwargs: object,
    ) -> BatchFeature:
        """Render documents (a string is a plain one) as prompts; `images` in reading order over all of them.

        Raises UserError when the number of images differs.
        """
        batch = [documents] if isinstance(documents, (str, Document)) else list(documents)
        rendered = [
            render(
                Document("", "", (TextPart(item),)) if isinstance(item, str) else item,
                tokenizer=self.documents,
                visual=None,
                address="",
            )
            for item in batch
        ]
        wanted = sum(item.num_images for item in batch if isinstance(item, Document))
        if wanted != len(images):
            raise UserError(f"the documents have {wanted} images, {len(images)} are given")
        width = max(len(row) for row in rendered)
        ids = torch.full((len(rendered), width), self.documents.eos_id)
        mask = torch.zeros(len(rendered), width, dtype=torch.long)
        for number, row in enumerate(rendered):
            ids[number, width - len(row) :] = row.token_ids
            mask[number, width - len(row) :] = 1
        data = {"input_ids": ids, "attention_mask": mask}
        if images:
            data["pixel_values"] = torch.stack([square_pixels(image, self.image_size_px) for image in images])
        return BatchFeature(data)

    def decode(self, ids: object, **kwargs: object) -> str:
        """Text of one sequence of token ids (L,); spans from [IMG] to [/IMG] are left out. `kwargs` are ignored."""
        kept: list[int] = []
        is_inside = False
        for token in torch.as_tensor(ids).tolist():
            is_inside = is_inside or token == self.documents.begin_image_id
            if not is_inside:
                kept.append(token)
            is_inside = is_inside and token != self.documents.end_image_id
        return self.documents.decode(kept)

    def batch_decode(self, sequences: Any, **kwargs: object) -> list[str]:
        """Texts of several sequences of ids, each decoded as `decode` does. `kwargs` are ignored."""
        return [self.decode(ids) for ids in sequences]


AutoConfig.register(MODEL_TYPE, VLGPTConfig, exist_ok=True)
AutoModel.register(VLGPTConfig, VLGPTForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VLGPTConfig, VLGPTForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VLGPTConfig, VLGPTProcessor, exist_ok=True)
