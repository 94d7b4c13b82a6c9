"""Useful floating point operations of a step, counted where they happen: for the model FLOPs utilisation (MFU).

Every linear layer reports its calls. A frozen layer costs a forward pass and, only if gradients pass through it, one
product for its inputs; its weights get no gradient. So frozen towers cost 2, a frozen LM under LoRA 4, and a trained
one 6 operations per weight and token. Scores of the causal LM are counted from real segment lengths, not from padded
rows. Left out: recomputation under checkpointing (by the definition of MFU), norms, and the scores of image towers
other than nn.MultiheadAttention (below 5 % at 257 tokens and width 1024).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlgpt.batch import Batch

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


class FlopMeter:
    """Counts while `is_counting`; the loop switches it on for forward passes of training only."""

    def __init__(self, stage: nn.Module):
        self.total = 0.0
        self.is_counting = False
        self._handles = []
        for module in stage.modules():
            if isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_hook(self._on_attention, with_kwargs=True))
            elif isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_hook(self._on_linear))
        self._language = _language_shape(stage)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> float:
        """Operations since the last call."""
        total, self.total = self.total, 0.0
        return total

    def add_scores(self, batch: Any) -> None:
        """Causal attention scores of a packed batch: half of 4 * l^2 * width per layer, and twice that backward."""
        if not isinstance(batch, Batch) or self._language is None:
            return
        depth, width = self._language
        squares = 0
        for row in batch.segment_ids:
            lengths = torch.bincount(row.long())[1:]
            squares += int((lengths * lengths).sum())
        self.total += 3 * 2.0 * squares * width * depth

    def _on_linear(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.is_counting and inputs:
            product = 2.0 * output.numel() * module.in_features
            self.total += product * _passes(inputs[0], module.weight)

    def _on_attention(self, module: nn.MultiheadAttention, inputs: Any, kwargs: Any, output: Any) -> None:
        if not self.is_counting:
            return
        query = inputs[0] if inputs else kwargs["query"]
        num_tokens = query.numel() // module.embed_dim
        length = query.shape[1] if module.batch_first else query.shape[0]
        weight = module.in_proj_weight if module.in_proj_weight is not None else module.out_proj.weight
        linear = 2.0 * num_tokens * 4 * module.embed_dim**2
        scores = 4.0 * num_tokens * length * module.embed_dim
        factor = 3 if torch.is_grad_enabled() and (query.requires_grad or weight.requires_grad) else 1
        self.total += linear * _passes(query, weight) + scores * factor


@contextlib.contextmanager
def counting(meter: FlopMeter | None, batch: Any) -> Iterator[None]:
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
    model = getattr(stage, "model", None)
    backbone = getattr(getattr(model, "lm", None), "backbone", None)
    if backbone is None:
        return None
    config = backbone.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, width * config.num_attention_heads
