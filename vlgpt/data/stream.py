"""Positions -> batches: which rows of the stream a rank and a worker take, and what was met while reading
them.

Global batch number b is the next `micro_batch * world_size` rows of the stream; rank r takes every
world_size-th of them, worker w the batches `w, w + num_workers, ...`. Nothing here depends on how the run
was cut into ranks, workers or micro-batches before: everything follows from the position.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from vlgpt.batch import Batch, ConditionBatch
from vlgpt.data.collate import collate_conditions, collate_rows
from vlgpt.data.mixture import Redrawn, SlotPlan, Slots
from vlgpt.data.packing import Packer, WindowPlan
from vlgpt.data.samples import ConditionLoader, LoadedCondition, LoadedSequence, Place, SequenceLoader
from vlgpt.data.sources import OpenSource, feature_dtype
from vlgpt.shards import BadSample


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

    def make(
        self, rows: Sequence[Position | None], guard: Guard
    ) -> tuple[Batch | ConditionBatch, Report]: ...


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


def deliveries(
    maker: Maker,
    start: Position,
    *,
    micro_batch: int,
    rank: int,
    world_size: int,
    guard: Guard,
    worker: int = 0,
    num_workers: int = 1,
) -> Iterator[Delivery]:
    """The batches of one worker of one rank, from the global batch at `start`: `worker, worker +
    num_workers, ...`.
    """
    size = micro_batch * world_size
    position = advance(start, worker * size, maker)
    while maker.plan.num_windows is None or position.window < maker.plan.num_windows:
        rows = rows_of_rank(position, maker, micro_batch=micro_batch, rank=rank, world_size=world_size)
        batch, report = maker.make(rows, guard)
        end = advance(position, size, maker)
        yield Delivery(batch, end, report)
        position = advance(end, (num_workers - 1) * size, maker)


Loaded = TypeVar("Loaded", LoadedSequence, LoadedCondition)


def _load(
    place: Place,
    load: Callable[[Place], Loaded],
    guard: Guard,
    report: Report,
    sources: Sequence[OpenSource],
) -> Loaded | None:
    """A sample, or None when it is bad: the report says why."""
    guard.enter(place)
    try:
        if guard.is_poisoned(place):
            raise sources[place.source].bad("killed_worker", place.shard, place.sample)
        loaded = load(place)
    except BadSample as error:
        report.outcomes.append((place.source, BadRecord(place.source, error.reason, error.key, error.shard)))
        return None
    report.outcomes.append((place.source, None))
    return loaded


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

    def make(self, rows: Sequence[Position | None], guard: Guard) -> tuple[Batch, Report]:
        """A bad sample's place in its row is left out: the others of the row, and all positions, stay as
        planned.
        """
        report, loaded_rows = Report(), []
        for row in rows:
            loaded_rows.append([] if row is None else self._load_row(row, guard, report))
        report.num_positions = len(rows) * self.sequence_length
        report.num_windows_planned, report.planning_ms = (
            len(self.packer.planned_ms),
            sum(self.packer.planned_ms),
        )
        self.packer.planned_ms.clear()
        batch = collate_rows(
            loaded_rows,
            sequence_length=self.sequence_length,
            kind=self.loader.kind,
            num_visual=self.loader.num_visual,
        )
        return batch, report

    def places(self, row: Position) -> list[Place]:
        """Where the documents of a row lie, in the order in which they stand."""
        window = self.window(row)
        return [_place(window.slots, slot) for slot in window.row(row.row)]

    def _load_row(self, row: Position, guard: Guard, report: Report) -> list[LoadedSequence]:
        if row.row == 0:
            report.rejected.update(self.window(row).rejected)
        sequences = []
        for place in self.places(row):
            loaded = _load(place, self.loader.load, guard, report, self.loader.sources)
            if loaded is not None:
                sequences.append(loaded)
                report.tokens[loaded.source] += len(loaded.sequence.token_ids)
                report.num_dropped_images += loaded.num_dropped_images
        return sequences


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

    def make(self, rows: Sequence[Position | None], guard: Guard) -> tuple[ConditionBatch, Report]:
        """A bad sample leaves a masked slot: `is_valid` is False there."""
        report, samples = Report(), []
        start_s, num_planned = time.perf_counter(), self._slots.cache_info().misses
        places = [None if row is None else self.places(row)[0] for row in rows]
        report.planning_ms = (time.perf_counter() - start_s) * 1000
        report.num_windows_planned = self._slots.cache_info().misses - num_planned
        for place in places:
            samples.append(
                None if place is None else _load(place, self.loader.load, guard, report, self.loader.sources)
            )
        return collate_conditions(samples, shapes=self._shapes), report
