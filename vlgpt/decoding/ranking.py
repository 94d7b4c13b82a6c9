"""Log-likelihood of many candidate replies to one prompt, whose KV cache they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlgpt.decoding.cache import RenderedPrompt, Rows
from vlgpt.models.language_models import cache_argument, leave_flash
from vlgpt.models.multimodal_lm import MultimodalLM

MAX_PACKED = 1024  # candidate tokens per forward pass: bounds logits and mask


@contextmanager
def mask_attention(backbone: Any) -> Iterator[None]:
    """Attention that takes a mask per pair of positions: flash-attn takes none, so SDPA replaces it here."""
    before = backbone.config._attn_implementation
    if before.startswith("flash_attention"):
        leave_flash(backbone)
    try:
        yield
    finally:
        if before.startswith("flash_attention"):
            backbone.set_attn_implementation(before)


def log_likelihoods(lm: MultimodalLM, prompt: RenderedPrompt, candidates: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probabilities of C token sequences after a prompt: -> (C,) fp32 on CPU.

    The prompt is read once.
    """
    # Candidates are laid end to end in one row, and each sees the prompt and itself only. So the prompt's cache is
    # neither copied for each candidate nor padded to the longest.
    rows = Rows(lm, [prompt.embed(lm)])
    first = lm.logits(rows.hidden).float().log_softmax(-1)[0]
    result = torch.stack([first[ids[0]] for ids in candidates]).double()
    pack: list[int] = []
    with mask_attention(lm.backbone):
        for number in range(len(candidates)):
            pack.append(number)
            is_last = number + 1 == len(candidates)
            if is_last or sum(len(candidates[n]) - 1 for n in [*pack, number + 1]) > MAX_PACKED:
                result[pack] += _later_tokens(lm, rows, [candidates[n] for n in pack])
                pack = []
    return result.float().cpu()


def _later_tokens(lm: MultimodalLM, rows: Rows, candidates: Sequence[Sequence[int]]) -> Tensor:
    """Summed log-probabilities of all tokens but the first: -> (C,) float64."""
    device = rows.hidden.device
    lengths = torch.tensor([len(ids) - 1 for ids in candidates], device=device)
    if not int(lengths.sum()):
        return torch.zeros(len(candidates), dtype=torch.float64, device=device)
    inputs = torch.tensor([token for ids in candidates for token in ids[:-1]], device=device)
    targets = torch.tensor([token for ids in candidates for token in ids[1:]], device=device)
    owner = torch.repeat_interleave(torch.arange(len(candidates), device=device), lengths)
    offset = torch.arange(len(owner), device=device) - (lengths.cumsum(0) - lengths)[owner]
    is_own = (owner[:, None] == owner[None, :]) & (offset[:, None] >= offset[None, :])
    embeddings = lm.backbone.get_input_embeddings()(inputs)[None]
    mask = torch.zeros(len(owner), rows.num_slots + len(owner), dtype=embeddings.dtype, device=device)
    mask[:, rows.num_slots :].masked_fill_(~is_own, torch.finfo(mask.dtype).min)
    output = lm.backbone(
        inputs_embeds=embeddings,
        attention_mask=mask[None, None],
        position_ids=(rows.num_slots + offset)[None],
        use_cache=True,
        **cache_argument(lm.backbone, rows.cache),
    )
    rows.cache.crop(-len(owner))
    log_probs = lm.logits(output.last_hidden_state[0]).float().log_softmax(-1)
    values = log_probs[torch.arange(len(targets), device=device), targets].double()
    return torch.zeros(len(candidates), dtype=torch.float64, device=device).index_add_(0, owner, values)
