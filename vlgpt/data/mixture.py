"""Which sample has which position in the endless training stream: a pure function of seed, shard sizes and position.

The stream is cut into windows of 4,096 slots. Every window holds a fixed integer number of slots per source, so the
weights are exact within 1/4096 at any moment. A slot whose draw is rejected gets the next draw of its source. How often
that happened before a window is part of the position (`redrawn`), so the number of draws that a source has made before
any window is a multiplication and an addition, not a replay. The k-th draw of a source is found from (epoch,
permutation of the shards, permutation of the samples inside a block of shards); nothing as large as the data set is
ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import numpy as np

from vlgpt.errors import UserError
from vlgpt.seeds import generator
from vlgpt.settings import DataSettings

SLOTS = 4096  # slots of a window; weights are exact within 1/SLOTS
Redrawn = tuple[int, ...]  # per source, draws made in place of rejected ones before a window; () = none
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Slots:
    """One window of the stream: arrays `(n,)`, n = 4,096 except in the last window of a finite pass."""

    source: np.ndarray  # int64, position in the list of sources
    shard: np.ndarray  # int64
    sample: np.ndarray  # int64, inside the shard
    key: np.ndarray  # uint64, addresses every random choice made for this slot

    def __len__(self) -> int:
        return len(self.source)


class SlotPlan(Protocol):
    """A stream of windows: endless (`Mixture`) or every sample once (`OnePass`)."""

    num_windows: int | None

    def num_slots(self, window: int) -> int:
        """Slots of a window: SLOTS, fewer only at the end of a finite pass."""

    def slots(self, window: int, redrawn: Redrawn = ()) -> Slots:
        """All slots of a window; `redrawn` counts the earlier draws by source that replaced rejected ones."""

    def redraw(self, window: int, source: np.ndarray, *, redrawn: Redrawn, attempt: int) -> Slots | None:
        """One new draw for every rejected slot of these sources, (n,) -> Slots of n; None when they stay empty."""

    def epoch(self, window: int, redrawn: Redrawn = ()) -> int:
        """Complete passes over the data before a window."""


class Purpose:
    """What a random number of a slot decides. These addresses are part of the order of the data: never change one."""

    START: Final = 0  # where the window of a too long document begins
    KEEP_SINGLE: Final = 1  # whether a sequence with one image is kept
    IMAGE: Final = 2  # which image of a document (image stages)
    TEXT: Final = 3  # which text of a document (image stages)
    VIEW: Final = 1 << 10  # + image number: which stored view of its features
    SWAP: Final = 1 << 20  # + part number: whether an image changes places with the text after it
    LEFT_OUT: Final = 1 << 30  # + part number: which images of a window with too many are left out


class Draws:
    """Uniform numbers of one slot of the stream, addressed by the slot's key and a purpose, never drawn in order."""

    __slots__ = ("key",)

    def __init__(self, key: int):
        self.key = key

    def uniform(self, purpose: int) -> float:
        """A number in [0, 1)."""
        # SplitMix64 (Steele et al. 2014): under 1 us per draw. A numpy generator costs 20 us to seed, and a window of
        # 4,096 slots makes tens of thousands of draws.
        z = (self.key + (purpose + 1) * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        # The upper 53 bits, as many as a double holds exactly: more could round up to 1.0.
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def below(self, limit: int, purpose: int) -> int:
        """A whole number in [0, limit)."""
        # Biased by at most limit / 2**53. Drawing again, the exact way, would need more than one number per address.
        return int(self.uniform(purpose) * limit)


def slot_keys(seed: int, window: int, num_slots: int, *attempt: int) -> np.ndarray:
    """Addresses of the random choices of slots of a window: -> (num_slots,) uint64."""
    # Every attempt has keys of its own: under the old key a draw would be judged by the very random number that its
    # predecessor was rejected by.
    return generator(seed, "slots", window, *attempt).integers(0, 2**64, num_slots, dtype=np.uint64)


class SourceOrder:
    """The k-th draw of one source, for any k, in logarithmic time.

    Args:
        counts: samples per shard `(S,)`; empty shards are allowed.
        shuffle_shards: samples are permuted inside blocks of so many shards, which bounds how many shards are read
            from at a time.
    """

    def __init__(self, name: str, *, seed: int, counts: np.ndarray, shuffle_shards: int):
        self.name, self.seed = name, seed
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self._block = shuffle_shards
        if self.num_samples == 0:
            raise UserError(
                f"source {name!r} holds no sample in its {len(self.counts)} shards; remove it or build it"
            )
        # A window of a large source lies in one or two epochs and few blocks. A small one needs more, but quick ones.
        self._shards = lru_cache(maxsize=2)(self._permute_shards)
        self._samples = lru_cache(maxsize=4)(self._permute_samples)

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of this epoch, and the number of samples before each: -> (S,), (S + 1,)."""
        rng = generator(self.seed, "shards", self.name, epoch)
        order = rng.permutation(len(self.counts)).astype(np.int32)
        return order, np.concatenate([[0], np.cumsum(self.counts[order])])

    def _permute_samples(self, epoch: int, block: int, num_samples: int) -> np.ndarray:
        rng = generator(self.seed, "samples", self.name, epoch, block)
        return rng.permutation(num_samples).astype(np.int32)

    def locate(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and sample of these draws: (n,) -> (n,), (n,)."""
        shard, sample = np.empty_like(draws), np.empty_like(draws)
        epochs = draws // self.num_samples
        for epoch in np.unique(epochs):
            at = epochs == epoch
            shard[at], sample[at] = self._locate_in_epoch(int(epoch), draws[at] - epoch * self.num_samples)
        return shard, sample

    def _locate_in_epoch(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order, starts = self._shards(epoch)
        block_starts = np.append(starts[:-1][:: self._block], starts[-1])
        # A place in the epoch belongs to a block of shards. Inside it the samples of all its shards are permuted
        # together; the permuted place then belongs to one shard. Both searches are logarithmic in the number of shards.
        blocks = np.searchsorted(block_starts, places, side="right") - 1
        for block in np.unique(blocks):
            start, size = block_starts[block], int(block_starts[block + 1] - block_starts[block])
            at = blocks == block
            places[at] = start + self._samples(epoch, int(block), size)[places[at] - start]
        # An empty shard starts where the next one does; `right` finds the last of equal starts, the one with samples.
        position = np.searchsorted(starts, places, side="right") - 1
        return order[position], places - starts[position]


def base_weights(settings: DataSettings, sizes: Sequence[int]) -> np.ndarray:
    """Weight of every source before ramps: (S,). Raises UserError when "size" and numbers are mixed."""
    given = [source.weight for source in settings.sources]
    by_size = [source.name for source in settings.sources if source.weight == "size"]
    if by_size and len(by_size) < len(given):
        raise UserError(
            f"data.sources: give all weights as numbers or all as 'size'; {', '.join(by_size)} are by size, "
            "the others are numbers"
        )
    weights = np.asarray(sizes, dtype=np.float64) if by_size else np.asarray(given, dtype=np.float64)
    if settings.mixing == "temperature":
        # T > 1 brings the weights closer together, so that small sources are seen more often: the sampling of languages
        # in multilingual translation (Arivazhagan et al. 2019).
        weights = np.where(weights > 0, weights, 0.0) ** (1.0 / settings.temperature) * (weights > 0)
    if not weights.sum() > 0:
        raise UserError("data.sources: every weight is 0; give at least one source a positive weight")
    normalised: np.ndarray = weights / weights.sum()
    return normalised


def quotas(weights: np.ndarray) -> np.ndarray:
    """Slots per source by largest remainder, each row sums to 4,096: (W, S) -> (W, S) int64.

    A source with any weight gets a slot before larger ones are rounded up.
    """
    # Rounding alone would not sum to 4,096, and would never give a source of weight 0.0001 anything. A remainder above
    # 1 puts such a source before all others.
    exact = weights / weights.sum(axis=1, keepdims=True) * SLOTS
    # 1e-9: a share that is a whole number but for rounding must not lose a slot.
    whole = np.floor(exact + 1e-9)
    remainder = exact - whole + ((whole == 0) & (weights > 0))
    # Sorted twice: the rank of every source. Stable, so equal remainders go to the sources named first.
    rank = np.argsort(np.argsort(-remainder, axis=1, kind="stable"), axis=1, kind="stable")
    left = SLOTS - whole.sum(axis=1, keepdims=True)
    slots: np.ndarray = (whole + (rank < left)).astype(np.int64)
    return slots


def ramp_factors(ramps: Sequence[tuple[float, float]], shares: np.ndarray) -> np.ndarray:
    """How much of its weight each source has at these shares of the run: (W,) -> (W, S)."""
    factors = np.ones((len(shares), len(ramps)))
    for s, (start, end) in enumerate(ramps):
        if end > 0:
            factors[:, s] = np.clip((shares - start) / max(end - start, 1e-9), 0.0, 1.0)
    return factors


def count_windows(
    settings: DataSettings,
    orders: Sequence[SourceOrder],
    *,
    run_positions: int,
    mean_length: Callable[[int], float] | None,
) -> int | None:
    """Windows of a run of so many rows (samples without packing), in which ramps are measured; None without ramps.

    `mean_length(s)`: positions of a sequence of source s; None when every sequence has a row of its own.
    """
    ramps = [source.ramp for source in settings.sources]
    if not any(end > 0 for _, end in ramps):
        return None
    rows_per_slot = 1.0
    if mean_length is not None:
        # A window is a number of sequences, a run a number of rows. How many rows a sequence takes follows from the
        # mean lengths and the mean mixture over the run: an estimate, but a pure function of the data.
        weights = base_weights(settings, [order.num_samples for order in orders])
        shares = weights * ramp_factors(ramps, np.linspace(0, 1, 101))
        shares = (shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)).mean(axis=0)
        lengths = np.array([mean_length(s) for s in range(len(orders))])
        rows_per_slot = float(shares @ lengths) / settings.sequence_length
    return max(1, round(run_positions / (SLOTS * max(rows_per_slot, 1e-6))))


class Mixture:
    """The endless stream over all sources.

    Args:
        weights: (S,), positive sum.
        ramps: per source the shares of the run between which its weight grows from 0 to full.
        total_windows: windows of the whole run; needed when there is a ramp.
    Raises UserError when a weight is too small for one slot, or ramps leave the start of the run without data.
    """

    num_windows: int | None = None

    def __init__(
        self,
        orders: Sequence[SourceOrder],
        *,
        seed: int,
        weights: np.ndarray,
        ramps: Sequence[tuple[float, float]] = (),
        total_windows: int | None = None,
    ):
        self.orders, self.seed = tuple(orders), seed
        self._full = quotas(weights[None])[0]
        for order, weight, quota in zip(orders, weights, self._full):
            if weight > 0 and quota == 0:
                raise UserError(
                    f"source {order.name!r} has weight {weight:.2g} of 1: less than one of {SLOTS} slots; "
                    "raise it or leave the source out"
                )
        ramp_end = max((end for _, end in ramps), default=0.0)
        if ramp_end > 0 and total_windows is None:
            raise UserError(
                "a source has a ramp, so the loader must be told the length of the run (run_positions)"
            )
        num_ramp = int(np.ceil(ramp_end * (total_windows or 0)))
        shares = np.arange(num_ramp) / max(total_windows or 1, 1)
        ramped = weights * ramp_factors(ramps, shares) if num_ramp else np.empty((0, len(weights)))
        if num_ramp and not ramped.sum(axis=1).min() > 0:
            raise UserError(
                "data.sources: all sources are ramped in, so the run starts without data; leave one at (0, 0)"
            )
        self._ramp = quotas(ramped) if num_ramp else np.empty((0, len(weights)), dtype=np.int64)
        self._before = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(self._ramp, axis=0)])

    def quota(self, window: int) -> np.ndarray:
        """Slots of each source in a window: -> (S,)."""
        slots: np.ndarray = self._ramp[window] if window < len(self._ramp) else self._full
        return slots

    def draws_before(self, window: int, redrawn: Redrawn = ()) -> np.ndarray:
        """How often each source was drawn before a window: -> (S,)."""
        # Windows of the ramp differ, so their draws are summed beforehand; all later windows are alike. Draws made in
        # place of rejected ones shift the whole stream of their source behind them.
        num_ramp = len(self._ramp)
        late = max(window - num_ramp, 0) * self._full
        before: np.ndarray = self._before[min(window, num_ramp)] + late + np.array(redrawn or 0)
        return before

    def num_slots(self, window: int) -> int:
        """SLOTS in every window, since the stream is endless."""
        return SLOTS

    def slots(self, window: int, redrawn: Redrawn = ()) -> Slots:
        """All slots of a window, before any of them is rejected."""
        quota = self.quota(window)
        source = np.repeat(np.arange(len(quota)), quota)
        source = source[generator(self.seed, "mixing", window).permutation(SLOTS)]
        key = slot_keys(self.seed, window, SLOTS)
        return self._draw(source, self.draws_before(window, redrawn), key)

    def redraw(self, window: int, source: np.ndarray, *, redrawn: Redrawn, attempt: int) -> Slots:
        """Further draws in place of rejected ones of these sources, in stream order: (n,) -> Slots of n.

        `redrawn` counts those already made in this window too; `attempt` counts from 1.
        """
        key = slot_keys(self.seed, window, len(source), attempt)
        return self._draw(source, self.draws_before(window + 1, redrawn), key)

    def _draw(self, source: np.ndarray, first: np.ndarray, key: np.ndarray) -> Slots:
        """The next draws of each source, from number `first[s]` on."""
        shard, sample = np.empty_like(source), np.empty_like(source)
        for s in np.unique(source):
            at = source == s
            shard[at], sample[at] = self.orders[s].locate(first[s] + np.arange(at.sum()))
        return Slots(source, shard, sample, key)

    def epoch(self, window: int, redrawn: Redrawn = ()) -> int:
        """Complete passes over every source that takes part, before a window."""
        before = self.draws_before(window, redrawn)
        return min(
            int(n) // order.num_samples for n, order, full in zip(before, self.orders, self._full) if full
        )


class OnePass:
    """Every sample of every source once, in the order of the data sets: for validation. Rejected slots stay empty."""

    def __init__(self, counts: Sequence[np.ndarray], *, seed: int):
        """`counts`: samples per shard of each source."""
        self.seed = seed
        self._source = np.concatenate([np.full(len(c), s) for s, c in enumerate(counts)])
        self._shard = np.concatenate([np.arange(len(c)) for c in counts])
        self._starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self.num_windows: int | None = -(-self.num_samples // SLOTS)

    def num_slots(self, window: int) -> int:
        """SLOTS, fewer in the last window."""
        return min(SLOTS, self.num_samples - window * SLOTS)

    def slots(self, window: int, redrawn: Redrawn = ()) -> Slots:
        """The samples of a window, in the order of the data sets."""
        places = np.arange(window * SLOTS, window * SLOTS + self.num_slots(window))
        position = np.searchsorted(self._starts, places, side="right") - 1
        key = slot_keys(self.seed, window, SLOTS)[: len(places)]
        return Slots(self._source[position], self._shard[position], places - self._starts[position], key)

    def redraw(self, window: int, source: np.ndarray, *, redrawn: Redrawn, attempt: int) -> None:
        """Nothing takes the place of a sample."""

    def epoch(self, window: int, redrawn: Redrawn = ()) -> int:
        """0 until all windows are read, then 1."""
        return int(window >= (self.num_windows or 0))
