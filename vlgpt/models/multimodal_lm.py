"""The multimodal language model: a causal LM that reads and predicts visual embeddings too (paper §3.2).

Rows are packed: the documents of a row must not see each other. Position ids restart in every document, and no mask is
given. flash-attn gets the bounds of the documents (`varlen_arguments`), SDPA on a CPU goes document by document
(`attend_by_document`), and all else is what transformers infers from the positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlgpt.batch import Batch, segment_starts
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.models.heads import new_head
from vlgpt.models.language_models import LogitRule, embedding_scale, leave_flash
from vlgpt.models.losses import TargetPositions
from vlgpt.models.standardise import KeepsBuffers
from vlgpt.settings import LoraSettings
from vlgpt.tokens import NUM_IMAGE_TOKENS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Lengths of the documents of every row, padding as one more; they add up to the row's length.
Lengths = list[list[int]]


class MultimodalLM(KeepsBuffers):
    """A causal LM, a scale and projection for visual inputs, and a regression head beside the LM head.

    Args:
        language_model: a transformers causal LM whose vocabulary already holds the image tokens.
        num_tokens: real tokens; logits of the padding rows after them are masked.
        num_visual, visual_width: N and d of the image tokenizer.
        head: `linear` (paper), `mlp`, or `package.module:Class` of another regression head; `head_options` are further
            arguments of its constructor.
    A standardised visual embedding enters as `projection(x) * visual_scale`, `visual_scale` being the RMS of the
    embeddings that words enter with: images and words have one scale. A predicted embedding is fed back the same way.

    PAPER: x_v enters the LM as it is, at the LM's width (§3.2). The scale is ours, and so is the trained projection of
    models of another width than x_v.
    """

    visual_scale: Tensor
    language_model: PreTrainedModel | PeftModel

    def __init__(
        self,
        language_model: PreTrainedModel,
        *,
        num_tokens: int,
        num_visual: int,
        visual_width: int,
        head: str = "linear",
        head_options: Mapping[str, object] | None = None,
    ):
        super().__init__()
        register_packed_attention()
        self.language_model = language_model
        self.num_tokens, self.num_visual, self.visual_width = num_tokens, num_visual, visual_width
        table: Any = language_model.get_input_embeddings()
        entered: int = table.embedding_dim
        hidden = language_model.get_output_embeddings().in_features  # OPT-350M's differs from what enters
        self.projection = nn.Identity() if entered == visual_width else nn.Linear(visual_width, entered)
        if isinstance(self.projection, nn.Linear):
            # Standardised inputs keep unit variance, so that `visual_scale` alone sets the scale.
            nn.init.normal_(self.projection.weight, std=visual_width**-0.5)
            nn.init.zeros_(self.projection.bias)
        self.head_name, self.head_options = head, dict(head_options or {})
        self.regression_head = new_head(
            head, hidden_width=hidden, visual_width=visual_width, options=head_options
        )
        # One type for all that is trained together: DeepSpeed casts the whole stage, generation nothing.
        for part in (self.projection, self.regression_head):
            part.to(table.weight.dtype)
        self.finish_logits = LogitRule.of(language_model.config)
        self.register_buffer("visual_scale", embedding_scale(language_model))

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformer without the LM head."""
        return cast("PreTrainedModel", self.causal_lm.base_model)

    @property
    def lm_head(self) -> nn.Module:
        """Hidden states to logits: (..., D) -> (..., vocabulary), before `finish_logits`."""
        head: nn.Module = self.causal_lm.get_output_embeddings()
        return head

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without the adapters around it."""
        model: Any = self.language_model
        plain: PreTrainedModel = model.get_base_model() if self.has_lora else model
        return plain

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is trained."""
        return next(self.regression_head.parameters()).dtype

    @property
    def has_lora(self) -> bool:
        """Whether peft wraps the language model."""
        # Not `peft_config`: peft < 0.19 leaves that behind when it merges.
        return hasattr(self.language_model, "get_base_model")

    def embed(self, token_ids: Tensor, is_visual: Tensor, visual: Tensor | None) -> Tensor:
        """Input embeddings: (B, L), (B, L), (M, N, d) | None -> (B, L, D)."""
        embeddings: Tensor = self.backbone.get_input_embeddings()(token_ids)
        if visual is None or visual.shape[0] == 0:
            return embeddings + 0.0 * self._touch_projection(embeddings)
        return embeddings.masked_scatter(is_visual[..., None], self.embed_visual(visual).to(embeddings.dtype))

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Standardised visual embeddings at the scale of words: (..., d) -> (..., D)."""
        projected: Tensor = self.projection(visual.to(self.dtype))
        return projected * self.visual_scale

    def _touch_projection(self, like: Tensor) -> Tensor:
        """Zero that depends on the projection: (B, L, D) -> ().

        DeepSpeed reduces gradients in one order on all ranks, and waits for a rank whose batch has no image.
        """
        if isinstance(self.projection, nn.Identity):
            return torch.zeros((), device=self.visual_scale.device)
        # The layer is called as for an image: ZeRO-3 gathers a weight at each access, which all ranks must do alike.
        projected: Tensor = self.projection(like.new_zeros(1, self.visual_width))
        return projected.sum()

    def hidden_states(self, batch: Batch, visual: Tensor | None) -> Tensor:
        """Last hidden states of packed rows: (B, L), (M, N, d) -> (B, L, D).

        No mask is given, and no cache kept: with a 2D mask or a cache, transformers no longer looks at the positions,
        and packed documents see each other.
        """
        embeddings, positions = self.embed(batch.token_ids, batch.is_visual, visual), batch.position_ids
        shape, attention = embeddings.shape, self.backbone.config._attn_implementation
        arguments: dict[str, Any] = {}
        if attention.startswith("flash_attention"):
            # varlen attention takes one long row
            arguments = varlen_arguments(batch.segment_ids)
            embeddings, positions = embeddings.reshape(1, -1, shape[-1]), positions.reshape(1, -1)
        elif attention == "sdpa" and embeddings.device.type == "cpu":
            arguments = {"packed_lengths": packed_lengths(batch.segment_ids)}
        output = self.backbone(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **arguments)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(*shape[:-1], hidden.shape[-1])

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
        # A view without the padding of the vocabulary saves the mask of `logits`, as large as the logits.
        # At targets only: the 32,000 logits of a position of LLaMA-7B are eight times as wide as its hidden state.
        logits = self.lm_head(flat[targets.text_from])[..., : self.num_tokens]
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
            lora_alpha=settings.alpha,  # type: ignore[arg-type] # any number works
            lora_dropout=settings.dropout,
            target_modules="all-linear",
            trainable_token_indices=rows,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft asks transformers for a name that it renamed
            warnings.simplefilter("ignore", FutureWarning)
            self.language_model = get_peft_model(self.language_model, config)
        layer: Any
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
        # A change of one rounding step, 0.8 % in bf16, is no proof of a leak.
        if not leak < max(1e-3, torch.finfo(before.dtype).eps):
            config = self.backbone.config
            raise UserError(
                f"{type(self.causal_lm).__name__} lets packed documents, or later words, be seen (hidden states move "
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


def forward_with_rows(
    layer: Any, x: Tensor, active_adapters: Sequence[str], *rest: Any, **more: Any
) -> Tensor:
    """`TrainableTokensLayer.forward_adapters` of peft, without its copy of the table and that copy's gradient.

    (B, L) ids -> (B, L, D) for a table, (..., D) -> (..., vocabulary) for the LM head.
    For LLaMA-7B the two copies and the gradient are 0.8 GB in bf16, and the gradient of the LM head is a matrix product
    as large as its forward pass, all for two rows.
    """
    output: Tensor
    if layer.disable_adapters or layer.merged or len(active_adapters) != 1:
        output = type(layer).forward_adapters(layer, x, active_adapters, *rest, **more)
        return output
    rows, tokens = layer.trainable_tokens_delta[active_adapters[0]], layer.token_indices[active_adapters[0]]
    base, output = layer.base_layer, layer.base_layer(x)
    if isinstance(base, nn.Linear):
        index = torch.tensor(tokens, device=x.device)
        bias = None if base.bias is None else base.bias[index]
        columns = nn.functional.linear(x, rows.to(x.dtype), bias)
        # ZeRO-3 wraps outputs in a function that forbids writing in place.
        if hasattr(base.weight, "ds_id"):
            return output.index_copy(-1, index, columns)
        return output.index_copy_(-1, index, columns)
    # Gemma's embedding layer scales what it looks up.
    scale = getattr(base, "embed_scale", 1.0)
    for row, token in zip(rows.to(output.dtype) * scale, tokens):
        output = torch.where((x == token)[..., None], row.to(output.dtype), output)
    return output


# ----------------------------------------------------------------------------------------------------- packed attention


def varlen_arguments(segment_ids: Tensor) -> dict[str, Any]:
    """Bounds of documents for flash-attn's varlen path over the flattened batch: (B, L) -> cu_seq_lens, max_length.

    Padding is a document of its own.
    """
    starts = segment_starts(segment_ids).flatten().nonzero().squeeze(1)
    bounds = torch.cat([starts, torch.tensor([segment_ids.numel()], device=starts.device)])
    cumulative, longest = bounds.to(torch.int32), int((bounds[1:] - bounds[:-1]).max())
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_lengths(segment_ids: Tensor) -> Lengths:
    """Lengths of the runs of equal ids: (B, L) -> B lists."""
    rows = []
    for is_start in segment_starts(segment_ids):
        bounds = [*is_start.nonzero().squeeze(1).tolist(), len(is_start)]
        rows.append([stop - start for start, stop in pairwise(bounds)])
    return rows


def register_packed_attention() -> None:
    """Teach transformers' `sdpa` the argument `packed_lengths`; without it nothing changes.

    transformers gives SDPA a mask of whole rows, and a CPU computes its hidden part all the same. Document by document
    and causally it costs the sum of l^2 / 2 instead of L^2: for three documents a row, a sixth. On a GPU this would be
    many small kernels; there flash-attn's varlen path does it in one.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        packed_lengths: Lengths | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        # A window narrower than the row needs the mask that transformers makes for it.
        window = options.get("sliding_window") or query.shape[2]
        if packed_lengths is None or query.device.type != "cpu" or window < query.shape[2]:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return attend_by_document(query, key, value, packed_lengths, dropout=dropout, scale=scaling), None

    AttentionInterface.register("sdpa", attention)


def attend_by_document(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, *, dropout: float, scale: float | None
) -> Tensor:
    """Causal attention inside every document: three of (B, H, L, D) -> (B, L, H, D)."""
    rows = []
    for number, row in enumerate(lengths):
        documents = zip(*(x[number : number + 1].split(row, dim=2) for x in (query, key, value)))
        pieces = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
            for q, k, v in documents
        ]
        rows.append(torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1))
    return torch.cat(rows)


def _distance(first: Tensor, second: Tensor) -> float:
    """Largest change of a hidden state in relation to its size: two of (B, L, D) -> number; NaN counts as infinite."""
    change = (first - second).float().norm(dim=-1) / first.float().norm(dim=-1).clamp_min(1e-6)
    return float(change.nan_to_num(nan=float("inf")).max())
