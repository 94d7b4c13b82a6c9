"""Image tokenizer: patch features of a frozen encoder -> N causal visual embeddings (paper §3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from vlgpt.models.component import Component
from vlgpt.models.layers import Backend, QueryTransformer
from vlgpt.models.standardise import Standardiser


class ImageTokenizer(Component):
    """N queries read P patches in causal order: embedding n depends on queries 1..n only.

    Args:
        num_patches: P, tokens of the frozen encoder, CLS included when it is kept.
        patch_width: C. num_visual: N (paper: 32). visual_width: d (paper: 4096, the width of LLaMA-7B).
        width, depth, num_heads: paper says 12 blocks; width and heads are not given (1024, 16 by default).
    """

    is_mapped = True
    runtime_arguments = ("backend", "has_checkpointing")

    def __init__(
        self,
        *,
        num_patches: int,
        patch_width: int,
        num_visual: int = 32,
        visual_width: int = 4096,
        width: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        init_std: float = 0.02,
        backend: Backend = "auto",
        has_checkpointing: bool = False,
    ):
        super().__init__()
        self.num_visual, self.visual_width = num_visual, visual_width
        self.transformer = QueryTransformer(
            num_queries=num_visual,
            num_context=num_patches,
            context_width=patch_width,
            width=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            init_std=init_std,
            backend=backend,
            has_checkpointing=has_checkpointing,
        )
        self.output = nn.Linear(width, visual_width)
        self.standardiser = Standardiser(num_visual, visual_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual embeddings as the detokenizer reads them: (M, P, C) -> (M, N, d)."""
        return self.output(self.transformer(patches))

    def encode(self, patches: Tensor) -> Tensor:
        """Standardised visual embeddings as the language model reads and predicts them: (M, P, C) -> (M, N, d)."""
        return self.standardiser(self(patches))
