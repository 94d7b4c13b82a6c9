"""Useful floating point operations of a step: the one convention of `vlgpt plan` and of training's MFU.

A multiply-add is two operations. A product of a linear layer is made once forward, once more for the gradient of its
input where gradients pass through, and once more for the gradient of its weight where that is trained: a frozen tower
costs 2 operations per weight and token, a frozen LM under LoRA 4, a trained one 6. The attention scores of the causal
LM count inside documents and causally, which is what flash-attn computes. Recomputation under activation checkpointing
is not useful work (the definition of MFU) and is listed apart; norms and activations are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from vlgpt.batch import Batch
from vlgpt.models.layers import Attention

# Dense bf16 peaks in TFLOP/s from the vendors' data sheets; a longer name comes before its beginning.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("H800", 989.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.0),
    ("A10G", 70.0),
)


def peak_flops(override_tflops: float | None) -> float | None:
    """Peak of one device per second, from the settings or by the GPU's name; None when unknown (MFU is left out)."""
    if override_tflops is not None:
        return override_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for key, value in PEAK_TFLOPS:
            if key in name:
                return value * 1e12
    return None


def squared_lengths(segment_ids: Tensor) -> int:
    """Sum of the squared lengths of the packed documents, padding left out: (B, L) -> number."""
    return sum(int((torch.bincount(row.long())[1:] ** 2).sum()) for row in segment_ids)


class FlopMeter:
    """Counts operations where they happen, by hooks on the layers of a stage, while `is_counting`.

    Hooks, because torch's own counter knows no flash-attn and slows every operation down. Not counted: attention scores
    of foreign image towers (below 5 % at 257 tokens of width 1024) and the experts of mixtures.
    """

    def __init__(self, stage: nn.Module):
        self.total = 0.0
        self.is_counting = False
        self._handles = []
        for module in stage.modules():
            if isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_hook(self._on_multihead, with_kwargs=True))
            elif isinstance(module, Attention):
                self._handles.append(module.register_forward_hook(self._on_attention))
            elif isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_hook(self._on_linear))
        self._language = _language_shape(stage)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> float:
        """Operations since the last call."""
        total, self.total = self.total, 0.0
        return total

    def add_scores(self, batch: object) -> None:
        """Causal attention scores of a packed batch: half of 4 * l^2 * width per layer, and twice that backward."""
        if isinstance(batch, Batch) and self._language is not None:
            depth, width = self._language
            self.total += 3 * 2.0 * squared_lengths(batch.segment_ids) * width * depth

    def _on_linear(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.is_counting and inputs:
            product = 2.0 * output.numel() * module.in_features
            self.total += product * _passes(inputs[0], module.weight)

    def _on_attention(self, module: Attention, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        if self.is_counting:
            x, context = inputs
            self._add_scores(x, context.shape[1], is_trained=output.requires_grad)

    def _on_multihead(
        self,
        module: nn.MultiheadAttention,
        inputs: tuple[Tensor, ...],
        kwargs: Mapping[str, Tensor],
        output: object,
    ) -> None:
        if not self.is_counting:
            return
        query = inputs[0] if inputs else kwargs["query"]
        length = query.shape[1] if module.batch_first else query.shape[0]
        weight = module.in_proj_weight if module.in_proj_weight is not None else module.out_proj.weight
        # the four projections in one: nn.MultiheadAttention calls none of them as a layer
        self.total += 2.0 * query.numel() * 4 * module.embed_dim * _passes(query, weight)
        self._add_scores(query, length, is_trained=query.requires_grad or weight.requires_grad)

    def _add_scores(self, query: Tensor, length: int, *, is_trained: bool) -> None:
        self.total += 4.0 * query.numel() * length * (3 if torch.is_grad_enabled() and is_trained else 1)


@contextlib.contextmanager
def counting(meter: FlopMeter | None, batch: object) -> Iterator[None]:
    """Count the forward pass of one training micro-batch; recomputation in its backward pass is not counted."""
    if meter is None:
        yield
        return
    meter.is_counting = True
    try:
        yield
    finally:
        meter.is_counting = False
    meter.add_scores(batch)


def _passes(inputs: Tensor, weight: Tensor) -> int:
    """Products of a layer's size: forward, gradient of its inputs, gradient of its weights."""
    if not torch.is_grad_enabled():
        return 1
    return 1 + int(inputs.requires_grad) + int(weight.requires_grad)


def _language_shape(stage: nn.Module) -> tuple[int, int] | None:
    """Depth and attention width of the language model inside a stage, if it has one."""
    backbone = getattr(getattr(getattr(stage, "model", None), "lm", None), "backbone", None)
    if backbone is None:
        return None
    config = backbone.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return cast(int, config.num_hidden_layers), width * config.num_attention_heads
