"""Regression heads: hidden state -> next visual embedding, in standardised space (paper §3.2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlgpt.models.losses import squared_errors

HeadKind = Literal["linear", "mlp"]
Objective = Literal["mse", "mse_cosine", "smooth_l1"]


class RegressionHead(nn.Module):
    """One linear layer, as in the paper (`linear`), or an MLP with one hidden layer (`mlp`)."""

    def __init__(self, *, hidden_width: int, visual_width: int, kind: HeadKind = "linear"):
        super().__init__()
        self.layers: nn.Module
        if kind == "linear":
            self.layers = nn.Linear(hidden_width, visual_width)
        else:
            self.layers = nn.Sequential(
                nn.Linear(hidden_width, 2 * hidden_width),
                nn.GELU(),
                nn.Linear(2 * hidden_width, visual_width),
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, d)."""
        return self.layers(hidden)


def regression_errors(predicted: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """Error per target embedding: (T, d), (T, d) -> (T,). `mse` is the paper's; the others are options."""
    if objective == "mse":
        return squared_errors(predicted, target)
    if objective == "smooth_l1":
        return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)
    cosine = torch.cosine_similarity(predicted.float(), target.float(), dim=-1)
    return 0.5 * squared_errors(predicted, target) + 0.5 * (1 - cosine)
