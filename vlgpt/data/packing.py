"""Sequences -> rows of fixed length, planned from indexed lengths only: no text and no image is read.

A slot whose document gives no sequence gets further draws of its source until one does. Then best fit with the longest
first: every sequence goes into the fullest row that still has room. The plan of a window is a pure function of (seed,
window, redrawn, indexed part lengths).
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
from vlgpt.data.mixture import SLOTS, Draws, Redrawn, SlotPlan, Slots, SourceOrder
from vlgpt.errors import UserError
from vlgpt.seeds import generator

# A global batch of thousands of rows spans several windows.
MAX_KEPT_WINDOWS = 32
# Rejected draws of a source per accepted one, from `FREE_REJECTED` on: more than a shard holds, so that one bad shard
# ends no run.
MAX_REJECTED = 100
FREE_REJECTED = 8 * SLOTS


def best_fit(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Row of every sequence: (n,) -> (n,) int64. Raises ValueError when one is longer than a row."""
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a sequence of {int(lengths.max())} positions does not fit into rows of {capacity}")
    row_of = np.empty(len(lengths), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    num_rows = 0
    # Bit f is set when a row has exactly f free positions. The fullest row with room for `length` is then the lowest
    # bit of a shifted integer: one shift of capacity / 64 words per sequence, without a search tree. The optimum is
    # NP-hard; longest first needs at most 11/9 of its rows (Johnson 1973).
    has_room = 0
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
    """One window of the stream as rows. Row r holds the slots `members[starts[r]:starts[r + 1]]`, in stream order."""

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
        slots: list[int] = self.members[self.starts[row] : self.starts[row + 1]].tolist()
        return slots


def mean_length(
    order: SourceOrder, assembler: Assembler, lengths: Callable[[int], ShardLengths], *, num_draws: int = 256
) -> float:
    """Positions of an accepted sequence of one source, from the plans of its first draws; `lengths(shard)`."""
    shards, samples = order.locate(np.arange(min(num_draws, order.num_samples)))
    planned = [
        # Any keys do, if all ranks take the same.
        assembler.plan(lengths(shard).parts(sample), Draws(key)).length
        for key, (shard, sample) in enumerate(zip(shards.tolist(), samples.tolist()))
    ]
    return sum(planned) / max(sum(map(bool, planned)), 1)


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
        if self._packing == "best_fit" and num_rows:
            # Best fit fills the first rows with the longest sequences: without a permutation every window would begin
            # with long documents and end with short ones.
            row_of = generator(self.seed, "rows", window).permutation(num_rows)[row_of]
        # Stable: the sequences of a row stay in the order of the stream.
        order = np.argsort(row_of, kind="stable")
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
        """Replace rejected slots by further draws, in place, until all are accepted: -> `redrawn` after this window."""
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
        """Positions of every slot's sequence (0 = rejected), and the rejections by (source, reason)."""
        length = np.zeros(len(slots), np.int64)
        rejected: Counter[tuple[int, str]] = Counter()
        # Shard by shard, since the lengths of a shard are one index file. Documents that are taken whole, nearly all of
        # them, are answered by numpy at once; only the others are planned one by one.
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
