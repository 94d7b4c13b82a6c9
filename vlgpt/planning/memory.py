"""Bytes that DeepSpeed keeps of the parameters on one GPU, by kind and ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# CUDA context, NCCL, cuBLAS workspaces; and of everything else, for fragmentation.
RESERVE_BYTES = 2 << 30
FRAGMENTATION = 1.08


@dataclass(frozen=True)
class Zero:
    """What a ds_configs/*.json decides."""

    name: str
    stage: int
    is_offloaded: bool = False
    bucket_elements: int = 200_000_000


ZEROS = (Zero("zero1", 1), Zero("zero2", 2), Zero("zero2_offload", 2, is_offloaded=True), Zero("zero3", 3))


def state_bytes(
    parameters: Mapping[str, tuple[int, int]], zero: Zero, *, num_gpus: int, number_bytes: int
) -> dict[str, int]:
    """Parameters, gradients, optimizer and buffers of one GPU. fp32 gradients, master weights and two moments.

    Args:
        parameters: component -> (all, trained).
        number_bytes: of a weight in the precision of the run.
    """
    trained = sum(n for _, n in parameters.values())
    frozen = sum(n for n, _ in parameters.values()) - trained
    weights_share = num_gpus if zero.stage == 3 else 1
    gradient_share = num_gpus if zero.stage >= 2 else 1
    master = -(-trained // num_gpus)
    # overlap_comm has two receive buffers
    buckets = 2 * zero.bucket_elements * number_bytes
    return {
        "frozen": frozen * number_bytes // weights_share,
        "trainable": trained * number_bytes // weights_share,
        "gradients": 0 if zero.is_offloaded else 4 * -(-trained // gradient_share),
        "optimizer": 0 if zero.is_offloaded else 12 * master,
        # the gradients once more, flat
        "step": 0 if zero.is_offloaded else 4 * master,
        "buckets": buckets if num_gpus > 1 else buckets // 2,
    }


def logits_bytes(num_text_targets: int, *, vocabulary: int, number_bytes: int) -> int:
    """Peak of the loss: logits, and in fp32 their log-probabilities and the gradient of these."""
    return num_text_targets * vocabulary * (number_bytes + 8)
