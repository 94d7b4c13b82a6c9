"""What the real stage costs, measured on the meta device: shapes and gradients flow, no number is computed.

A row, an image and a target cost the same wherever they are in a batch, so each is measured once and multiplied.
Products are counted by torch's counter and saved bytes by autograd's hooks: no formula has to follow the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vlgpt.models.heads import regression_errors
from vlgpt.models.layers import DecoderBlock
from vlgpt.models.losses import squared_errors
from vlgpt.stages.language import LanguageStage
from vlgpt.stages.tokenizer import ImageTokenizerStage


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of something, by the convention of `vlgpt.planning.flops`. Costs add up.

    `recomputed` operations are added by activation checkpointing. Of the `saved` bytes that autograd keeps it leaves
    `checkpointed`: inputs of blocks, one whole block, and all outside of blocks.
    """

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    saved: int = 0
    checkpointed: int = 0

    @property
    def model(self) -> int:
        """Useful operations."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, count: int) -> Cost:
        return Cost(*(a * count for a in astuple(self)))


@dataclass(frozen=True)
class Work:
    """What a batch holds. In stage 1 rows are images, and there are no targets to count."""

    rows: int
    num_images: int = 0
    num_text_targets: int = 0
    num_visual_targets: int = 0
    # False: visual embeddings are read from disk.
    has_tokenizing: bool = True


@dataclass(frozen=True)
class StageCosts:
    """Costs per unit; `encoding` is what frozen encoders, and in stages 2 and 3 the tokenizer, do for an image."""

    row: Cost
    encoding: Cost
    image: Cost = Cost()
    text_target: Cost = Cost()
    visual_target: Cost = Cost()

    def of(self, work: Work) -> Cost:
        """All that a batch costs."""
        return (
            self.row * work.rows
            + self.image * work.num_images
            + self.encoding * (work.num_images if work.has_tokenizing else 0)
            + self.text_target * work.num_text_targets
            + self.visual_target * work.num_visual_targets
        )


def costs_of(
    stage: LanguageStage | ImageTokenizerStage, *, length: int = 0, encoding: Cost | None = None
) -> StageCosts:
    """Costs of a stage on the meta device. `length`: positions of a packed row.

    `encoding` is what towers outside of the stage cost for an image.
    """
    encoding = encoding or Cost()
    stage.train()
    if isinstance(stage, LanguageStage):
        return _language_costs(stage, length, encoding)
    context = stage.tokenizer.transformer.context_positions
    patches = torch.empty_like(context)[None].detach()

    def errors() -> Tensor:
        found = stage.detokenizer(stage.tokenizer(patches))
        return torch.cat([squared_errors(x, torch.empty_like(x)).mean(1) for x in found])

    return StageCosts(measure(errors, stage, blocks_of(stage)), encoding)


def _language_costs(stage: LanguageStage, length: int, encoding: Cost) -> StageCosts:
    lm, tokenizer = stage.model.lm, stage.model.image_tokenizer
    visual = torch.empty(1, lm.num_visual, lm.visual_width, device="meta", dtype=lm.dtype)
    patches = torch.empty_like(tokenizer.transformer.context_positions)[None].detach()
    embeddings = lm.backbone.get_input_embeddings()(torch.zeros(1, length, dtype=torch.long, device="meta"))
    if not embeddings.requires_grad and any(p.requires_grad for p in lm.projection.parameters()):
        # Visual embeddings are written into the row, and carry gradients to the projection.
        embeddings.requires_grad_()
    states: list[Tensor] = []

    def hidden() -> Tensor:
        states.append(lm.backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
        return states[0]

    # Half of the scores: flash-attn skips the future. A row counts as one document, for the lengths of documents are
    # unknown before the data is read; training's MFU knows them.
    row = measure(hidden, stage, blocks_of(stage), score_share=0.5)
    one = torch.empty_like(states[0][0, :1]).detach().requires_grad_(states[0].requires_grad)
    with torch.no_grad():
        encoding += measure(lambda: tokenizer.encode(patches), stage)
    return StageCosts(
        row,
        encoding,
        image=measure(lambda: lm.embed_visual(visual), stage),
        text_target=measure(lambda: lm.finish_logits(lm.lm_head(one)), stage),
        visual_target=measure(
            lambda: regression_errors(lm.regression_head(one), visual[0, :1], stage.objective), stage
        ),
    )


def blocks_of(stage: LanguageStage | ImageTokenizerStage) -> list[nn.Module]:
    """The trained blocks, whose activations checkpointing leaves out and whose weights ZeRO-3 gathers."""
    if isinstance(stage, ImageTokenizerStage):
        return [module for module in stage.modules() if isinstance(module, DecoderBlock)]
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in stage.model.lm.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]


def measure(
    run: Callable[[], Tensor], stage: nn.Module, blocks: Sequence[nn.Module] = (), *, score_share: float = 1.0
) -> Cost:
    """Cost of `run`, which uses modules of `stage`: its forward pass and, where it has gradients, its backward pass.

    Weights and buffers of the stage are not counted as saved. `blocks` are what checkpointing would run again.
    """
    own = {t.untyped_storage()._cdata for t in (*stage.parameters(), *stage.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}
    entered: list[tuple[int, int, int]] = []
    in_blocks: list[tuple[int, int, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # Held until the end: a freed storage would pass its address to the next.
            kept[storage._cdata] = storage
        return tensor

    def now() -> tuple[int, int]:
        """Operations and saved bytes so far."""
        scores = int(score_share * kernels.num_score_operations)
        return counter.get_total_flops() + scores, sum(storage.nbytes() for storage in kept.values())

    def enter(block: nn.Module, inputs: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        x = inputs[0] if inputs else kwargs["hidden_states"]
        entered.append((*now(), x.numel() * x.element_size()))

    def leave(block: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        operations, saved, num_bytes = entered.pop()
        in_blocks.append((now()[0] - operations, now()[1] - saved, num_bytes))

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    with FusedKernels() as kernels, FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = run()
        forward, saved = now()
        if output.requires_grad:
            output.sum().backward()
        total, _ = now()
    for handle in handles:
        handle.remove()
    recomputed, saved_in_blocks, inputs = map(sum, zip(*in_blocks)) if in_blocks else (0, 0, 0)
    largest = max((saved for _, saved, _ in in_blocks), default=0)
    return Cost(forward, total - forward, recomputed, saved, saved - saved_in_blocks + inputs + largest)


class FusedKernels(TorchFunctionMode):
    """Makes the meta device save what a GPU's fused kernels save, and counts operations of attention scores.

    Without it attention on the meta device saves all scores, as flash-attn and SDPA do not, and dropout a mask of
    numbers, where a GPU has one of booleans.
    """

    num_score_operations = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _FlashAttention.apply(*args[:3], self)
        if func is F.dropout and kwargs.get("training", True):
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        # Experts: each row of tokens meets one of the matrices, so it costs as much as one product with one matrix.
        if getattr(func, "__name__", "").endswith("grouped_mm"):
            return args[0] @ args[1][0]
        return func(*args, **kwargs)


class _FlashAttention(torch.autograd.Function):
    """Shapes of flash-attn, which saves query, key, value, output and one number for every row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernels: FusedKernels) -> Tensor:
        """(B, H, Q, D), (B, Hkv, S, D), (B, Hkv, S, D) -> (B, H, Q, D)."""
        batch, heads, length, _ = query.shape
        # Heads lie innermost, as the kernels write them: the output layer reads this memory and saves no copy.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.kernels = kernels
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float))
        kernels.num_score_operations += 4 * math.prod(query.shape) * key.shape[-2]
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Both products of the forward pass have two gradients."""
        query, key, value, *_ = ctx.saved_tensors
        ctx.kernels.num_score_operations += 8 * math.prod(query.shape) * key.shape[-2]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attend_in_plan(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object
) -> tuple[Tensor, None]:
    """Attention for any class of transformers. Gets no mask, which could not be made without numbers.

    (B, H, L, D), (B, Hkv, L, D), (B, Hkv, L, D) -> (B, L, H, D).
    """
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
