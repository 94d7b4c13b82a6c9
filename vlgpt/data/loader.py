"""The data loader of the training loop.

    loader = Loader(settings, kind="packed", micro_batch=4, rank=0, world_size=8, tokenizer=tokenizer)
    loader.load_state_dict(state)              # optional, before the first batch
    for batch in loader:                       # endless
        ...; loader.advance(1)                 # the trainer consumed it: this is what state_dict() remembers

A trainer that accumulates asks `loader.targets(num_micro_batches)` first: the targets of a whole step, before any of
its images is decoded. Then it takes one micro-batch after the other, so no step holds all of its images.

The order of samples is a pure function of (seed, data, position), see `mixture.py`. The state is a small JSON; it
resumes at any number of ranks, workers and rows per batch, in a time that does not depend on the position. Every source
gives exactly its share of the accepted sequences; samples that cannot be read leave holes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlgpt.batch import Batch, ConditionBatch
from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.mixture import SLOTS, count_windows
from vlgpt.data.packing import Packer, mean_length
from vlgpt.data.samples import ConditionLoader, Place, SequenceLoader
from vlgpt.data.sources import feature_specs, make_orders, make_plan, open_sources
from vlgpt.data.state import UNDRAWN_SCHEMA, LoaderState, check_state, make_state, position_of
from vlgpt.data.stream import (
    ConditionMaker,
    CountTargets,
    Maker,
    Position,
    Production,
    RowMaker,
    SkippedSample,
    Targets,
    batches_of_worker,
)
from vlgpt.data.tally import Tally, Waits
from vlgpt.data.workers import WorkerGuard, WorkerPool
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.settings import DataSettings
from vlgpt.shards import FeatureSpec
from vlgpt.tokens import DocumentTokenizer


class Loader:
    """Batches of one rank.

    Args:
        kind: `packed` gives `Batch` (language stages), `conditions` gives `ConditionBatch` (image stages).
        micro_batch: rows, or samples, per batch of this rank.
        run_positions: rows, or samples, that the whole run consumes over all ranks; needed when a source has a ramp.
        quarantine: JSONL file to which every bad sample is written once.
        is_one_pass: every sample of the sources once, in their order, dealt to ranks, then stop: for validation. The
            last batches are filled with empty rows or masked slots, so that all ranks get the same number.
        count_targets: a batch without images -> targets per term (`Stage.count_targets`); needed by `targets`.
        pin_memory: worker processes deliver tensors from which CUDA can copy asynchronously.
    Raises FileNotFoundError or UserError: missing or unsuitable data, settings that do not fit it.
    """

    def __init__(
        self,
        settings: DataSettings,
        *,
        kind: Literal["packed", "conditions"],
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        tokenizer: DocumentTokenizer | None = None,
        run_positions: int | None = None,
        quarantine: Path | None = None,
        is_one_pass: bool = False,
        count_targets: CountTargets | None = None,
        pin_memory: bool = False,
    ):
        if kind == "packed" and tokenizer is None:
            raise UserError("a loader of packed rows needs the tokenizer of the run")
        self.settings, self.kind, self.tokenizer = settings, kind, tokenizer
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.sources = open_sources(settings)
        self.source_names = tuple(source.name for source in self.sources)
        self._is_one_pass, self._count_targets, self._pin_memory = is_one_pass, count_targets, pin_memory
        self._assemblers = [
            Assembler(source.settings, tokenizer=tokenizer, sequence_length=settings.sequence_length)
            for source in self.sources
            if tokenizer is not None and kind == "packed"
        ]
        self._total_windows = self._count_windows(run_positions)
        self.position = Position()
        self.maker = self._make_maker()
        self._tally = Tally(
            self.source_names, max_bad_fraction=settings.max_bad_fraction, quarantine=quarantine, rank=rank
        )
        self._waits = Waits()
        # The position after every batch that was delivered and not yet reported as consumed.
        self._delivered: deque[Position] = deque()
        self._running: Iterator[Batch | ConditionBatch] | None = None
        self._source: Production | WorkerPool | None = None

    @property
    def feature_specs(self) -> dict[str, FeatureSpec]:
        """How the features that this loader reads were made."""
        return feature_specs(self.sources)

    # --- building

    def _lengths(self, source: int, shard: int) -> ShardLengths:
        assert self.tokenizer is not None
        return self.sources[source].lengths(shard, tokenizer=self.tokenizer)

    def _count_windows(self, run_positions: int | None) -> int | None:
        """Windows of the whole run, which ramps are measured in; None when there is no ramp."""
        if self._is_one_pass or run_positions is None:
            return None
        orders = make_orders(self.settings, self.sources)

        def length_of(s: int) -> float:
            return mean_length(orders[s], self._assemblers[s], partial(self._lengths, s))

        is_packed = self.kind == "packed" and self.settings.packing == "best_fit"
        return count_windows(
            self.settings, orders, run_positions=run_positions, mean_length=length_of if is_packed else None
        )

    def _make_maker(self) -> Maker:
        plan = make_plan(
            self.settings, self.sources, total_windows=self._total_windows, is_one_pass=self._is_one_pass
        )
        if self.kind == "conditions":
            return ConditionMaker(plan, ConditionLoader(self.sources, settings=self.settings))
        packer = Packer(
            plan,
            seed=self.settings.seed,
            assemblers=self._assemblers,
            lengths=self._lengths,
            packing=self.settings.packing,
            sequence_length=self.settings.sequence_length,
        )
        loader = SequenceLoader(self.sources, settings=self.settings, assemblers=self._assemblers)
        return RowMaker(packer, loader, sequence_length=self.settings.sequence_length)

    # --- iterating

    def __iter__(self) -> Iterator[Batch | ConditionBatch]:
        """Batches from the position that the trainer has consumed. A new iteration ends the one before."""
        # Batches that workers prepared and the trainer did not consume are dropped: `position` counts consumed ones.
        self.close()
        self._waits.restart()
        self._running = self._iterate()
        return self._running

    def __next__(self) -> Batch | ConditionBatch:
        """The next batch; starts an iteration when none runs."""
        return next(self._running if self._running is not None else iter(self))

    def targets(self, num_batches: int) -> list[Targets]:
        """Targets per term of each of the next batches, after those asked for before; ask before the first batch comes.

        A sample whose image turns out bad later is counted. Raises ValueError.
        """
        if self._count_targets is None:
            raise ValueError("this loader was made without `count_targets`")
        if self._running is None:
            iter(self)
        # How many batches are counted ahead decides the buffers of the workers, so they start at the first request.
        if self._source is None:
            self._source = self._start(num_ahead=num_batches)
        with self._waits.waiting():
            return self._source.targets(num_batches)

    def _iterate(self) -> Iterator[Batch | ConditionBatch]:
        if self._source is None:
            self._source = self._start()
        source = iter(self._source)
        while True:
            with self._waits.waiting():
                delivery = next(source, None)
            if delivery is None:
                return
            self._tally.add(delivery.report)
            self._delivered.append(delivery.end)
            self._waits.warn_when_slow(self.settings.num_workers)
            yield delivery.batch

    def _start(self, *, num_ahead: int = 0) -> Production | WorkerPool:
        """Begin to make batches at the position, here or in worker processes."""
        settings = self.settings
        # Without a request for targets nothing is counted: validation would pay for it and never ask.
        count_targets = self._count_targets if num_ahead else None

        def produce(start: Position, first: int, guard: WorkerGuard) -> Production:
            batches = batches_of_worker(
                self.maker,
                start,
                micro_batch=self.micro_batch,
                rank=self.rank,
                world_size=self.world_size,
                worker=first,
                num_workers=max(settings.num_workers, 1),
            )
            return Production(self.maker, batches, guard, count_targets=count_targets)

        if settings.num_workers == 0:
            return produce(self.position, 0, WorkerGuard())
        return WorkerPool(
            produce,
            start=self.position,
            settings=settings,
            batch_bytes=self.maker.max_bytes(self.micro_batch),
            on_death=self._on_death,
            num_ahead=num_ahead,
            pin_memory=self._pin_memory,
        )

    def _on_death(self, worker: int, place: Place | None) -> None:
        if place is not None:
            bad = self.sources[place.source].bad("killed_worker", place.shard, place.sample)
            self._tally.quarantine(SkippedSample(place.source, bad.reason, bad.key, bad.shard))
            get_logger(__name__).error("data worker %d died while reading %s", worker, bad)

    def close(self) -> None:
        """End the workers; the position stays."""
        if isinstance(self._source, WorkerPool):
            self._source.close()
        self._source, self._running = None, None
        self._delivered.clear()

    # --- the position

    def advance(self, num_micro_batches: int = 1) -> None:
        """The trainer consumed so many of the delivered batches, on all ranks. Raises ValueError for more than came."""
        if num_micro_batches > len(self._delivered):
            raise ValueError(
                f"advance({num_micro_batches}): only {len(self._delivered)} delivered batches are open"
            )
        for _ in range(num_micro_batches):
            self.position = self._delivered.popleft()

    def state_dict(self) -> LoaderState:
        """JSON of the position consumed by the trainer, equal on all ranks."""
        return make_state(
            self.settings,
            self.sources,
            kind=self.kind,
            position=self.position,
            epoch=self.maker.plan.epoch(self.position.window, self.position.redrawn),
            tokenizer="" if self.tokenizer is None else self.tokenizer.fingerprint,
            total_windows=self._total_windows,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of a saved state; the next iteration starts there.

        Raises UserError that names what changed, when it decides the order (the data, a setting, a law), unless
        `data.allow_data_change`.
        """
        self.close()
        check_state(state, self.state_dict(), self.sources, is_change_allowed=self.settings.allow_data_change)
        # A run that is made longer would otherwise stretch its ramps, and every window behind the position would
        # change.
        if state["total_windows"] != self._total_windows:
            get_logger(__name__).warning("ramps keep the run length that they were started with")
            self._total_windows = state["total_windows"]
            self.maker = self._make_maker()
        position = position_of(state, self.sources)
        if state["schema"] == UNDRAWN_SCHEMA and not self.settings.allow_data_change:
            self._refuse_moved_rows(position)
        self.position = position

    def _refuse_moved_rows(self, position: Position) -> None:
        """Rows of a window with rejected draws are no longer where they were when such slots stayed empty."""
        if isinstance(self.maker, RowMaker) and (rejected := self.maker.window(position).rejected):
            raise UserError(
                "the loader state was saved by a version that did not replace rejected documents, and around its "
                f"position some were rejected: {self._tally.by_source(rejected)}. Set data.allow_data_change=true to "
                f"go on from there (of the next {SLOTS} samples some may come twice or not at all)"
            )

    def statistics(self) -> dict[str, object]:
        """Counts of this rank since the loader was made, time waited for data, planning time per window."""
        skipped = {source.name: source.shards.skipped for source in self.sources if source.shards.skipped}
        return {**self._tally.statistics(), "skipped": skipped, **self._waits.statistics()}
