"""The transformer of the image tokenizer and detokenizer: causal self-attention, cross-attention, MLP (paper §3.1)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.settings import TransformerSettings

Backend = Literal["auto", "flash_attention_2", "sdpa"]


@cache
def flash_fault() -> str:
    """Why flash-attn cannot run here, "" where it can: the one rule for all attention of the project."""
    if not torch.cuda.is_available():
        return "flash-attn needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return (
            f"flash-attn needs a GPU of compute capability 8.0 (Ampere) or more, this one has {major}.{minor}"
        )
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install 'vlgpt[gpu]'"
    # It is imported, not only looked for: a package that was built for another torch fails with undefined symbols.
    try:
        from flash_attn import flash_attn_func  # noqa: F401
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return (
            f"flash-attn is installed but broken, build it for this torch ({type(error).__name__}: {reason})"
        )
    return ""


@cache
def has_flash() -> bool:
    """Whether `auto` is flash-attn; the first call logs which, and why."""
    fault = flash_fault()
    get_logger().info("attention: %s", f"sdpa ({fault})" if fault else "flash_attention_2")
    return not fault


def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, backend: Backend) -> Tensor:
    """Scaled dot-product attention: (B, H, Q, D), (B, H, S, D), (B, H, S, D) -> (B, H, Q, D).

    `auto` is flash-attn where it can run (GPU, 16 bit: frozen fp32 parts go without), else SDPA.
    """
    if backend == "auto":
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        backend = "flash_attention_2" if has_flash() and query.is_cuda and is_half else "sdpa"
    if backend == "flash_attention_2":
        from flash_attn import flash_attn_func

        # flash-attn has heads inside of positions: views, no copies
        swapped = (rearrange(x, "b h s d -> b s h d") for x in (query, key, value))
        mixed: Tensor = flash_attn_func(*swapped, causal=is_causal)
        return rearrange(mixed, "b s h d -> b h s d")
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, which is `x` itself in self-attention.

    Raises ValueError when the width cannot be divided into heads.
    """

    def __init__(self, *, width: int, context_width: int, num_heads: int, is_causal: bool, backend: Backend):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads, self.is_causal, self.backend = num_heads, is_causal, backend
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, Q, width), (B, S, context_width) -> (B, Q, width)."""
        query = rearrange(self.query(x), "b q (h d) -> b h q d", h=self.num_heads)
        key, value = rearrange(
            self.key_value(context), "b s (two h d) -> two b h s d", two=2, h=self.num_heads
        )
        mixed = attend(query, key, value, is_causal=self.is_causal, backend=self.backend)
        output: Tensor = self.output(rearrange(mixed, "b h q d -> b q (h d)"))
        return output


class DecoderBlock(nn.Module):
    """Pre-norm block: causal self-attention, cross-attention to the context, MLP."""

    def __init__(self, shape: TransformerSettings, *, context_width: int, backend: Backend):
        super().__init__()
        width, num_heads = shape.width, shape.num_heads
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(
            width=width, context_width=width, num_heads=num_heads, is_causal=True, backend=backend
        )
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(
            width=width, context_width=context_width, num_heads=num_heads, is_causal=False, backend=backend
        )
        self.mlp_norm = nn.LayerNorm(width)
        hidden = int(width * shape.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, Q, width), (B, S, context_width) -> (B, Q, width)."""
        normed = self.self_norm(x)
        x = x + self.self_attention(normed, normed)
        x = x + self.cross_attention(self.cross_norm(x), context)
        mlp: Tensor = self.mlp(self.mlp_norm(x))
        return x + mlp


def require_backend(wanted: str) -> None:
    """Raises UserError when flash-attn is asked for by name and cannot run here."""
    if wanted == "flash_attention_2" and (fault := flash_fault()):
        raise UserError(f"attention is flash_attention_2, but {fault}; set attention=auto or sdpa")


def set_backend(module: nn.Module, backend: str) -> None:
    """Give all attention inside `module` another backend, such as the language model's (`eager` counts as `sdpa`).

    Raises UserError for flash-attn where it cannot run.
    """
    require_backend(backend)
    chosen = cast(Backend, "sdpa" if backend == "eager" else backend)
    for part in module.modules():
        if isinstance(part, Attention):
            part.backend = chosen


class QueryTransformer(nn.Module):
    """Learned queries, decoded in causal order while attending to a context of fixed length.

    `init_std` is that of queries and positions. `has_checkpointing` computes blocks again in the backward pass.

    PAPER: widths, norms and initialisation are not given (§3.1 says "standard transformer decoder", 12 blocks); ours
    are pre-norm, GELU and learned positions of the context.
    """

    def __init__(
        self,
        shape: TransformerSettings,
        *,
        num_queries: int,
        num_context: int,
        context_width: int,
        backend: Backend,
        has_checkpointing: bool,
    ):
        super().__init__()
        self.has_checkpointing = has_checkpointing
        # Tiny models need a std of 1.0: with 0.02 their cross-attention stays uniform for thousands of steps.
        self.queries = nn.Parameter(torch.randn(num_queries, shape.width) * shape.init_std)
        self.context_norm = nn.LayerNorm(context_width)
        self.context_positions = nn.Parameter(torch.randn(num_context, context_width) * shape.init_std)
        self.blocks = nn.ModuleList(
            DecoderBlock(shape, context_width=context_width, backend=backend) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, context: Tensor) -> Tensor:
        """(B, S, context_width) -> (B, num_queries, width). Raises ValueError for another context length."""
        if context.shape[1] != self.context_positions.shape[0]:
            raise ValueError(
                f"context has {context.shape[1]} tokens, this model reads {self.context_positions.shape[0]}"
            )
        # The context comes in any scale: hidden states of an encoder have not passed its final norm.
        context = self.context_norm(context) + self.context_positions
        x = self.queries.expand(context.shape[0], -1, -1)
        for block in self.blocks:
            if self.has_checkpointing and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        normed: Tensor = self.norm(x)
        return normed
