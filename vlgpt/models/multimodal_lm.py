"""The multimodal language model: a causal LM that reads and predicts visual embeddings too (paper §3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlgpt.batch import Batch
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models import packed_attention
from vlgpt.models.heads import new_head
from vlgpt.models.language_models import LogitRule, embedding_scale, leave_flash
from vlgpt.models.losses import TargetPositions
from vlgpt.models.packed_attention import packed_lengths
from vlgpt.models.standardise import KeepsBuffers
from vlgpt.settings import LoraSettings
from vlgpt.tokens import NUM_IMAGE_TOKENS


class MultimodalLM(KeepsBuffers):
    """A causal LM, a scale and projection for visual inputs, and a regression head beside the LM head.

    Args:
        language_model: a transformers causal LM whose vocabulary already holds the image tokens.
        num_tokens: real tokens; logits of the padding rows after them are masked.
        num_visual, visual_width: N and d of the image tokenizer.
        head: `linear` (paper), `mlp`, or `package.module:Class` of another regression head.
    A standardised visual embedding enters as `projection(x) * visual_scale`, `visual_scale` being the RMS of the
    embeddings that words enter with: images and words have one scale. A predicted embedding is fed back the same way.

    PAPER: x_v enters the LM as it is, at the LM's width (§3.2). The scale is ours, and so is the trained projection of
    models of another width than x_v.
    """

    visual_scale: Tensor

    def __init__(
        self,
        language_model: Any,
        *,
        num_tokens: int,
        num_visual: int,
        visual_width: int,
        head: str = "linear",
    ):
        super().__init__()
        packed_attention.register()
        self.language_model = language_model
        self.num_tokens, self.num_visual, self.visual_width = num_tokens, num_visual, visual_width
        entered = language_model.get_input_embeddings().embedding_dim
        hidden = language_model.get_output_embeddings().in_features  # OPT-350M's differs from what enters
        self.projection = nn.Identity() if entered == visual_width else nn.Linear(visual_width, entered)
        if isinstance(self.projection, nn.Linear):
            nn.init.normal_(self.projection.weight, std=visual_width**-0.5)
            nn.init.zeros_(self.projection.bias)
        self.head_name = head
        self.regression_head = new_head(head, hidden_width=hidden, visual_width=visual_width)
        for part in (self.projection, self.regression_head):
            part.to(
                language_model.get_input_embeddings().weight.dtype
            )  # one type for all that is trained together
        self.finish_logits = LogitRule.of(language_model.config)
        self.register_buffer("visual_scale", embedding_scale(language_model))

    @property
    def backbone(self) -> Any:
        """The transformer without the LM head."""
        return self._causal_lm.base_model

    @property
    def lm_head(self) -> nn.Module:
        return self._causal_lm.get_output_embeddings()

    @property
    def _causal_lm(self) -> Any:
        return self.language_model.get_base_model() if self.has_lora else self.language_model

    @property
    def dtype(self) -> torch.dtype:
        return next(self.regression_head.parameters()).dtype

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
        return self.projection(visual.to(self.dtype)) * self.visual_scale

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
        logits = self.finish_logits(self.lm_head(hidden))
        if logits.shape[-1] > self.num_tokens:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.num_tokens
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return logits

    def predict(self, hidden: Tensor, targets: TargetPositions) -> tuple[Tensor, Tensor]:
        """Predictions at the target positions only: (B, L, D) -> logits (T, num_tokens), embeddings (V, d)."""
        flat = hidden.flatten(0, 1)
        logits = self.lm_head(flat[targets.text_from])[..., : self.num_tokens]  # a view: nothing to be masked
        return self.finish_logits(logits), self.regression_head(flat[targets.visual_from])

    def add_lora(self, settings: LoraSettings, trainable_tokens: list[int]) -> None:
        """Freeze the LM, add LoRA to all its linear layers, and train only these rows of the two embeddings.

        PAPER: the paper says that only LoRA and the regression head are trained (§4.1), but then [IMG] could never be
        predicted: its rows are new. The two rows are trained.
        """
        from peft import LoraConfig, get_peft_model

        places = {id(module): name for name, module in self.language_model.named_modules()}
        table, head = self.language_model.get_input_embeddings(), self.language_model.get_output_embeddings()
        rows = {places[id(table)]: trainable_tokens}
        if head.weight is not table.weight:
            rows[places[id(head)]] = trainable_tokens
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
        """SDPA (or eager) where flash-attn cannot run: it takes 16-bit tensors on a GPU only."""
        is_flash = self.backbone.config._attn_implementation.startswith("flash_attention")
        if is_flash and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
            chosen = leave_flash(self.backbone)
            get_logger().info("attention: %s, since flash-attn takes no %s on %s", chosen, dtype, device.type)

    @torch.no_grad()
    def check_isolation(self) -> None:
        """Run two packed documents and compare: neither may see the other, nor what comes later in its own.

        In the attention, precision and device of the run, before its first step. Raises UserError when the transformer
        leaks (state-space models, encoders, position biases that ignore packing).
        """
        length, device = 6, self.visual_scale.device
        ids = torch.arange(4 * length, device=device).reshape(2, 2 * length) * 7 % self.num_tokens
        first, other = ids[:1], torch.cat([ids[1:, :length], ids[:1, length:]], dim=1)
        changed_end = torch.cat([first[:, :-1], ids[1:, -1:]], dim=1)
        before, after_other, after_end = (self._packed_pair(row) for row in (first, other, changed_end))
        leak = _distance(before[:, length:], after_other[:, length:])
        leak = max(leak, _distance(before[:, :-1], after_end[:, :-1]))
        if not leak < max(1e-3, torch.finfo(before.dtype).eps):
            config = self.backbone.config
            raise UserError(
                f"{type(self._causal_lm).__name__} lets packed documents, or later words, be seen (hidden states move "
                f"by {leak:.2g} of their size, attention {config._attn_implementation}): it cannot be trained here"
            )

    def _packed_pair(self, ids: Tensor) -> Tensor:
        """Hidden states of one row of two documents of equal length: (1, L) -> (1, L, D)."""
        half = ids.shape[1] // 2
        positions = torch.arange(half, device=ids.device).repeat(2)[None]
        segments = torch.arange(1, 3, device=ids.device, dtype=torch.int32).repeat_interleave(half)[None]
        nothing = torch.zeros_like(ids, dtype=torch.bool)
        batch = Batch(ids, segments, positions, nothing, nothing, nothing.to(torch.int16), None, ((),), 1)
        return self.hidden_states(batch, None)

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

    def base_weights(self) -> dict[str, Tensor]:
        """Frozen weights of the language model as its file has them: rows of tokens that were added stay out.

        Those are made by the run, in its precision, and replaced by trained ones.
        """
        tables = {
            id(p)
            for layer in (self.backbone.get_input_embeddings(), self.lm_head)
            for p in layer.parameters()
        }
        num_rows = self.num_tokens - NUM_IMAGE_TOKENS
        frozen = {name: p for name, p in self.named_parameters() if not p.requires_grad}
        return {name: p[:num_rows] if id(p) in tables else p for name, p in frozen.items()}

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
    base, output = layer.base_layer, layer.base_layer(x)
    if isinstance(base, nn.Linear):
        index = torch.tensor(tokens, device=x.device)
        bias = None if base.bias is None else base.bias[index]
        columns = nn.functional.linear(x, rows.to(x.dtype), bias)
        if hasattr(base.weight, "ds_id"):  # ZeRO-3 wraps outputs in a function that forbids writing
            return output.index_copy(-1, index, columns)
        return output.index_copy_(-1, index, columns)
    scale = getattr(base, "embed_scale", 1.0)  # Gemma's embedding layer scales what it looks up
    for row, token in zip(rows.to(output.dtype) * scale, tokens):
        output = torch.where((x == token)[..., None], row.to(output.dtype), output)
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


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest change of a hidden state in relation to its size: two of (B, L, D) -> number; NaN counts as infinite."""
    change = (first - second).float().norm(dim=-1) / first.float().norm(dim=-1).clamp_min(1e-6)
    return float(change.nan_to_num(nan=float("inf")).max())
