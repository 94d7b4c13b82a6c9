"""Per-(slot, dimension) standardisation with stored statistics, for visual embeddings and condition targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class KeepsBuffers(nn.Module):
    """Base whose fp32 buffers, and those of its parts, stay fp32 when parameters are cast to 16 bit.

    `module.bfloat16()`, which DeepSpeed calls, casts buffers too: rotary frequencies would lose 0.4 % each, which at
    distance 500 is up to a radian, in training only.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        for module, name, before in kept:
            after = cast(Tensor, module._buffers[name])
            if after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self


class Standardiser(KeepsBuffers):
    """(x - mean) / std per slot and dimension in fp32; identity until `set_statistics` is called.

    PAPER: not in the paper (§3.1, eq. 2). Without it the scale of the regression target is arbitrary against the
    cross-entropy.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_slots: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_slots, width))
        self.register_buffer("std", torch.ones(num_slots, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, slots, width) -> (B, slots, width), about zero mean and unit variance."""
        return ((x - self.mean) / self.std).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """(B, slots, width) -> (B, slots, width), back in the original scale."""
        return (x * self.std + self.mean).to(x.dtype)

    @torch.no_grad()
    def set_statistics(self, moments: Tensor, *, scale_groups: Sequence[int] | None = None) -> None:
        """Take `accumulate`'s (3, slots, width) moments.

        `scale_groups` lists runs of slots that share one scale over all their dimensions; None gives every dimension
        its own. Nearly constant dimensions get a floor, so nothing is divided by 0.
        """
        count, total, squares = moments.double()
        mean = total / count.clamp_min(1)
        variance = (squares / count.clamp_min(1) - mean**2).clamp_min(0)
        if scale_groups is not None:
            groups = variance.split(list(scale_groups))
            variance = torch.cat([group.mean().expand_as(group) for group in groups])
        floor = 1e-3 * variance.mean().sqrt().clamp_min(1e-6)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp_min(floor))


def accumulate(values: Tensor) -> Tensor:
    """Moments that add up over batches and ranks: (B, slots, width) -> (3, slots, width) of count, sum, squares."""
    values = values.double()
    count = torch.full(values.shape[1:], float(values.shape[0]), dtype=torch.float64, device=values.device)
    return torch.stack([count, values.sum(0), (values**2).sum(0)])


class ConditionStandardiser(nn.Module):
    """Brings a condition embedding (K tokens) to the scale in which the detokenizer regresses it, and back.

    Every slot has one scale over its dimensions: dimensions of small variance carry little of the image, and giving
    all the same weight slowed training down (tiny CLIP, 600 steps: pixel error 0.21 against 0.16).
    With `has_mean_token` the target is K + 1 tokens: the mean over tokens, then the residuals, each standardised. In
    features whose variance is mostly the mean token, a plain MSE learns the global colour and stops there.
    """

    def __init__(self, num_tokens: int, width: int, *, has_mean_token: bool):
        super().__init__()
        self.has_mean_token = has_mean_token
        self.num_targets = num_tokens + int(has_mean_token)
        self.standardiser = Standardiser(self.num_targets, width)

    def set_statistics(self, moments: Tensor) -> None:
        """Take moments of `split` conditions; residual tokens share one scale, else each slot has its own."""
        num_residual = self.num_targets - 1
        groups = [1, num_residual] if self.has_mean_token else [1] * self.num_targets
        self.standardiser.set_statistics(moments, scale_groups=groups)

    def split(self, condition: Tensor) -> Tensor:
        """(B, K, D) -> (B, num_targets, D), unstandardised."""
        if not self.has_mean_token:
            return condition
        mean = condition.mean(1, keepdim=True)
        return torch.cat([mean, condition - mean], dim=1)

    def forward(self, condition: Tensor) -> Tensor:
        """(B, K, D) -> (B, num_targets, D)."""
        target: Tensor = self.standardiser(self.split(condition))
        return target

    def inverse(self, target: Tensor) -> Tensor:
        """(B, num_targets, D) -> (B, K, D)."""
        target = self.standardiser.inverse(target)
        if not self.has_mean_token:
            return target
        residual = target[:, 1:]
        return target[:, :1] + residual - residual.mean(1, keepdim=True)
