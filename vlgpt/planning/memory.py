"""Bytes per GPU by kind: what DeepSpeed keeps of the parameters, and what autograd keeps of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from vlgpt.planning.architecture import Architecture, LanguageShape, QueryShape
from vlgpt.planning.flops import Work

RESERVE_BYTES = 2 << 30  # CUDA context, NCCL, cuBLAS workspaces
FRAGMENTATION = 1.08  # of everything else


@dataclass(frozen=True)
class Zero:
    """What a ds_configs/*.json decides."""

    name: str
    stage: int
    is_offloaded: bool = False
    bucket_elements: int = 200_000_000


ZEROS = (Zero("zero1", 1), Zero("zero2", 2), Zero("zero2_offload", 2, is_offloaded=True), Zero("zero3", 3))


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, and of an entry of a dropout mask (CUDA keeps booleans, CPU numbers)."""

    number: int = 2
    mask: int = 1


def state_bytes(parts: Architecture, zero: Zero, *, num_gpus: int, precision: Precision) -> dict[str, int]:
    """Parameters, gradients, optimizer and buffers of one GPU. fp32 gradients, master weights and two moments."""
    counts = parts.parameters().values()
    trained = sum(n for _, n in counts)
    frozen = sum(n for n, _ in counts) - trained
    weights_share = num_gpus if zero.stage == 3 else 1
    gradient_share = num_gpus if zero.stage >= 2 else 1
    master = -(-trained // num_gpus)
    buckets = 2 * zero.bucket_elements * precision.number  # two receive buffers: overlap_comm
    return {
        "frozen": frozen * precision.number // weights_share,
        "trainable": trained * precision.number // weights_share,
        "gradients": 0 if zero.is_offloaded else 4 * -(-trained // gradient_share),
        "optimizer": 0 if zero.is_offloaded else 12 * master,
        "step": 0 if zero.is_offloaded else 4 * master,  # the gradients once more, flat
        "buckets": buckets if num_gpus > 1 else buckets // 2,
    }


def activation_bytes(
    parts: Architecture, work: Work, *, precision: Precision, has_checkpointing: bool
) -> dict[str, int]:
    """Saved tensors of one micro-batch: "activations", and "logits" with the copies of their peak."""
    if parts.lm is None:
        blocks = heads = largest = 0
        for shape in (parts.tokenizer, parts.detokenizer):
            block = work.rows * _query_block(shape, precision)
            kept = work.rows * shape.num_queries * shape.width * precision.number
            blocks += shape.depth * (kept if has_checkpointing else block)
            largest = max(largest, block)
            heads += work.rows * _query_rest(shape, precision)
        heads += 4 * work.rows * sum(tokens * width for tokens, width in parts.detokenizer.outputs)
        return {"activations": blocks + heads + (largest if has_checkpointing else 0), "logits": 0}
    tokens = work.rows * work.length
    block = tokens * language_block(parts, precision)
    kept = tokens * parts.lm.width * precision.number
    body = parts.lm.depth * kept + block if has_checkpointing else parts.lm.depth * block
    logits = work.num_text_targets * parts.lm.vocabulary * (precision.number + 8)
    return {"activations": body + language_rest(parts, work, precision), "logits": logits}


def language_block(parts: Architecture, precision: Precision) -> int:
    """Saved bytes of one decoder block per token."""
    lm, e = parts.lm, precision.number
    assert lm is not None
    query, key = lm.num_heads * lm.head_width, lm.num_kv_heads * lm.head_width
    norms = 2 * norm_bytes(lm, e, is_trained=parts.lora_rank is None)
    attention = e * (2 * query + 2 * key) + 4 * lm.num_heads
    mlp = (2 * lm.num_gates - 1) * e * lm.mlp
    inputs = e * (2 * lm.width + lm.mlp)
    if parts.lora_rank is None:
        return norms + attention + mlp + inputs
    inner = len(lm.linears) * e * parts.lora_rank // lm.depth
    if parts.lora_dropout > 0:  # every adapter drops its own copy of its input
        inputs = sum(width for width, _ in lm.linears) * (e + precision.mask) // lm.depth
    return norms + attention + mlp + inner + inputs


def norm_bytes(lm: LanguageShape, e: int, *, is_trained: bool) -> int:
    """An RMS norm works in fp32: its input as fp32, the inverse RMS; a trained one keeps its normed output too."""
    return 4 * lm.width + 4 + (e * lm.width if is_trained else 0)


def language_rest(parts: Architecture, work: Work, precision: Precision) -> int:
    """Saved bytes around the blocks: final norm, inputs of both heads, errors in fp32."""
    lm, e = parts.lm, precision.number
    assert lm is not None
    tokens = work.rows * work.length
    final = tokens * norm_bytes(lm, e, is_trained=parts.lora_rank is None)
    heads = (work.num_text_targets + work.num_visual_targets) * lm.width * e
    if parts.head == "mlp":
        heads += work.num_visual_targets * 4 * lm.width * e
    return final + heads + 4 * work.num_visual_targets * parts.visual_width


def _query_block(shape: QueryShape, precision: Precision) -> int:
    """Saved bytes of one block per image: three norms, two attentions, MLP; keys and values of the context."""
    per_query = precision.number * (12 * shape.width + 2 * shape.mlp) + 8 * (3 + shape.num_heads)
    return shape.num_queries * per_query + shape.num_context * 2 * shape.width * precision.number


def _query_rest(shape: QueryShape, precision: Precision) -> int:
    """Context before and after its norm, the last norm's input and output."""
    context = 2 * shape.num_context * shape.context_width
    return precision.number * (context + 2 * shape.num_queries * shape.width)
