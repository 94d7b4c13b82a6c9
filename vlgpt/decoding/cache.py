"""Rows of unequal prompts that advance together over one KV cache; text tokens and visual embeddings alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from vlgpt.models.language_models import cache_argument
from vlgpt.models.multimodal_lm import MultimodalLM


@dataclass(frozen=True)
class RenderedPrompt:
    """Token ids (L,), the mask of visual positions (L,), and their embeddings (M, N, d), standardised."""

    address: str
    token_ids: Tensor
    is_visual: Tensor
    visual: Tensor | None

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def followed_by(self, token_id: int) -> RenderedPrompt:
        """The same prompt with one more token."""
        ids = torch.cat([self.token_ids, self.token_ids.new_tensor([token_id])])
        is_visual = torch.cat([self.is_visual, self.is_visual.new_zeros(1)])
        return RenderedPrompt(self.address, ids, is_visual, self.visual)

    def embed(self, lm: MultimodalLM) -> Tensor:
        """-> (L, D)."""
        device = lm.visual_scale.device
        visual = None if self.visual is None else self.visual.to(device, lm.dtype)
        return lm.embed(self.token_ids[None].to(device), self.is_visual[None].to(device), visual)[0]


class Rows:
    """A KV cache for R rows. Slots are shared, `is_seen` (R, slots) says which of them belong to a row.

    Prompts are padded on the left. A row that idles in a step gets a slot that it never sees again, and its positions
    do not move: what a row computes depends on no other row. `hidden` (R, D) is the state of each row's last position.
    """

    def __init__(self, lm: MultimodalLM, prompts: Sequence[Tensor]):
        self.lm = lm
        self.cache = DynamicCache()
        width = max(len(p) for p in prompts)
        # Padded on the left, so that the last slot is the last position of every prompt.
        padded = prompts[0].new_zeros(len(prompts), width, prompts[0].shape[1])
        self.is_seen = torch.zeros(len(prompts), width, dtype=torch.bool, device=padded.device)
        for row, prompt in enumerate(prompts):
            padded[row, width - len(prompt) :] = prompt
            self.is_seen[row, width - len(prompt) :] = True
        self._is_dense = all(len(p) == width for p in prompts)
        # Padding would have position -1, which a table of learned positions does not hold.
        self.hidden = self._forward(padded, (self.is_seen.cumsum(1) - 1).clamp_min(0))

    @property
    def num_slots(self) -> int:
        return self.is_seen.shape[1]

    def _forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """(R, L, D), (R, L) -> (R, D) of the last slot."""
        # Without holes no mask is passed, which lets attention take its fastest kernel.
        output = self.lm.backbone(
            inputs_embeds=embeddings,
            attention_mask=None if self._is_dense else self.is_seen,
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.lm.backbone, self.cache),
        )
        return output.last_hidden_state[:, -1]

    def step(self, embeddings: Tensor, is_moving: Tensor | None = None) -> Tensor:
        """Feed one embedding to every row, (R, D), and return the hidden states (R, D).

        A row that is False in `is_moving` (R,) ignores it and keeps its earlier state.
        """
        # The cache is one tensor, so an idle row gets a slot too. Masked for ever, and not counted in the position of
        # the row, it changes nothing for it: a reply depends on no other row of its batch.
        positions = self.is_seen.sum(1, keepdim=True)
        column = torch.ones_like(self.is_seen[:, :1]) if is_moving is None else is_moving[:, None]
        self.is_seen = torch.cat([self.is_seen, column], dim=1)
        self._is_dense = self._is_dense and is_moving is None
        hidden = self._forward(embeddings[:, None], positions)
        self.hidden = hidden if is_moving is None else torch.where(column, hidden, self.hidden)
        return self.hidden

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may be taken several times."""
        if list(rows) == list(range(len(self.is_seen))):
            return
        index = torch.tensor(rows, device=self.is_seen.device)
        self.cache.batch_select_indices(index)
        self.is_seen, self.hidden = self.is_seen[index], self.hidden[index]

    def forget(self, rows: Tensor, *, after_slot: int) -> None:
        """Rows of the mask `rows` (R,) lose all that they saw from this slot on."""
        self.is_seen[:, after_slot:] &= ~rows[:, None]
        self._is_dense = False


class Stream:
    """Rows that read tokens and visual embeddings, each with a companion when images are guided.

    The companion of a row holds the empty prompt. It follows its row inside images only and forgets each image at its
    end, so it always gives the embedding that the empty prompt would lead to (classifier-free guidance).
    """

    def __init__(
        self,
        lm: MultimodalLM,
        prompts: Sequence[RenderedPrompt],
        *,
        begin_image_id: int,
        guidance: float = 1.0,
        empty_prompts: Sequence[RenderedPrompt] = (),
    ):
        self.lm, self.guidance, self.begin_image_id = lm, guidance, begin_image_id
        self.num_rows = len(prompts)
        self.has_companions = len(empty_prompts) > 0
        self.rows = Rows(lm, [prompt.embed(lm) for prompt in (*prompts, *empty_prompts)])
        # A forced image begins inside the prompts: the [IMG] that ends an empty prompt is part of the first image.
        ends = [int(prompt.token_ids[-1] == begin_image_id) for prompt in empty_prompts]
        self._companion_slots = self.rows.num_slots - max(ends, default=0)

    @property
    def hidden(self) -> Tensor:
        """(R, D)."""
        return self.rows.hidden[: self.num_rows]

    def predict_visual(self, rows: Sequence[int]) -> Tensor:
        """Next visual embedding of these rows: -> (len(rows), d), standardised, guided."""
        index = torch.tensor(rows, device=self.hidden.device)
        predicted = self.lm.regression_head(self.rows.hidden[index])
        if not self.has_companions:
            return predicted
        unconditional = self.lm.regression_head(self.rows.hidden[index + self.num_rows])
        # Classifier-free guidance (Ho and Salimans 2022), of embeddings instead of noise; 1 is none.
        return unconditional + self.guidance * (predicted - unconditional)

    def advance(self, inputs: Sequence[int | Tensor | None]) -> None:
        """Feed every row a token id, a visual embedding (d,), or nothing (None: the row idles)."""
        device = self.hidden.device
        is_moving = torch.tensor([entry is not None for entry in inputs], device=device)
        # 0 stands for no token: its embedding is replaced by the visual one, or lies in a slot that is never seen.
        ids = torch.tensor([entry if isinstance(entry, int) else 0 for entry in inputs], device=device)
        embeddings = self.lm.backbone.get_input_embeddings()(ids)
        visual = [row for row, entry in enumerate(inputs) if isinstance(entry, Tensor)]
        if visual:
            values = torch.stack([entry for entry in inputs if isinstance(entry, Tensor)])
            embeddings[visual] = self.lm.embed_visual(values).to(embeddings.dtype)
        if not self.has_companions:
            has_idle_rows = any(entry is None for entry in inputs)
            self.rows.step(embeddings, is_moving if has_idle_rows else None)
            return
        # A companion reads [IMG] and embeddings, so that it can predict inside images. At a text token it forgets the
        # image: text is not guided, and the next image must again see the empty prompt alone.
        in_image = [isinstance(entry, Tensor) or entry == self.begin_image_id for entry in inputs]
        is_following = torch.tensor(in_image, device=device)
        is_reading_text = is_moving & ~is_following
        forgetting = torch.cat([torch.zeros_like(is_reading_text), is_reading_text])
        self.rows.forget(forgetting, after_slot=self._companion_slots)
        self.rows.step(torch.cat([embeddings, embeddings]), torch.cat([is_moving, is_following]))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows (and their companions) in this order; a row may be taken several times."""
        chosen = list(rows)
        if self.has_companions:
            chosen += [row + self.num_rows for row in rows]
        self.rows.select(chosen)
        self.num_rows = len(rows)
