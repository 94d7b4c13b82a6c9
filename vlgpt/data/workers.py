"""Worker processes that make batches: in order, bounded, watched, and replaced once when one of them dies.

A worker obeys orders, one after the other: count the targets of its next batches, or finish the next one into a buffer
that is free (`buffers.py`). As many batches are ready as there are buffers, however many micro-batches a step has; what
a step needs of all of them beforehand is a few numbers each.

Each worker notes in shared memory which sample it reads. When it dies, that sample is blamed and never read again, and
a new worker continues at the batch that is due. A buffer is read only after the message that it is full, so what
a killed worker was writing is never seen.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.util import Finalize
from typing import IO

import numpy as np
import torch

from vlgpt.data.buffers import Buffers, num_buffers
from vlgpt.data.samples import Place
from vlgpt.data.stream import Delivery, Position, Production, Targets
from vlgpt.log import get_logger
from vlgpt.processes import Channel, Mark, Worker
from vlgpt.settings import DataSettings

MAX_POISONED = 64


class DataStalled(RuntimeError):
    """No batch came for `watchdog_s`; the stacks of all threads are in the log."""


class PoisonedSamples:
    """Shared memory with the samples that killed a worker: no worker reads them again. Made before the workers."""

    def __init__(self) -> None:
        table = np.frombuffer(mmap.mmap(-1, (1 + MAX_POISONED) * 3 * 8), dtype=np.int64).reshape(-1, 3)
        self._count, self._places = table[0], table[1:]

    def add(self, place: Place) -> None:
        """Never read this sample again; of more than MAX_POISONED the oldest are forgotten."""
        count = int(self._count[0])
        self._places[count % MAX_POISONED] = (place.source, place.shard, place.sample)
        self._count[0] = count + 1

    def __contains__(self, place: Place) -> bool:
        count = int(self._count[0])
        if count == 0:
            return False
        known = self._places[: min(count, MAX_POISONED)]
        return bool((known == (place.source, place.shard, place.sample)).all(axis=1).any())


class WorkerGuard:
    """What one worker tells of the sample it reads, and which samples it must not read."""

    def __init__(self, mark: Mark | None = None, poisoned: PoisonedSamples | None = None):
        self._mark, self._poisoned = mark or Mark(3), poisoned or PoisonedSamples()

    def enter(self, place: Place) -> None:
        """This sample is read from now on."""
        self._mark.set((place.source, place.shard, place.sample))

    def is_poisoned(self, place: Place) -> bool:
        """Whether this sample killed a worker."""
        return place in self._poisoned


Produce = Callable[[Position, int, WorkerGuard], Production]
"""(start, first batch after it, guard) -> every num_workers-th batch."""


class _DataWorker(Worker):
    """A worker with its buffers, the batches that it has made, and a file for its stacks.

    `num_ahead` of its batches are counted before they are finished; the first `num_known` were, by a worker before it.
    """

    def __init__(
        self,
        number: int,
        work: Callable[[Mark, IO[bytes], Channel], None],
        *,
        buffers: Buffers,
        num_ahead: int,
        num_known: int,
    ):
        self.number, self.buffers, self._is_counting = number, buffers, num_ahead > 0
        self.made: deque[tuple[int, Delivery] | None] = deque()  # received, but not yet due
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._mark = Mark(3)
        super().__init__(partial(work, self._mark, self.stacks), name=f"data worker {number}")
        if num_ahead > num_known:
            self.order(("count", num_ahead - num_known))
        for buffer in range(buffers.count):
            self.order(("finish", buffer))

    def take(self, buffer: int, content: Delivery, *, pin_memory: bool) -> Delivery:
        """A finished batch out of its buffer, which the next but a few will fill."""
        delivery: Delivery = self.buffers.take(content, pin_memory=pin_memory)
        if self._is_counting:
            self.order(("count", 1))
        self.order(("finish", buffer))
        return delivery

    def reading(self) -> Place | None:
        """The sample that it reads now, or died on."""
        marked = self._mark.get()
        if marked is None:
            return None
        source, shard, sample = marked
        return Place(source, shard, sample, key=0)

    def dump_stacks(self) -> str:
        """The stacks of all its threads: now, or where it crashed."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        self.stacks.seek(0)
        found = self.stacks.read().decode(errors="replace")
        return f"worker {self.number} (pid {self.process.pid}):\n{found}"

    def close(self) -> None:
        """Workers hold nothing worth saving, so they are simply killed."""
        self.stop(0)
        self.stacks.close()


class WorkerPool:
    """Deliveries of all workers in the order of the stream.

    Args:
        batch_bytes: of the largest batch; with the settings' limits on what is prepared ahead it decides the number of
            buffers.
        num_ahead: how many batches' targets are asked for before the batches themselves; 0 = none.
        pin_memory: deliver tensors from which CUDA can copy asynchronously.
    Raises, while iterating, UserError from a worker, DataStalled, and RuntimeError when a worker dies again.
    """

    def __init__(
        self,
        produce: Produce,
        *,
        start: Position,
        settings: DataSettings,
        batch_bytes: int,
        on_death: Callable[[int, Place | None], None],
        num_ahead: int = 0,
        pin_memory: bool = False,
    ):
        self._produce, self._position, self._on_death = produce, start, on_death
        self._watchdog_s, num_workers = settings.watchdog_s, settings.num_workers
        self._pin_memory, self._max_asked_ahead = pin_memory, num_ahead
        count = num_buffers(settings, batch_bytes=batch_bytes)
        # a count is ordered before the batches that the buffers hold are finished, so it is there when it is asked for
        self._num_ahead = -(-num_ahead // num_workers) + count if num_ahead else 0
        self._poisoned = PoisonedSamples()
        self._restarted: set[int] = set()
        self._num_taken, self._num_counted = 0, 0
        self._targets: list[deque[Targets]] = [deque() for _ in range(num_workers)]
        self._workers: list[_DataWorker] = []
        for number in range(num_workers):
            self._workers.append(self._start(number, Buffers(count, batch_bytes=batch_bytes), num_known=0))
        # workers ignore SIGTERM, which multiprocessing would send, and wait for, when the interpreter ends
        self.close = Finalize(self, _close_all, args=(self._workers,), exitpriority=10)

    def _start(self, number: int, buffers: Buffers, *, num_known: int) -> _DataWorker:
        first = (number - self._num_taken) % len(self._targets)
        produce = partial(self._produce, self._position, first)
        work = partial(_work, produce, self._poisoned, buffers, num_known)
        return _DataWorker(number, work, buffers=buffers, num_ahead=self._num_ahead, num_known=num_known)

    def targets(self, num_batches: int) -> list[Targets]:
        """Targets of the next batches, after those asked for before. Raises ValueError for more than `num_ahead`."""
        if self._num_counted + num_batches > self._num_taken + self._max_asked_ahead:
            raise ValueError(
                f"targets of {num_batches} batches are asked for, but no more than {self._max_asked_ahead} are counted "
                "ahead of the batches themselves"
            )
        found = []
        for _ in range(num_batches):
            number = self._num_counted % len(self._workers)
            while not self._targets[number]:
                self._receive(number)
            found.append(self._targets[number].popleft())
            self._num_counted += 1
        return found

    def __iter__(self) -> Iterator[Delivery]:
        while True:
            number = self._num_taken % len(self._workers)
            while not self._workers[number].made:
                self._receive(number)  # may put another worker in its place
            worker = self._workers[number]
            if (made := worker.made.popleft()) is None:
                return
            delivery = worker.take(*made, pin_memory=self._pin_memory)
            self._position, self._num_taken = delivery.end, self._num_taken + 1
            yield delivery

    def _receive(self, number: int) -> None:
        """The next message of a worker, put where it belongs."""
        deadline_s = time.monotonic() + self._watchdog_s
        while True:
            try:
                message = self._workers[number].receive(deadline_s - time.monotonic())
            except EOFError:
                self._replace(number)
                continue
            if message is not None:
                break
            self._stalled(number)
        kind, content = message
        if kind == "targets":
            self._targets[number].extend(content)
        else:
            self._workers[number].made.append(content)

    def _replace(self, number: int) -> None:
        worker = self._workers[number]
        place, exit_code, stacks = worker.reading(), worker.exit_code(), worker.dump_stacks()
        worker.close()
        self._on_death(number, place)
        if number in self._restarted:
            raise RuntimeError(
                f"data worker {number} died again (exit code {exit_code}): a worker is restarted once; the samples "
                "it was reading are in the quarantine file"
            )
        get_logger(__name__).warning("exit code %s, restarted once; its stacks:\n%s", exit_code, stacks)
        self._restarted.add(number)
        if place is not None:
            self._poisoned.add(place)
        self._workers[number] = self._start(number, worker.buffers, num_known=self._num_known(number))

    def _num_known(self, number: int) -> int:
        """Batches of a worker that were counted and are not yet taken."""
        if not self._num_ahead:
            return 0
        num_asked, num_taken = (
            len(range(number, total, len(self._workers))) for total in (self._num_counted, self._num_taken)
        )
        return num_asked + len(self._targets[number]) - num_taken

    def _stalled(self, number: int) -> None:
        stacks = "\n".join(worker.dump_stacks() for worker in self._workers)
        get_logger(__name__).error(
            "no batch for %.0f s, waiting for worker %d\n%s", self._watchdog_s, number, stacks
        )
        raise DataStalled(
            f"data worker {number} gave no batch for {self._watchdog_s:.0f} s (data.watchdog_s) while reading "
            f"{self._workers[number].reading()}; the stacks of all workers are in the log"
        )


def _close_all(workers: list[_DataWorker]) -> None:
    for worker in workers:
        worker.close()


def _work(
    produce: Callable[[WorkerGuard], Production],
    poisoned: PoisonedSamples,
    buffers: Buffers,
    num_known: int,
    mark: Mark,
    stacks: IO[bytes],
    channel: Channel,
) -> None:
    """What a worker does until it is killed. It ignores signals that schedulers send to the whole job."""
    for ignored in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    production = produce(WorkerGuard(mark, poisoned))
    if num_known:
        production.targets(num_known)
    deliveries = iter(production)
    while True:
        what, amount = channel.next_order()
        if what == "count":
            # one by one: each message is a sign of life
            for _ in range(amount):
                channel.send(("targets", production.targets(1)))
            mark.set(None)
            continue
        delivery = next(deliveries, None)
        # what happens from here on is no sample's fault
        mark.set(None)
        channel.send(("batch", None if delivery is None else (amount, buffers.put(amount, delivery))))
