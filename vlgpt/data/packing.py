"""Sequences -> rows of fixed length, planned from indexed lengths only: no text and no image is read.

A slot whose document gives no sequence is drawn anew from its source until one does. Then best fit with the
longest first: every sequence goes into the fullest row that still has room. The plan of a window is a pure
function of (seed, window, redrawn, indexed part lengths).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Literal

import numpy as np

from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.draws import Draws
from vlgpt.data.mixture import SLOTS, Redrawn, SlotPlan, Slots
from vlgpt.errors import UserError
from vlgpt.seeds import generator

MAX_KEPT_WINDOWS = 32  # a global batch of thousands of rows spans several windows
MAX_REJECTED = 100  # draws of a source per accepted one, beyond:
FREE_REJECTED = 8 * SLOTS  # more than a shard holds, so that one bad shard ends no run


def best_fit(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Row of every sequence: (n,) -> (n,) int64. Raises ValueError when one is longer than a row."""
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a sequence of {int(lengths.max())} positions does not fit into rows of {capacity}")
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    has_room = 0  # bit f: there is a row with exactly f free positions
    num_rows = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if fitting := has_room >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[free].pop()
            if not rows_with_room[free]:
                has_room &= ~(1 << free)
        else:
            row, free = num_rows, capacity
            num_rows += 1
        row_of[item] = row
        rows_with_room[free - length].append(row)
        has_room |= 1 << (free - length)
    return row_of


@dataclass(frozen=True)
class WindowPlan:
    """One window of the stream as rows. Row r holds the slots `members[starts[r]:starts[r + 1]]`, in
    stream order.
    """

    slots: Slots
    length: np.ndarray  # (n,) int64: positions of every slot's sequence; 0 = rejected, in a finite pass only
    members: np.ndarray
    starts: np.ndarray
    rejected: Counter[tuple[int, str]]  # (source, reason) -> draws
    redrawn: Redrawn  # before the next window

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    def row(self, row: int) -> list[int]:
        """Slots of a row."""
        return self.members[self.starts[row] : self.starts[row + 1]].tolist()


class Packer:
    """Plans windows of the stream.

    Args:
        lengths: gives the indexed part lengths of (source, shard).
        assemblers: one per source.
    """

    def __init__(
        self,
        plan: SlotPlan,
        *,
        seed: int,
        assemblers: Sequence[Assembler],
        lengths: Callable[[int, int], ShardLengths],
        packing: Literal["best_fit", "none"],
        sequence_length: int,
    ):
        self.plan, self.seed = plan, seed
        self._assemblers, self._lengths = assemblers, lengths
        self._packing, self._sequence_length = packing, sequence_length
        self.planned_ms: list[float] = []  # one entry per window planned; the reader may clear it
        self.window = lru_cache(maxsize=MAX_KEPT_WINDOWS)(self._plan_window)

    def _plan_window(self, window: int, redrawn: Redrawn = ()) -> WindowPlan:
        """Raises UserError when a source gives hardly any sequence."""
        start_s = time.perf_counter()
        slots = self.plan.slots(window, redrawn)
        length, rejected = self._sequence_lengths(slots)
        redrawn = self._redraw(window, slots, length, rejected, redrawn)
        kept = np.flatnonzero(length)
        if self._packing == "none":
            row_of = np.arange(len(kept))
        else:
            row_of = best_fit(length[kept], capacity=self._sequence_length)
            num_rows = int(row_of.max(initial=-1)) + 1
            row_of = (
                generator(self.seed, "rows", window).permutation(num_rows)[row_of] if num_rows else row_of
            )
        order = np.argsort(row_of, kind="stable")
        num_rows = int(row_of.max(initial=-1)) + 1
        starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]).astype(np.int64)
        self.planned_ms.append((time.perf_counter() - start_s) * 1000)
        return WindowPlan(slots, length, kept[order], starts, rejected, redrawn)

    def _redraw(
        self,
        window: int,
        slots: Slots,
        length: np.ndarray,
        rejected: Counter[tuple[int, str]],
        redrawn: Redrawn,
    ) -> Redrawn:
        """Draw rejected slots anew, in place, until all are accepted: -> `redrawn` after this window."""
        for attempt in count(1):
            again = np.flatnonzero(length == 0)
            source = slots.source[again]
            drawn = self.plan.redraw(window, source, redrawn=redrawn, attempt=attempt) if len(again) else None
            if drawn is None:
                break
            self._refuse_hopeless(slots, length, rejected)
            slots.shard[again], slots.sample[again], slots.key[again] = drawn.shard, drawn.sample, drawn.key
            length[again], more = self._sequence_lengths(drawn)
            rejected.update(more)
            num_drawn = np.bincount(source, minlength=len(self._assemblers))
            redrawn = tuple((num_drawn + np.array(redrawn or 0)).tolist())
        return redrawn

    def _refuse_hopeless(self, slots: Slots, length: np.ndarray, rejected: Counter[tuple[int, str]]) -> None:
        accepted = np.bincount(slots.source[length > 0], minlength=len(self._assemblers)).tolist()
        for s, assembler in enumerate(self._assemblers):
            reasons = {reason: num for (source, reason), num in sorted(rejected.items()) if source == s}
            if (num_rejected := sum(reasons.values())) > FREE_REJECTED + MAX_REJECTED * accepted[s]:
                raise UserError(
                    f"source {assembler.source.name!r} gave {accepted[s]} sequences in "
                    f"{accepted[s] + num_rejected} draws, at least 1 in {MAX_REJECTED} is needed; rejected: {reasons}; "
                    "check its documents, max_images, keep_single_image and data.sequence_length, or leave it out"
                )

    def _sequence_lengths(self, slots: Slots) -> tuple[np.ndarray, Counter[tuple[int, str]]]:
        """Positions of every slot's sequence, shard by shard: whole documents at once, the others one by
        one.
        """
        length = np.zeros(len(slots), np.int64)
        rejected: Counter[tuple[int, str]] = Counter()
        order = np.lexsort((slots.shard, slots.source))
        source, shard = slots.source[order], slots.shard[order]
        borders = np.flatnonzero((source[1:] != source[:-1]) | (shard[1:] != shard[:-1])) + 1
        for group in np.split(order, borders):
            if not len(group):
                continue
            s = int(slots.source[group[0]])
            lengths, assembler = self._lengths(s, int(slots.shard[group[0]])), self._assemblers[s]
            length[group], is_whole = assembler.whole_lengths(lengths, slots.sample[group])
            for slot in group[~is_whole].tolist():
                parts = lengths.parts(int(slots.sample[slot]))
                sequence = assembler.plan(parts, Draws(int(slots.key[slot])))
                if sequence.rejection:
                    rejected[s, sequence.rejection] += 1
                else:
                    length[slot] = sequence.length
        return length, rejected
