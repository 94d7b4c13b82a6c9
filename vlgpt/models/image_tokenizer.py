"""Image tokenizer: patch features of a frozen encoder -> N causal visual embeddings (paper §3.1)."""

from __future__ import annotations

from torch import Tensor, nn

from vlgpt.models.component import Component
from vlgpt.models.layers import Backend, QueryTransformer
from vlgpt.models.standardise import Standardiser
from vlgpt.settings import TransformerSettings


class ImageTokenizer(Component):
    """N queries read P patches in causal order: embedding n depends on queries 1..n only.

    Args:
        num_patches: P, tokens of the frozen encoder, CLS included when it is kept.
        patch_width: C. num_visual: N (paper: 32). visual_width: d (paper: 4096, the width of LLaMA-7B).
        transformer: width, depth, num_heads, mlp_ratio and init_std, as in `TransformerSettings`.
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
        backend: Backend = "auto",
        has_checkpointing: bool = False,
        **transformer: float,
    ):
        super().__init__()
        self.num_visual, self.visual_width = num_visual, visual_width
        shape = TransformerSettings.model_validate(transformer)
        self.transformer = QueryTransformer(
            shape,
            num_queries=num_visual,
            num_context=num_patches,
            context_width=patch_width,
            backend=backend,
            has_checkpointing=has_checkpointing,
        )
        self.output = nn.Linear(shape.width, visual_width)
        self.standardiser = Standardiser(num_visual, visual_width)

    def forward(self, patches: Tensor) -> Tensor:
        """Visual embeddings as the detokenizer reads them: (M, P, C) -> (M, N, d)."""
        visual: Tensor = self.output(self.transformer(patches))
        return visual

    def encode(self, patches: Tensor) -> Tensor:
        """Standardised visual embeddings as the language model reads and predicts them: (M, P, C) -> (M, N, d)."""
        standardised: Tensor = self.standardiser(self(patches))
        return standardised
