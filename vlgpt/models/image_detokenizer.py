"""Image detokenizer: N visual embeddings -> the two conditions of a diffusion decoder (paper §3.1, eq. 2)."""

from __future__ import annotations

from torch import Tensor, nn

from vlgpt.models.component import Component
from vlgpt.models.layers import Backend, QueryTransformer
from vlgpt.models.standardise import ConditionStandardiser
from vlgpt.settings import TransformerSettings


class ImageDetokenizer(Component):
    """Queries for z_v (image condition, first) and z_t (text condition) attend to the visual embeddings.

    Args:
        image_tokens, image_width: Kv x Dv of e_v (IP-Adapter Plus: 16 x 768).
        text_tokens, text_width: Kt x Dt of e_t (SD 1.5: 77 x 768).
        has_mean_token: e_v is regressed as mean token + residuals, see `ConditionStandardiser`.
        transformer: width, depth, num_heads, mlp_ratio and init_std, as in `TransformerSettings`.
    The forward pass speaks the standardised scale, `decode` the decoder's own.
    """

    is_mapped = True
    runtime_arguments = ("backend", "has_checkpointing")

    def __init__(
        self,
        *,
        num_visual: int = 32,
        visual_width: int = 4096,
        image_tokens: int = 16,
        image_width: int = 768,
        text_tokens: int = 77,
        text_width: int = 768,
        has_mean_token: bool = False,
        backend: Backend = "auto",
        has_checkpointing: bool = False,
        **transformer: float,
    ):
        super().__init__()
        shape = TransformerSettings.model_validate(transformer)
        self.image_targets = ConditionStandardiser(image_tokens, image_width, has_mean_token=has_mean_token)
        self.text_targets = ConditionStandardiser(text_tokens, text_width, has_mean_token=False)
        self.transformer = QueryTransformer(
            shape,
            num_queries=self.image_targets.num_targets + text_tokens,
            num_context=num_visual,
            context_width=visual_width,
            backend=backend,
            has_checkpointing=has_checkpointing,
        )
        self.image_output = nn.Linear(shape.width, image_width)
        self.text_output = nn.Linear(shape.width, text_width)

    def forward(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised conditions: (M, N, d) -> (M, targets of e_v, Dv), (M, Kt, Dt)."""
        hidden = self.transformer(visual)
        num_image = self.image_targets.num_targets
        return self.image_output(hidden[:, :num_image]), self.text_output(hidden[:, num_image:])

    def decode(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """z_v and z_t in the scale of the diffusion decoder: (M, N, d) -> (M, Kv, Dv), (M, Kt, Dt)."""
        image, text = self(visual)
        return self.image_targets.inverse(image), self.text_targets.inverse(text)
