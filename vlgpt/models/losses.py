"""All losses, as sums over targets. The one shift by one of the whole project is in `targets_of`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlgpt.batch import Batch


@dataclass(frozen=True)
class TargetPositions:
    """Where predictions are made: flat indices into (B * L) of the position BEFORE each target, and the targets."""

    text_from: Tensor  # (T,) int64
    text_ids: Tensor  # (T,) int64
    text_sources: Tensor  # (T,) int64
    visual_from: Tensor  # (V,) int64
    visual_rows: Tensor  # (V,) int64; row of the target in the batch's flattened visual embeddings (M * N)
    visual_sources: Tensor  # (V,) int64


def targets_of(batch: Batch) -> TargetPositions:
    """Positions and targets of a batch. A position's own content is predicted from the position before it."""
    is_target, is_visual = batch.is_target.flatten(), batch.is_visual.flatten()
    text = (is_target & ~is_visual).nonzero().squeeze(1)
    visual = (is_target & is_visual).nonzero().squeeze(1)
    visual_number = is_visual.cumsum(0) - 1
    sources = batch.source_ids.flatten().long()
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
    """Negative log-likelihood per token, in fp32: (T, V), (T,) -> (T,)."""
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
