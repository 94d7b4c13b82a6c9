"""SDPA of packed rows on CPU, document by document.

transformers gives SDPA a mask of whole rows, whose hidden part is computed all the same: on CPU nothing skips it.
Document by document and causally it costs the sum of l^2 / 2 instead of L^2: for three documents a row, a sixth. On a
GPU this would be many small kernels; there flash-attn's varlen path does it in one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Lengths = list[
    list[int]
]  # of the documents of every row, padding as one more; they add up to the row's length


def packed_lengths(segment_ids: Tensor) -> Lengths:
    """Lengths of the runs of equal ids: (B, L) -> B lists."""
    rows = []
    for row in segment_ids:
        is_start = torch.ones_like(row, dtype=torch.bool)
        is_start[1:] = row[1:] != row[:-1]
        starts = [*is_start.nonzero().squeeze(1).tolist(), len(row)]
        rows.append([stop - start for start, stop in pairwise(starts)])
    return rows


def register() -> None:
    """Teach transformers' `sdpa` the argument `packed_lengths`; without it nothing changes."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        packed_lengths: Lengths | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        window = options.get("sliding_window") or query.shape[2]
        if packed_lengths is None or query.device.type != "cpu" or window < query.shape[2]:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
            )
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return attend_by_document(query, key, value, packed_lengths, dropout=dropout, scale=scaling), None

    AttentionInterface.register("sdpa", attention)


def attend_by_document(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, *, dropout: float, scale: float | None
) -> Tensor:
    """Causal attention inside every document: three of (B, H, L, D) -> (B, L, H, D)."""
    rows = []
    for number, row in enumerate(lengths):
        pieces = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale).transpose(
                1, 2
            )
            for q, k, v in zip(*(x[number : number + 1].split(row, dim=2) for x in (query, key, value)))
        ]
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)
