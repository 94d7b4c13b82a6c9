"""Regression heads: hidden state -> next visual embedding, in standardised space (paper §3.2)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.models.losses import squared_errors
from vlgpt.registry import load_class

Objective = Literal["mse", "mse_cosine", "smooth_l1"]

HEADS: Mapping[str, str] = {
    "linear": "vlgpt.models.heads:LinearHead",
    "mlp": "vlgpt.models.heads:MlpHead",
}


class RegressionHead(nn.Module):
    """Base of heads: (T, D) -> (T, d). A head of another package is named `package.module:Class` in `stage.head`.

    `is_deterministic`: equal hidden states give equal embeddings.
    """

    is_deterministic = True
    layers: nn.Module

    def __init__(self, *, hidden_width: int, visual_width: int):
        super().__init__()

    def forward(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, d)."""
        predicted: Tensor = self.layers(hidden)
        return predicted


class LinearHead(RegressionHead):
    """One linear layer, as in the paper."""

    def __init__(self, *, hidden_width: int, visual_width: int):
        super().__init__(hidden_width=hidden_width, visual_width=visual_width)
        self.layers = nn.Linear(hidden_width, visual_width)


class MlpHead(RegressionHead):
    """An MLP with one hidden layer of `ratio` times the width."""

    def __init__(self, *, hidden_width: int, visual_width: int, ratio: int = 2):
        super().__init__(hidden_width=hidden_width, visual_width=visual_width)
        self.layers = nn.Sequential(
            nn.Linear(hidden_width, ratio * hidden_width),
            nn.GELU(),
            nn.Linear(ratio * hidden_width, visual_width),
        )


def new_head(
    name: str, *, hidden_width: int, visual_width: int, options: Mapping[str, object] | None = None
) -> RegressionHead:
    """A head by short or dotted name. Raises UserError for an unknown one, or for options that it does not take."""
    head = load_class(name, RegressionHead, key="head", known=HEADS)
    arguments: JsonObject = {"hidden_width": hidden_width, "visual_width": visual_width, **(options or {})}
    try:
        inspect.signature(head).bind(**arguments)
    except TypeError as error:
        raise UserError(f"head_options {dict(options or {})} do not fit head {name!r}: {error}") from error
    return head(**arguments)


def regression_errors(predicted: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """Error per target embedding: (T, d), (T, d) -> (T,). `mse` is the paper's; the others are options."""
    if objective == "mse":
        return squared_errors(predicted, target)
    if objective == "smooth_l1":
        return F.smooth_l1_loss(predicted.float(), target.float(), reduction="none").mean(-1)
    cosine = torch.cosine_similarity(predicted.float(), target.float(), dim=-1)
    return 0.5 * squared_errors(predicted, target) + 0.5 * (1 - cosine)
