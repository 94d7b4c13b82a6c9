"""FLOPs of one micro-batch: two operations per multiply-add of every matrix product, as FlopCounterMode counts them.

A linear layer costs one product forward, one backward for its input where gradients pass through, and one for its
weight where that is trained. So a frozen tower costs 1, a frozen LM under LoRA 2, a trained one 3 products.
Attention is counted over whole rows (flash-attn skips other documents and the future: it does less).
"""

from __future__ import annotations

from dataclasses import dataclass

from vlgpt.planning.architecture import Architecture, QueryShape


@dataclass(frozen=True)
class Work:
    """What one micro-batch holds. Stage 1: rows are images; `length` and the targets are unused."""

    rows: int
    length: int = 0
    num_images: int = 0
    num_text_targets: int = 0
    num_visual_targets: int = 0
    has_tokenizing: bool = True  # False: visual embeddings are read from disk


@dataclass(frozen=True)
class Flops:
    """Forward and backward are the model's; `recomputed` is what activation checkpointing adds."""

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        return self.forward + self.backward


def count(parts: Architecture, work: Work, *, has_checkpointing: bool, is_frozen: bool = False) -> Flops:
    """FLOPs of a micro-batch. `is_frozen`: the LM has no trained parameter at all, only the regression head has."""
    if parts.lm is None:
        return _stage_one(parts, work, has_checkpointing=has_checkpointing)
    tokens = work.rows * work.length
    blocks = 2 * tokens * parts.lm.num_block_weights
    query_width = parts.lm.num_heads * parts.lm.head_width
    attention = parts.lm.depth * 4 * tokens * work.length * query_width
    lora = 2 * tokens * parts.lm.num_lora(parts.lora_rank) if parts.lora_rank else 0
    text_head = 2 * work.num_text_targets * parts.lm.width * parts.lm.vocabulary
    head = 2 * work.num_visual_targets * sum(a * b for a, b in parts.head_linears)
    projection = 2 * work.num_images * parts.num_visual * parts.visual_width * parts.lm.entered_width
    projection = projection if parts.has_projection else 0
    forward = blocks + attention + lora + text_head + head + projection + _frozen_towers(parts, work)
    if is_frozen:
        hidden = 2 * work.num_visual_targets * parts.head_linears[-1][0] * parts.head_linears[-1][1]
        return Flops(forward, head + (hidden if parts.head == "mlp" else 0), 0)
    is_table_trained = not parts.lora_rank and "embeddings" not in parts.frozen
    backward = (1 if parts.lora_rank else 2) * blocks + 2 * (attention + lora)
    backward += (2 if is_table_trained else 1) * text_head
    backward += (1 if "regression_head" in parts.frozen else 2) * head
    if parts.has_projection and "input_projection" not in parts.frozen:
        backward += projection  # its input, the frozen visual embeddings, needs no gradient
    return Flops(forward, backward, blocks + attention + lora if has_checkpointing else 0)


def _frozen_towers(parts: Architecture, work: Work) -> int:
    if not work.has_tokenizing or work.num_images == 0:
        return 0
    return work.num_images * _tower_flops(parts) + query_forward(parts.tokenizer, work.num_images)[0]


def _tower_flops(parts: Architecture) -> int:
    return sum(tower.flops for tower in parts.towers.values())


def query_forward(shape: QueryShape, num_images: int) -> tuple[int, int]:
    """Forward FLOPs of an image tokenizer or detokenizer: all of it, and its blocks alone."""
    q, c, w = shape.num_queries, shape.num_context, shape.width
    linears = 2 * q * (4 * w * w + 2 * w * w + 2 * w * shape.mlp) + 2 * c * shape.context_width * 2 * w
    blocks = num_images * shape.depth * linears + query_attention(shape, num_images)
    outputs = num_images * sum(2 * tokens * w * out for tokens, out in shape.outputs)
    return blocks + outputs, blocks


def query_attention(shape: QueryShape, num_images: int) -> int:
    """Forward FLOPs of the scores of both attentions."""
    per_layer = 4 * shape.num_queries * (shape.num_queries + shape.num_context) * shape.width
    return num_images * shape.depth * per_layer


def _stage_one(parts: Architecture, work: Work, *, has_checkpointing: bool) -> Flops:
    whole, blocks = zip(
        *(query_forward(shape, work.rows) for shape in (parts.tokenizer, parts.detokenizer)), strict=True
    )
    backward = 2 * sum(whole)
    if "tokenizer" in parts.frozen:  # gradients end at the detokenizer's context
        backward -= 2 * whole[0]
    if "detokenizer" in parts.frozen:  # linear layers of the detokenizer need no gradient of their weights
        backward -= whole[1] - query_attention(parts.detokenizer, work.rows)
        q, c, w = parts.detokenizer.num_queries, parts.detokenizer.num_context, parts.detokenizer.width
        backward -= work.rows * (2 * q * 5 * w * w + 8 * q * q * w + 2 * q * c * w)  # nor do the queries
    return Flops(
        sum(whole) + work.rows * _tower_flops(parts), backward, sum(blocks) if has_checkpointing else 0
    )
