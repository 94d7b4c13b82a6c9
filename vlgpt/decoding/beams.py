"""Beam search with transformers' scores and stopping rule; an image is one step of a beam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlgpt.decoding.api import Listener
from vlgpt.decoding.cache import RenderedPrompt, Stream
from vlgpt.decoding.hypothesis import Hypothesis, ReplyRules
from vlgpt.decoding.stepwise import Hooks, extend_images


@dataclass
class BeamGroup:
    """The beams of one prompt: those that grow, best first, and the best finished ones."""

    running: list[Hypothesis]
    finished: list[tuple[float, Hypothesis]] = field(default_factory=list)

    def best(self) -> Hypothesis:
        """The finished beam with the highest score; of equal ones the first found."""
        return max(self.finished, key=lambda entry: entry[0])[1]


class BeamSearch:
    """`num_beams` replies per prompt: grown by log-likelihood, ranked by log-likelihood / length ** penalty.

    Every beam gains one token per step. A beam that chooses [IMG] draws the whole image within that step while the
    others wait, so beams of equal step have equally many choices behind them. Source: transformers
    `GenerationMixin._beam_search` with its default `early_stopping=False`.
    """

    def __init__(
        self,
        stream: Stream,
        prompts: Sequence[RenderedPrompt],
        hypotheses: Sequence[Hypothesis],
        *,
        rules: ReplyRules,
        listener: Listener,
        hooks: Hooks,
    ):
        self.stream, self.prompts, self.rules = stream, prompts, rules
        self.listener, self.hooks = listener, hooks
        self.num_beams = rules.settings.num_beams
        self.groups = [BeamGroup([hypothesis]) for hypothesis in hypotheses]

    def run(self) -> list[Hypothesis]:
        """-> the best reply of every prompt."""
        live = list(self.groups)
        self._read([beam for group in live for beam in group.running])
        while live:
            parents: list[int] = []
            first_row = 0
            scores = self._scores([beam for group in live for beam in group.running])
            for group in live:
                num_rows = len(group.running)
                chosen = self._grow(group, *scores, first_row=first_row)
                first_row += num_rows
                parents += chosen
            live = [group for group in live if group.running]
            if live:
                self.stream.select(parents)
                self._read([beam for group in live for beam in group.running])
        return [group.best() for group in self.groups]

    def _scores(self, beams: list[Hypothesis]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of next tokens, raw and with -inf at forbidden ones: 2 x (rows, vocabulary)."""
        log_probs = self.stream.lm.logits(self.stream.hidden).float().log_softmax(-1)
        return log_probs, self.hooks.processed(self.rules.mask(log_probs, beams), self.prompts, beams)

    def _grow(self, group: BeamGroup, log_probs: Tensor, masked: Tensor, *, first_row: int) -> list[int]:
        """One step of a prompt's beams -> the parent rows of its running beams (none when it is done)."""
        rows = slice(first_row, first_row + len(group.running))
        past = torch.tensor([beam.log_likelihood for beam in group.running], device=masked.device)
        totals = (masked[rows] + past[:, None]).flatten()
        # So many that `num_beams` beams can go on even when every beam's best tokens are all end tokens.
        num_candidates = min(max(2, 1 + self.rules.num_end_tokens) * self.num_beams, len(totals))
        best_totals, best = (values.tolist() for values in totals.topk(num_candidates))
        parents: list[int] = []
        running: list[Hypothesis] = []
        for rank, (total, index) in enumerate(zip(best_totals, best)):
            # Sorted: from here on there are only forbidden tokens.
            if total == -torch.inf:
                break
            parent, token_id = divmod(index, masked.shape[1])
            beam = group.running[parent].copy()
            self.rules.choose(beam, token_id, float(log_probs[first_row + parent, token_id]))
            if beam.finish is None and len(running) < self.num_beams:
                running.append(beam)
                parents.append(first_row + parent)
            # As in transformers, an end counts only among the best `num_beams` candidates.
            elif beam.finish is not None and rank < self.num_beams:
                group.finished.append((self._score(beam), beam))
        group.finished = sorted(group.finished, key=lambda entry: -entry[0])[: self.num_beams]
        group.running = running
        if self._is_done(group):
            group.running, parents = [], []
        elif self.listener.is_cancelled is not None and self.listener.is_cancelled(running[0].prompt):
            # Who cancels still gets a reply: the best beam as far as it has come.
            running[0].finish = "length"
            group.finished.append((self._score(running[0]), running[0]))
            group.running, parents = [], []
        return parents

    def _score(self, beam: Hypothesis) -> float:
        return beam.log_likelihood / beam.num_chosen**self.rules.settings.length_penalty

    def _is_done(self, group: BeamGroup) -> bool:
        """Whether no running beam is taken to become better than the worst of `num_beams` finished ones."""
        if not group.running:
            return True
        # The score of the best running beam now stands for all that it could become: `early_stopping=False`.
        is_full = len(group.finished) == self.num_beams
        return is_full and self._score(group.running[0]) <= group.finished[-1][0]

    def _read(self, beams: list[Hypothesis]) -> None:
        """Let the model read what was chosen; beams with an open image draw it, the others wait."""
        extend_images(self.stream, beams, rules=self.rules)
        while any(beam.unread for beam in beams):
            self.stream.advance([beam.unread.pop(0) if beam.unread else None for beam in beams])
            extend_images(self.stream, beams, rules=self.rules)
