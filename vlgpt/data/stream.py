"""Positions -> batches: which rows of the stream a rank and a worker take, and what was met while reading them.

Global batch number b is the next `micro_batch * world_size` rows of the stream; rank r takes every world_size-th of
them, worker w the batches `w, w + num_workers, ...`. Nothing here depends on how the run was cut into ranks, workers or
micro-batches before: everything follows from the position.

A batch is made in two steps. Its draft comes from texts alone and says what targets the batch will have; its images are
read when it is finished. So all micro-batches of an optimizer step can be counted before the first image is decoded,
and no process holds the images of a whole step. The price: an image that turns out bad takes its sample's loss away but
not its targets out of the count, so the other samples of that step weigh what they would have weighed with it.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vlgpt.batch import Batch, ConditionBatch
from vlgpt.data.collate import collate_conditions, collate_rows, collate_texts
from vlgpt.data.mixture import Redrawn, SlotPlan, Slots
from vlgpt.data.packing import Packer, WindowPlan
from vlgpt.data.samples import ConditionLoader, LoadedSequence, Place, SequenceLoader
from vlgpt.data.sources import feature_dtype
from vlgpt.shards import BadSample

POSITION_BYTES = 24  # of a packed row: six arrays
SAMPLE_BYTES = 4  # of an image stage beside its arrays: source, two masks

T = TypeVar("T")
# The samples of every row that could be read: `LoadedSequence` or, at most one in a row, `LoadedCondition`.
Loaded = Sequence[Sequence[Any]]
Targets = Mapping[str, float]
"""Number of targets per term of the loss."""
CountTargets = Callable[[Any], Targets]
"""A batch without images -> its targets: `Stage.count_targets`."""


class Position(NamedTuple):
    """A place between two rows of the stream; without packing every slot is a row, and nothing is redrawn."""

    window: int = 0
    row: int = 0
    redrawn: Redrawn = ()  # before the window


@dataclass(frozen=True)
class SkippedSample:
    """One sample that could not be used."""

    source: int
    reason: str
    key: str
    shard: str


@dataclass
class Report:
    """What happened while a batch was made. Sums over ranks and workers count everything exactly once."""

    # (source, None = good), in order
    outcomes: list[tuple[int, SkippedSample | None]] = field(default_factory=list)
    # source -> positions filled
    tokens: Counter[int] = field(default_factory=Counter)
    # positions of the rows, padding included; 0 without packing
    num_positions: int = 0
    num_dropped_images: int = 0
    # (source, reason) -> draws of the windows whose first row is here
    rejected: Counter[tuple[int, str]] = field(default_factory=Counter)
    num_windows_planned: int = 0
    planning_ms: float = 0.0


@dataclass
class Draft:
    """A batch before its images are read: the samples of every row, each with its place, or what is bad about it."""

    rows: list[list[tuple[Place, Any] | SkippedSample]]
    report: Report


@dataclass(frozen=True)
class Delivery:
    """A batch of one rank, and the position after its global batch."""

    batch: Batch | ConditionBatch
    end: Position
    report: Report


class Guard(Protocol):
    """Told before a sample is touched; says which samples killed a worker before."""

    def enter(self, place: Place) -> None:
        """Mark this sample as being read, so that the trainer knows it when it kills the worker."""

    def is_poisoned(self, place: Place) -> bool:
        """Whether reading this sample killed a worker before, so that it must be left out."""


class Maker(ABC):
    """Makes batches out of rows of the stream; None stands for a row after the end of a finite pass."""

    plan: SlotPlan
    loader: SequenceLoader | ConditionLoader
    planned_ms: list[float]  # one entry per window that was planned since the last draft

    @abstractmethod
    def num_rows(self, position: Position) -> int:
        """Rows of the window that a position is in."""

    @abstractmethod
    def next_window(self, position: Position) -> Position:
        """The first position of the next window."""

    @abstractmethod
    def places(self, row: Position) -> list[Place]:
        """Where the samples of a row are stored, in their order."""

    @abstractmethod
    def max_bytes(self, num_rows: int) -> int:
        """Bytes of the largest possible batch."""

    @abstractmethod
    def collate(self, rows: Loaded, *, with_images: bool) -> Batch | ConditionBatch:
        """A batch of the samples that could be read."""

    @abstractmethod
    def describe(self, rows: Sequence[Position | None], report: Report) -> None:
        """Add to the report what follows from the rows alone."""

    def draft(self, rows: Sequence[Position | None], guard: Guard) -> Draft:
        """The texts of a batch."""
        places = [[] if row is None else self.places(row) for row in rows]
        report = Report()
        self.describe(rows, report)
        report.num_windows_planned, report.planning_ms = len(self.planned_ms), sum(self.planned_ms)
        self.planned_ms.clear()
        return Draft([[self._read(place, guard) for place in row] for row in places], report)

    def without_images(self, draft: Draft) -> Batch | ConditionBatch:
        """The batch as far as its texts say."""
        rows = [[sample[1] for sample in row if not isinstance(sample, SkippedSample)] for row in draft.rows]
        return self.collate(rows, with_images=False)

    def finish(self, draft: Draft, guard: Guard) -> tuple[Batch | ConditionBatch, Report]:
        """The batch with its images; samples that are bad are left out, and the report says why."""
        report, rows = draft.report, []
        for row in draft.rows:
            found = [self._with_images(sample, guard, report) for sample in row]
            rows.append([loaded for loaded in found if loaded is not None])
        for loaded in chain.from_iterable(rows):
            if isinstance(loaded, LoadedSequence):
                report.tokens[loaded.source] += len(loaded.sequence.token_ids)
                report.num_dropped_images += loaded.num_dropped_images
        return self.collate(rows, with_images=True), report

    def _read(self, place: Place, guard: Guard) -> tuple[Place, Any] | SkippedSample:
        """A sample without its images."""
        found = self._attempt(place, lambda: self.loader.read(place), guard)
        return found if isinstance(found, SkippedSample) else (place, found)

    def _with_images(self, sample: tuple[Place, Any] | SkippedSample, guard: Guard, report: Report) -> Any:
        """A sample of a draft with its images, or None when it is bad."""
        if not isinstance(sample, SkippedSample):
            place, loaded = sample
            found = self._attempt(place, lambda: self.loader.with_images(place, loaded), guard)
            if not isinstance(found, SkippedSample):
                report.outcomes.append((place.source, None))
                return found
            sample = found
        report.outcomes.append((sample.source, sample))
        return None

    def _attempt(self, place: Place, act: Callable[[], T], guard: Guard) -> T | SkippedSample:
        """What an act on a sample gives, or why the sample is bad."""
        # Noted before the sample is touched: if its decoder kills the process, the pool knows which sample to blame.
        guard.enter(place)
        try:
            if guard.is_poisoned(place):
                raise self.loader.sources[place.source].bad("killed_worker", place.shard, place.sample)
            return act()
        except BadSample as error:
            return SkippedSample(place.source, error.reason, error.key, error.shard)


def advance(position: Position, num_rows: int, maker: Maker) -> Position:
    """The position `num_rows` rows later; at the end of a finite pass it stops."""
    # Window by window, since how many rows a window has is known only once it is planned. Windows are cached, and a
    # batch rarely spans more than two.
    row = position.row + num_rows
    while maker.plan.num_windows is None or position.window < maker.plan.num_windows:
        if row < (size := maker.num_rows(position)):
            return position._replace(row=row)
        position, row = maker.next_window(position), row - size
    return position._replace(row=0)


def rows_of_rank(
    position: Position, maker: Maker, *, micro_batch: int, rank: int, world_size: int
) -> list[Position | None]:
    """The rows that a rank takes of the global batch at `position`; None after the end of a finite pass."""
    # Dealt like cards: rank r takes rows r, r + world_size, ... So the global batch holds the same rows for any number
    # of ranks, which is what lets a run resume on another number.
    rows: list[Position | None] = []
    at = advance(position, rank, maker)
    for _ in range(micro_batch):
        is_over = maker.plan.num_windows is not None and at.window >= maker.plan.num_windows
        rows.append(None if is_over else at)
        at = advance(at, world_size, maker)
    return rows


def batches_of_worker(
    maker: Maker,
    start: Position,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[tuple[list[Position | None], Position]]:
    """Every `num_workers`-th batch of one rank, from number `worker` after `start` on: its rows, and where it ends."""
    size = micro_batch * world_size
    position = advance(start, worker * size, maker)
    while maker.plan.num_windows is None or position.window < maker.plan.num_windows:
        end = advance(position, size, maker)
        yield rows_of_rank(position, maker, micro_batch=micro_batch, rank=rank, world_size=world_size), end
        # Passing over the batches of the others plans their windows too, 20 to 50 ms each (docs/loader.md).
        position = advance(end, (num_workers - 1) * size, maker)


class Production:
    """Batches in order, drafted as far ahead as their targets are asked for."""

    def __init__(
        self,
        maker: Maker,
        batches: Iterator[tuple[list[Position | None], Position]],
        guard: Guard,
        *,
        count_targets: CountTargets | None = None,
    ):
        self._maker, self._batches, self._guard, self._count_targets = maker, batches, guard, count_targets
        # Two queues, since they are emptied apart: targets a whole step at a time, drafts one by one.
        self._drafts: deque[tuple[Draft, Position]] = deque()
        self._targets: deque[Targets] = deque()

    def _draft(self) -> bool:
        """One more; False at the end of a finite pass."""
        if (batch := next(self._batches, None)) is None:
            return False
        # Only texts are read here: drafting a step of hundreds of micro-batches ahead holds no image in memory.
        rows, end = batch
        draft = self._maker.draft(rows, self._guard)
        self._drafts.append((draft, end))
        if self._count_targets is not None:
            self._targets.append(self._count_targets(self._maker.without_images(draft)))
        return True

    def targets(self, num_batches: int) -> list[Targets]:
        """Targets of the next batches, after those asked for before. Raises ValueError when nothing counts."""
        if self._count_targets is None:
            raise ValueError("targets are asked for too late: ask before the first batch is taken")
        while len(self._targets) < num_batches and self._draft():
            pass
        return [self._targets.popleft() for _ in range(min(num_batches, len(self._targets)))]

    def __iter__(self) -> Iterator[Delivery]:
        while self._drafts or self._draft():
            draft, end = self._drafts.popleft()
            batch, report = self._maker.finish(draft, self._guard)
            yield Delivery(batch, end, report)


def _place(slots: Slots, slot: int) -> Place:
    return Place(
        int(slots.source[slot]), int(slots.shard[slot]), int(slots.sample[slot]), int(slots.key[slot])
    )


class RowMaker(Maker):
    """Packed rows of token sequences. A bad sample is left out: the rest of its row, and all positions, stay."""

    loader: SequenceLoader

    def __init__(self, packer: Packer, loader: SequenceLoader, *, sequence_length: int):
        self.packer, self.loader, self.sequence_length = packer, loader, sequence_length
        self.plan, self.planned_ms = packer.plan, packer.planned_ms

    def window(self, position: Position) -> WindowPlan:
        """The window of a position. Raises UserError when a source gives hardly any sequence."""
        return self.packer.window(position.window, position.redrawn)

    def num_rows(self, position: Position) -> int:
        """Packed sequences of the window at `position`. Raises UserError when a source gives hardly any."""
        return self.window(position).num_rows

    def next_window(self, position: Position) -> Position:
        """First row of the next window, with the redraws so far counted."""
        return Position(position.window + 1, 0, self.window(position).redrawn)

    def places(self, row: Position) -> list[Place]:
        """Samples that are packed into a row, in sequence order."""
        window = self.window(row)
        return [_place(window.slots, slot) for slot in window.row(row.row)]

    def describe(self, rows: Sequence[Position | None], report: Report) -> None:
        """Add positions and, once for each window, its rejected documents to the report."""
        report.num_positions = len(rows) * self.sequence_length
        # The rank and worker that has the first row of a window reports its rejections: each is counted once.
        for row in rows:
            if row is not None and row.row == 0:
                report.rejected.update(self.window(row).rejected)

    def collate(self, rows: Loaded, *, with_images: bool) -> Batch:
        """A padded batch of the rows, (B, sequence_length) tokens.

        Without images, pixels and features are left out: the rest is enough to count targets.
        """
        shape = {"sequence_length": self.sequence_length, "num_visual": self.loader.num_visual}
        if not with_images:
            return collate_texts(rows, **shape)
        return collate_rows(rows, kind=self.loader.kind, **shape)

    def max_bytes(self, num_rows: int) -> int:
        """Of a batch whose rows hold nothing but images."""
        num_images = self.sequence_length // self.loader.image_length
        return num_rows * (POSITION_BYTES * self.sequence_length + num_images * self.loader.image_bytes)


class ConditionMaker(Maker):
    """Batches of single images with their conditions. A bad sample leaves a masked slot: `is_valid` is False there."""

    loader: ConditionLoader

    def __init__(self, plan: SlotPlan, loader: ConditionLoader):
        self.plan, self.loader, self.planned_ms = plan, loader, []
        self._slots = lru_cache(maxsize=4)(self._plan_window)
        settings = loader.settings
        self._shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: (loader.sources[0].features[name].spec.shape, feature_dtype(loader.sources, name))
            for name in settings.features
        }
        if settings.pixels:
            side = settings.image_size_px
            self._shapes["pixels"] = (side, side, 3), np.dtype(np.uint8)

    def _plan_window(self, window: int) -> Slots:
        start_s = time.perf_counter()
        slots = self.plan.slots(window)
        self.planned_ms.append((time.perf_counter() - start_s) * 1000)
        return slots

    def num_rows(self, position: Position) -> int:
        """Samples of the window at `position`: one row holds one sample."""
        return self.plan.num_slots(position.window)

    def next_window(self, position: Position) -> Position:
        """First row of the next window; image stages redraw nothing."""
        return Position(position.window + 1)

    def places(self, row: Position) -> list[Place]:
        """The one sample of a row."""
        return [_place(self._slots(row.window), row.row)]

    def describe(self, rows: Sequence[Position | None], report: Report) -> None:
        """Nothing: every slot is a row, none is padded or rejected."""

    def collate(self, rows: Loaded, *, with_images: bool) -> ConditionBatch:
        """A batch of one condition per row, its absent rows marked invalid; without images the arrays are left out."""
        shapes = self._shapes if with_images else {}
        return collate_conditions([row[0] if row else None for row in rows], shapes=shapes)

    def max_bytes(self, num_rows: int) -> int:
        """Upper bound of the memory of a batch, in bytes."""
        arrays = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes.values())
        return num_rows * (SAMPLE_BYTES + arrays)
