"""All losses, as sums over targets. The one shift by one of the whole project is in `targets_of`.

Sums, not means: a mean over micro-batches of different target counts would weigh their targets differently. The loop
divides by the global count of all ranks and micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlgpt.batch import Batch


@dataclass(frozen=True)
class TargetPositions:
    """Where predictions are made, and what is to be predicted: T text tokens and V visual embeddings, all int64.

    `text_from` (T,) and `visual_from` (V,) are flat indices into (B * L) of the position BEFORE each target. `text_ids`
    (T,) are the tokens, `visual_rows` (V,) rows of the batch's flattened visual embeddings (M * N). `text_sources` (T,)
    and `visual_sources` (V,) are the data sources.
    """

    text_from: Tensor
    text_ids: Tensor
    text_sources: Tensor
    visual_from: Tensor
    visual_rows: Tensor
    visual_sources: Tensor


def targets_of(batch: Batch) -> TargetPositions:
    """Positions and targets of a batch. A position's own content is predicted from the position before it."""
    is_target, is_visual = batch.is_target.flatten(), batch.is_visual.flatten()
    text = (is_target & ~is_visual).nonzero().squeeze(1)
    visual = (is_target & is_visual).nonzero().squeeze(1)
    # Images come in reading order, so the k-th visual position belongs to row k of the visual embeddings.
    visual_number = is_visual.cumsum(0) - 1
    sources = batch.source_ids.flatten().long()
    # Never -1, nor the row or document before: `Batch.validate` refuses a target at the first position of a segment.
    return TargetPositions(
        text_from=text - 1,
        text_ids=batch.token_ids.flatten()[text],
        text_sources=sources[text],
        visual_from=visual - 1,
        visual_rows=visual_number[visual],
        visual_sources=sources[visual],
    )


def count_targets(batch: Batch) -> dict[str, int]:
    """Number of text tokens and visual embeddings to predict: the counts that the loop reduces over ranks."""
    return {
        "text": int((batch.is_target & ~batch.is_visual).sum()),
        "visual": int((batch.is_target & batch.is_visual).sum()),
    }


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood per token: (T, V), (T,) -> (T,).

    In fp32: bf16 has 8 bits of precision, and a log-sum over 32,000 logits needs more.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the last dimension of the squared error, in fp32: (..., d), (..., d) -> (...)."""
    return (predicted.float() - target.float()).square().mean(-1)


def sums_by_source(values: Tensor, sources: Tensor, num_sources: int) -> Tensor:
    """Scatter per-target losses: (T,), (T,) -> (2, num_sources) of sums and counts, detached fp32."""
    result = torch.zeros(2, num_sources, device=values.device)
    values = values.detach().float()
    result[0].index_add_(0, sources, values)
    result[1].index_add_(0, sources, torch.ones_like(values))
    return result
