"""The multimodal language model: a causal LM that reads and predicts visual embeddings too (paper §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlgpt.batch import Batch
from vlgpt.log import UserError, get_logger
from vlgpt.models import packed_attention
from vlgpt.models.heads import HeadKind, RegressionHead
from vlgpt.models.layers import has_flash
from vlgpt.models.losses import TargetPositions
from vlgpt.models.packed_attention import packed_lengths
from vlgpt.models.standardise import KeepsBuffers
from vlgpt.models.weights import load_whole
from vlgpt.tokens import DocumentTokenizer

Attention = Literal["auto", "flash_attention_2", "sdpa", "eager"]


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on all linear layers of the transformer (paper §4.1: rank 32; PAPER: alpha and dropout are not given)."""

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.05


def choose_attention(wanted: Attention) -> str:
    """`auto`: flash-attn when a GPU and the package are there, SDPA otherwise; says which in one log line."""
    if wanted != "auto":
        return wanted
    chosen = "flash_attention_2" if has_flash() else "sdpa"
    reason = "" if has_flash() else " (flash-attn needs a CUDA GPU and `pip install vlgpt[gpu]`)"
    get_logger().info("attention: %s%s", chosen, reason)
    return chosen


def load_language_model(
    path: str | Path, *, attention: Attention = "auto", dtype: torch.dtype = torch.float32
) -> Any:
    """Any transformers causal LM from a folder or hub name, shard by shard.

    Where `dtype` is that of the file, its weights stay mapped: processes of one machine share them. Raises UserError
    when it cannot be loaded or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    chosen = choose_attention(attention)
    try:
        options = {"dtype": dtype, "attn_implementation": chosen, "ignore_mismatched_sizes": True}
        model = load_whole(AutoModelForCausalLM, str(path), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no language model could be loaded from {str(path)!r}: {reason}") from error
    if not hasattr(getattr(model, "model", None), "embed_tokens") or not hasattr(model, "lm_head"):
        raise UserError(
            f"{path} is a {type(model).__name__}, whose parts are not named model.embed_tokens and lm_head: "
            "wanted LLaMA, Mistral, Qwen or another model of that family"
        )
    model.config.use_cache = False
    return model


class MultimodalLM(KeepsBuffers):
    """A causal LM, a scale and projection for visual inputs, and a regression head beside the LM head.

    Args:
        language_model: a transformers causal LM whose vocabulary already holds the image tokens.
        num_tokens: real tokens; logits of the padding rows after them are masked.
        num_visual, visual_width: N and d of the image tokenizer.
        head: `linear` (paper) or `mlp`.
    A standardised visual embedding enters as `projection(x) * visual_scale`, `visual_scale` being the RMS of the
    token embeddings, so pictures and words have one scale; a predicted embedding is fed back the same way.
    """

    visual_scale: Tensor

    def __init__(
        self,
        language_model: Any,
        *,
        num_tokens: int,
        num_visual: int,
        visual_width: int,
        head: HeadKind = "linear",
    ):
        super().__init__()
        packed_attention.register()
        self.language_model = language_model
        self.num_tokens, self.num_visual, self.visual_width = num_tokens, num_visual, visual_width
        hidden = language_model.config.hidden_size
        self.projection = nn.Identity() if hidden == visual_width else nn.Linear(visual_width, hidden)
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=visual_width**-0.5)
            nn.init.zeros_(self.projection.bias)
        self.regression_head = RegressionHead(hidden_width=hidden, visual_width=visual_width, kind=head)
        weight = language_model.get_input_embeddings().weight
        scale = (
            weight.detach().float().square().mean().sqrt() if weight.device.type != "meta" else torch.ones(())
        )
        self.register_buffer("visual_scale", scale.reshape(()))

    @property
    def backbone(self) -> Any:
        """The transformer without the LM head."""
        base = self.language_model.get_base_model() if self.has_lora else self.language_model
        return base.model

    @property
    def lm_head(self) -> nn.Module:
        base = self.language_model.get_base_model() if self.has_lora else self.language_model
        return base.get_output_embeddings()

    @property
    def has_lora(self) -> bool:
        # not `peft_config`: peft < 0.19 leaves that behind when it merges
        return hasattr(self.language_model, "get_base_model")

    def embed(self, token_ids: Tensor, is_visual: Tensor, visual: Tensor | None) -> Tensor:
        """Input embeddings: (B, L), (B, L), (M, N, d) | None -> (B, L, D)."""
        embeddings = self.backbone.get_input_embeddings()(token_ids)
        if visual is None or visual.shape[0] == 0:
            return embeddings + 0.0 * self._touch_projection(embeddings)
        return embeddings.masked_scatter(is_visual[..., None], self.embed_visual(visual).to(embeddings.dtype))

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Standardised visual embeddings at the scale of words: (..., d) -> (..., D)."""
        return self.projection(visual) * self.visual_scale

    def _touch_projection(self, like: Tensor) -> Tensor:
        """Zero that depends on the projection: every rank touches the same parameters whatever its batch holds."""
        if isinstance(self.projection, nn.Identity):
            return torch.zeros((), device=self.visual_scale.device)
        # called, and its weight not even looked at: ZeRO-3 gathers parameters at each access, on all ranks alike
        return self.projection(like.new_zeros(1, self.visual_width)).sum()

    def hidden_states(self, batch: Batch, visual: Tensor | None) -> Tensor:
        """Last hidden states of packed rows: (B, L), (M, N, d) -> (B, L, D).

        Packing is expressed by restarting positions with no mask at all and `use_cache=False`: a 2D mask, or a cache,
        lets packed documents see each other in transformers. flash-attn gets the segment bounds explicitly.
        """
        embeddings = self.embed(batch.token_ids, batch.is_visual, visual)
        arguments: dict[str, Any] = {}
        if self.backbone.config._attn_implementation.startswith("flash_attention"):
            arguments = varlen_arguments(batch.segment_ids)
            rows, length, width = embeddings.shape
            output = self.backbone(
                inputs_embeds=embeddings.reshape(1, rows * length, width),
                position_ids=batch.position_ids.reshape(1, -1),
                use_cache=False,
                **arguments,
            )
            return output.last_hidden_state.reshape(rows, length, width)
        if self.backbone.config._attn_implementation == "sdpa" and embeddings.device.type == "cpu":
            arguments = {"packed_lengths": packed_lengths(batch.segment_ids)}
        output = self.backbone(
            inputs_embeds=embeddings, position_ids=batch.position_ids, use_cache=False, **arguments
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head with the padding rows of the vocabulary masked: (..., D) -> (..., vocabulary)."""
        logits = self.lm_head(hidden)
        if logits.shape[-1] > self.num_tokens:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.num_tokens
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits

    def predict(self, hidden: Tensor, targets: TargetPositions) -> tuple[Tensor, Tensor]:
        """Predictions at the target positions only: (B, L, D) -> logits (T, num_tokens), embeddings (V, d)."""
        flat = hidden.flatten(0, 1)
        logits = self.lm_head(flat[targets.text_from])[
            ..., : self.num_tokens
        ]  # a view: nothing has to be masked
        return logits, self.regression_head(flat[targets.visual_from])

    def add_lora(self, settings: LoraSettings, trainable_tokens: list[int]) -> None:
        """Freeze the LM, add LoRA to all its linear layers, and train only these rows of the two embeddings.

        PAPER: the paper says that only LoRA and the regression head are trained (§4.1), but then [IMG] could never be
        predicted: its rows are new. The two rows are trained.
        """
        from peft import LoraConfig, get_peft_model

        tied = bool(getattr(self.language_model.config, "tie_word_embeddings", False))
        rows: dict[str, list[int]] = {"embed_tokens": trainable_tokens}
        if not tied:
            rows["lm_head"] = trainable_tokens
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=settings.dropout,
            target_modules="all-linear",
            trainable_token_indices=rows,
            task_type="CAUSAL_LM",
        )
        self.language_model = get_peft_model(self.language_model, config)
        for layer in self.language_model.modules():
            if hasattr(layer, "trainable_tokens_delta"):
                layer.forward_adapters = MethodType(forward_with_rows, layer)

    def settle_attention(self, device: torch.device, dtype: torch.dtype) -> None:
        """SDPA where flash-attn cannot run: it takes 16-bit tensors on a GPU only."""
        is_flash = self.backbone.config._attn_implementation.startswith("flash_attention")
        if is_flash and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
            get_logger().info("attention: sdpa, since flash-attn takes no %s on %s", dtype, device.type)
            self.backbone.set_attn_implementation("sdpa")

    def freeze_parts(self, names: Sequence[str]) -> None:
        """Leave parts untrained: regression_head, input_projection, token_rows (LoRA's), embeddings (all tables)."""
        groups: dict[str, list[nn.Parameter]] = {
            "regression_head": list(self.regression_head.parameters()),
            "input_projection": list(self.projection.parameters()),
            "token_rows": [p for name, p in self.named_parameters() if "trainable_tokens" in name],
            "embeddings": [*self.backbone.get_input_embeddings().parameters(), *self.lm_head.parameters()],
        }
        for name in names:
            for parameter in groups[name]:
                parameter.requires_grad_(False)

    def merge_lora(self) -> None:
        """Fold the adapter into the weights of the language model."""
        if self.has_lora:
            self.language_model = self.language_model.merge_and_unload()


def forward_with_rows(
    layer: Any, x: Tensor, active_adapters: Sequence[str], *rest: Any, **more: Any
) -> Tensor:
    """What peft's TrainableTokensLayer computes, without its copy of the whole table and that copy's gradient.

    For LLaMA-7B the two copies and the gradient are 0.8 GB in bf16, and the gradient of the LM head is a matrix product
    as large as its forward pass, all for two rows.
    """
    if layer.disable_adapters or layer.merged or len(active_adapters) != 1:
        return type(layer).forward_adapters(layer, x, active_adapters, *rest, **more)
    rows, tokens = layer.trainable_tokens_delta[active_adapters[0]], layer.token_indices[active_adapters[0]]
    output = layer.base_layer(x)
    if isinstance(layer.base_layer, nn.Linear):
        index, columns = torch.tensor(tokens, device=x.device), nn.functional.linear(x, rows.to(x.dtype))
        if hasattr(
            layer.base_layer.weight, "ds_id"
        ):  # ZeRO-3 wraps outputs in a function that forbids writing
            return output.index_copy(-1, index, columns)
        return output.index_copy_(-1, index, columns)
    for row, token in zip(rows.to(output.dtype), tokens):
        output = torch.where((x == token)[..., None], row, output)
    return output


def varlen_arguments(segment_ids: Tensor) -> dict[str, Any]:
    """Segment bounds for flash-attn's varlen path over the flattened batch: (B, L) -> cu_seq_lens, max_length.

    Padding is a segment of its own; rows never share a segment.
    """
    flat = segment_ids.flatten()
    is_start = torch.ones_like(flat, dtype=torch.bool)
    is_start[1:] = flat[1:] != flat[:-1]
    is_start[:: segment_ids.shape[1]] = True
    bounds = torch.cat([is_start.nonzero().squeeze(1), torch.tensor([flat.numel()], device=flat.device)])
    lengths = bounds[1:] - bounds[:-1]
    cumulative = bounds.to(torch.int32)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def resize_vocabulary(language_model: Any, tokenizer: DocumentTokenizer) -> None:
    """Grow the embeddings to the padded vocabulary; rows of new tokens start at the mean of the old ones, as is usual.

    Raises UserError when the model has fewer rows than its tokenizer has base tokens.
    """
    embedding = language_model.get_input_embeddings().weight
    num_rows = embedding.shape[0]
    num_new = 2  # [IMG] and [/IMG] stand last
    if num_rows < tokenizer.num_tokens - num_new:
        raise UserError(
            f"the language model has {num_rows} token rows, its tokenizer {tokenizer.num_tokens - num_new} tokens: "
            "they do not belong together"
        )
    if num_rows >= tokenizer.vocabulary_size:
        return
    language_model.resize_token_embeddings(tokenizer.vocabulary_size, mean_resizing=False)
    with torch.no_grad():
        for layer in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
            layer.weight[num_rows:] = layer.weight[:num_rows].mean(0)
