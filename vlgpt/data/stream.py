"""Positions -> batches: which rows of the stream a rank and a worker take, and what was met while reading
them.

Global batch number b is the next `micro_batch * world_size` rows of the stream; rank r takes every
world_size-th of them, worker w the batches `w, w + num_workers, ...`. Nothing here depends on how the run
was cut into ranks, workers or micro-batches before: everything follows from the position.

A batch is made in two acts. Its draft comes from texts alone and says what targets the batch will have; its images are
read when it is finished. So a whole step can be counted before its first image is decoded, and nobody has to hold the
images of a step. The price: an image that turns out bad takes its sample's loss away but not its targets out of the
count, so the other samples of that step weigh what they would have weighed with it.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlgpt.batch import Batch, ConditionBatch
from vlgpt.data.collate import collate_conditions, collate_rows, collate_texts
from vlgpt.data.mixture import Redrawn, SlotPlan, Slots
from vlgpt.data.packing import Packer, WindowPlan
from vlgpt.data.samples import ConditionLoader, Place, SequenceLoader
from vlgpt.data.sources import OpenSource, feature_dtype
from vlgpt.shards import BadSample

POSITION_BYTES = 24  # of a packed row: six arrays
SAMPLE_BYTES = 4  # of an image stage beside its arrays: source, two masks

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
class BadRecord:
    """One sample that could not be used."""

    source: int
    reason: str
    key: str
    shard: str


@dataclass
class Report:
    """What happened while a batch was made. Sums over ranks and workers count everything exactly once."""

    outcomes: list[tuple[int, BadRecord | None]] = field(
        default_factory=list
    )  # (source, None = good), in order
    tokens: Counter[int] = field(default_factory=Counter)  # source -> positions filled
    num_positions: int = 0  # positions of the rows, padding included; 0 without packing
    num_dropped_images: int = 0
    rejected: Counter[tuple[int, str]] = field(
        default_factory=Counter
    )  # draws of the windows whose first row is here
    num_windows_planned: int = 0
    planning_ms: float = 0.0


@dataclass
class Draft:
    """A batch before its images are read: the samples of every row, each with its place, or what is bad about it."""

    rows: list[list[tuple[Place, Any] | BadRecord]]
    report: Report


@dataclass(frozen=True)
class Delivery:
    """A batch of one rank, and the position after its global batch."""

    batch: Batch | ConditionBatch
    end: Position
    report: Report


class Guard(Protocol):
    """Told before a sample is touched; says which samples killed a worker before."""

    def enter(self, place: Place) -> None: ...

    def is_poisoned(self, place: Place) -> bool: ...


class Maker(Protocol):
    """Makes batches out of rows of the stream; None stands for a row after the end of a finite pass."""

    plan: SlotPlan

    def num_rows(self, position: Position) -> int: ...

    def next_window(self, position: Position) -> Position: ...

    def places(self, row: Position) -> list[Place]: ...

    def draft(self, rows: Sequence[Position | None], guard: Guard) -> Draft: ...

    def without_images(self, draft: Draft) -> Batch | ConditionBatch: ...

    def finish(self, draft: Draft, guard: Guard) -> tuple[Batch | ConditionBatch, Report]: ...

    def max_bytes(self, num_rows: int) -> int: ...


def advance(position: Position, num_rows: int, maker: Maker) -> Position:
    """The position `num_rows` rows later; at the end of a finite pass it stops."""
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
    rows: list[Position | None] = []
    at = advance(position, rank, maker)
    for _ in range(micro_batch):
        rows.append(
            None if maker.plan.num_windows is not None and at.window >= maker.plan.num_windows else at
        )
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
    """The batches of one worker of one rank, from the global batch at `start`: `worker, worker + num_workers, ...`;
    each as its rows and the position after its global batch.
    """
    size = micro_batch * world_size
    position = advance(start, worker * size, maker)
    while maker.plan.num_windows is None or position.window < maker.plan.num_windows:
        end = advance(position, size, maker)
        yield rows_of_rank(position, maker, micro_batch=micro_batch, rank=rank, world_size=world_size), end
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
        self._drafts: deque[tuple[Draft, Position]] = deque()
        self._targets: deque[Targets] = deque()

    def _draft(self) -> bool:
        """One more; False at the end of a finite pass."""
        if (batch := next(self._batches, None)) is None:
            return False
        rows, end = batch
        draft = self._maker.draft(rows, self._guard)
        self._drafts.append((draft, end))
        if self._count_targets is not None:
            self._targets.append(self._count_targets(self._maker.without_images(draft)))
        return True

    def targets(self, num_batches: int) -> list[Targets]:
        """Of the next batches after those that were asked for before, wherever the iteration stands. Raises ValueError
        when nothing counts.
        """
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


def _attempt(place: Place, act: Callable[[], Any], guard: Guard, sources: Sequence[OpenSource]) -> Any:
    """What an act on a sample gives, or a BadRecord that says why it is bad."""
    guard.enter(place)
    try:
        if guard.is_poisoned(place):
            raise sources[place.source].bad("killed_worker", place.shard, place.sample)
        return act()
    except BadSample as error:
        return BadRecord(place.source, error.reason, error.key, error.shard)


def _read(
    place: Place, loader: SequenceLoader | ConditionLoader, guard: Guard
) -> tuple[Place, Any] | BadRecord:
    """A sample without its images."""
    found = _attempt(place, lambda: loader.read(place), guard, loader.sources)
    return found if isinstance(found, BadRecord) else (place, found)


def _with_images(
    sample: tuple[Place, Any] | BadRecord,
    loader: SequenceLoader | ConditionLoader,
    guard: Guard,
    report: Report,
) -> Any:
    """A sample of a draft with its images, or None when it is bad: the report says why."""
    if not isinstance(sample, BadRecord):
        place, loaded = sample
        found = _attempt(place, lambda: loader.with_images(place, loaded), guard, loader.sources)
        if not isinstance(found, BadRecord):
            report.outcomes.append((place.source, None))
            return found
        sample = found
    report.outcomes.append((sample.source, sample))
    return None


def _place(slots: Slots, slot: int) -> Place:
    return Place(
        int(slots.source[slot]), int(slots.shard[slot]), int(slots.sample[slot]), int(slots.key[slot])
    )


class RowMaker:
    """Packed rows of token sequences."""

    def __init__(self, packer: Packer, loader: SequenceLoader, *, sequence_length: int):
        self.packer, self.loader, self.sequence_length = packer, loader, sequence_length
        self.plan = packer.plan

    def window(self, position: Position) -> WindowPlan:
        """The window that a position lies in. Raises UserError when a source gives hardly any sequence."""
        return self.packer.window(position.window, position.redrawn)

    def num_rows(self, position: Position) -> int:
        return self.window(position).num_rows

    def next_window(self, position: Position) -> Position:
        return Position(position.window + 1, 0, self.window(position).redrawn)

    def draft(self, rows: Sequence[Position | None], guard: Guard) -> Draft:
        """The texts of a batch."""
        report = Report(num_positions=len(rows) * self.sequence_length)
        for row in rows:
            if row is not None and row.row == 0:
                report.rejected.update(self.window(row).rejected)
        places = [[] if row is None else self.places(row) for row in rows]
        report.num_windows_planned, report.planning_ms = (
            len(self.packer.planned_ms),
            sum(self.packer.planned_ms),
        )
        self.packer.planned_ms.clear()
        return Draft([[_read(place, self.loader, guard) for place in row] for row in places], report)

    def without_images(self, draft: Draft) -> Batch:
        rows = [[sample[1] for sample in row if not isinstance(sample, BadRecord)] for row in draft.rows]
        return collate_texts(rows, sequence_length=self.sequence_length, num_visual=self.loader.num_visual)

    def finish(self, draft: Draft, guard: Guard) -> tuple[Batch, Report]:
        """A bad sample's place in its row is left out: the others of the row, and all positions, stay as
        planned.
        """
        report, rows = draft.report, []
        for row in draft.rows:
            found = [_with_images(sample, self.loader, guard, report) for sample in row]
            rows.append([loaded for loaded in found if loaded is not None])
        for loaded in chain.from_iterable(rows):
            report.tokens[loaded.source] += len(loaded.sequence.token_ids)
            report.num_dropped_images += loaded.num_dropped_images
        batch = collate_rows(
            rows,
            sequence_length=self.sequence_length,
            kind=self.loader.kind,
            num_visual=self.loader.num_visual,
        )
        return batch, report

    def max_bytes(self, num_rows: int) -> int:
        """Of a batch whose rows hold nothing but images."""
        num_images = self.sequence_length // self.loader.image_length
        return num_rows * (POSITION_BYTES * self.sequence_length + num_images * self.loader.image_bytes)

    def places(self, row: Position) -> list[Place]:
        """Where the documents of a row lie, in the order in which they stand."""
        window = self.window(row)
        return [_place(window.slots, slot) for slot in window.row(row.row)]


class ConditionMaker:
    """Batches of single images with their conditions."""

    def __init__(self, plan: SlotPlan, loader: ConditionLoader):
        self.plan, self.loader = plan, loader
        self._slots = lru_cache(maxsize=4)(plan.slots)
        settings = loader.settings
        self._shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: (loader.sources[0].features[name].spec.shape, feature_dtype(loader.sources, name))
            for name in settings.features
        }
        if settings.pixels:
            side = settings.image_size_px
            self._shapes["pixels"] = (side, side, 3), np.dtype(np.uint8)

    def num_rows(self, position: Position) -> int:
        return self.plan.num_slots(position.window)

    def next_window(self, position: Position) -> Position:
        return Position(position.window + 1)

    def places(self, row: Position) -> list[Place]:
        """Where the sample of a slot lies."""
        return [_place(self._slots(row.window), row.row)]

    def draft(self, rows: Sequence[Position | None], guard: Guard) -> Draft:
        """The captions of a batch."""
        start_s, num_planned = time.perf_counter(), self._slots.cache_info().misses
        places = [[] if row is None else self.places(row) for row in rows]
        planning_ms = (time.perf_counter() - start_s) * 1000
        num_planned = self._slots.cache_info().misses - num_planned
        report = Report(num_windows_planned=num_planned, planning_ms=planning_ms)
        return Draft([[_read(place, self.loader, guard) for place in row] for row in places], report)

    def without_images(self, draft: Draft) -> ConditionBatch:
        rows = [[sample[1] for sample in row if not isinstance(sample, BadRecord)] for row in draft.rows]
        return collate_conditions([row[0] if row else None for row in rows], shapes={})

    def finish(self, draft: Draft, guard: Guard) -> tuple[ConditionBatch, Report]:
        """A bad sample leaves a masked slot: `is_valid` is False there."""
        rows = [
            [_with_images(sample, self.loader, guard, draft.report) for sample in row] for row in draft.rows
        ]
        slots = [row[0] if row else None for row in rows]
        return collate_conditions(slots, shapes=self._shapes), draft.report

    def max_bytes(self, num_rows: int) -> int:
        """Of a batch."""
        arrays = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes.values())
        return num_rows * (SAMPLE_BYTES + arrays)
