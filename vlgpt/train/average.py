"""Exponential moving average of the trained weights, kept like their fp32 masters: every rank its own partition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from vlgpt.train.engine import Engine


class MovingAverage:
    """average = rate * average + (1 - rate) * weights after every step, with rate = min(decay, (1 + t) / (10 + t)).

    The rate starts low, so that a short run is not held back by its random start. Costs 4 bytes per trained parameter,
    divided over the ranks, and no communication but at a commit.
    """

    def __init__(self, engine: Engine, *, decay: float):
        self.engine, self.decay = engine, decay
        self._averages = [master.detach().clone() for master in engine.masters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`."""
        rate = min(self.decay, (1 + step) / (10 + step))
        for average, master in zip(self._averages, self.engine.masters()):
            average.lerp_(master, 1 - rate)

    def state(self, *, is_kept: bool = True) -> dict[str, Tensor]:
        """The averaged weights by name, on the CPU of ranks that say `is_kept` (collective)."""
        with self._in_the_place_of_masters():
            return self.engine.trainable_state(is_kept=is_kept)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, at any number of ranks (collective). Raises UserError for a missing parameter."""
        with self._in_the_place_of_masters():
            self.engine.load_masters(state)

    @contextlib.contextmanager
    def _in_the_place_of_masters(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self._averages, self.engine.masters()):
            held = master.detach().clone()
            master.data.copy_(average)
            average.copy_(held)
