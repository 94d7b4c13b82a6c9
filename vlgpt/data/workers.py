"""Worker processes that make batches: in order, bounded, watched, and replaced once when one of them dies.

A worker does what it is ordered to, one order after the other: count the targets of its next batches, or finish the
next one into a buffer that is free (`buffers.py`). As many batches are ready as there are buffers, however many
micro-batches a step has; what a step needs of all of them beforehand is a few numbers each.

Every worker has its own pipes, so that the death of one (a decoder's segmentation fault, the kernel's
out-of-memory killer) can tear nothing of the others. What it was reading is on a board in shared memory:
that sample is blamed, put aside, and the new worker continues at the batch that is due. A buffer is read only after
the message that it is full, so nobody sees what a killed worker was writing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch

from vlgpt.data.buffers import Buffers, num_buffers
from vlgpt.data.samples import Place
from vlgpt.data.stream import Delivery, Position, Production, Targets
from vlgpt.errors import UserError
from vlgpt.log import get_logger

MAX_POISONED = 64
_IDLE = -1


class DataStalled(RuntimeError):
    """No batch came for `watchdog_s`; the stacks of all threads are in the log."""


class Board:
    """Shared memory: what every worker reads right now, and the samples that killed one."""

    def __init__(self, num_workers: int):
        num_rows = max(num_workers, 1) + 1 + MAX_POISONED
        self._memory = mmap.mmap(-1, num_rows * 3 * 8)
        table = np.frombuffer(self._memory, dtype=np.int64).reshape(num_rows, 3)
        self._marks, self._count, self._poisoned = (
            table[: -1 - MAX_POISONED],
            table[-1 - MAX_POISONED],
            table[-MAX_POISONED:],
        )
        self._marks[:] = _IDLE

    def mark(self, worker: int, place: Place | None) -> None:
        """Worker `worker` reads this sample now (None: none)."""
        self._marks[worker] = (_IDLE, 0, 0) if place is None else (place.source, place.shard, place.sample)

    def marked(self, worker: int) -> Place | None:
        source, shard, sample = (int(value) for value in self._marks[worker])
        return None if source == _IDLE else Place(source, shard, sample, 0)

    def poison(self, place: Place) -> None:
        """Never read this sample again."""
        count = int(self._count[0])
        self._poisoned[count % MAX_POISONED] = (place.source, place.shard, place.sample)
        self._count[0] = count + 1

    def is_poisoned(self, place: Place) -> bool:
        count = int(self._count[0])
        if count == 0:
            return False
        known = self._poisoned[: min(count, MAX_POISONED)]
        return bool((known == (place.source, place.shard, place.sample)).all(axis=1).any())


class WorkerGuard:
    """The board as one worker sees it."""

    def __init__(self, board: Board, worker: int):
        self._board, self._worker = board, worker

    def enter(self, place: Place) -> None:
        self._board.mark(self._worker, place)

    def is_poisoned(self, place: Place) -> bool:
        return self._board.is_poisoned(place)


Produce = Callable[[Position, int, WorkerGuard], Production]
"""(start, first batch after it, guard) -> every num_workers-th batch."""


class _Worker:
    """A process, a pipe for orders and one for what it made, its buffers, and a file for its stacks.

    `num_ahead` of its batches are counted before they are finished; the first `num_known` were, by a worker before it.
    """

    def __init__(
        self,
        number: int,
        *,
        produce: Produce,
        start: Position,
        first: int,
        buffers: Buffers,
        num_ahead: int,
        num_known: int,
        board: Board,
    ):
        context = ForkContext()
        self.number, self.buffers, self._is_counting = number, buffers, num_ahead > 0
        self.made: deque[Any] = deque()  # received, but not yet due
        self.connection, child = context.Pipe(duplex=False)
        orders, self._orders = context.Pipe(duplex=False)
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = context.Process(
            target=_work,
            args=(
                number,
                child,
                orders,
                self.stacks,
                produce,
                start,
                first,
                buffers,
                num_known,
                board,
                os.getpid(),
            ),
            daemon=True,
            name=f"vlgpt-data-{number}",
        )
        self.process.start()
        child.close()
        orders.close()
        if num_ahead > num_known:
            self._order("count", num_ahead - num_known)
        for buffer in range(buffers.count):
            self._order("finish", buffer)

    def _order(self, what: str, number: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, which `receive` tells
            self._orders.send((what, number))

    def take(self, buffer: int, content: Any, *, pin_memory: bool) -> Delivery:
        """A finished batch out of its buffer, which the next but a few will fill."""
        delivery = self.buffers.take(content, pin_memory=pin_memory)
        if self._is_counting:
            self._order("count", 1)
        self._order("finish", buffer)
        return delivery

    def receive(self, timeout_s: float) -> tuple[str, Any] | None:
        """The next message; None after `timeout_s`. Raises EOFError when the worker is dead."""
        ready = wait([self.connection, self.process.sentinel], timeout_s)
        if not ready:
            return None
        if self.connection not in ready and not self.connection.poll(0):
            raise EOFError
        try:
            return self.connection.recv()
        except OSError as error:  # its pipe died with it
            raise EOFError from error

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
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._orders.close()
        self.stacks.close()


class WorkerPool:
    """Deliveries of all workers in the order of the stream.

    Args:
        batch_bytes: of the largest batch; with the limits on what is prepared ahead it decides the number of buffers.
        num_ahead: how many batches' targets are asked for before the batches themselves; 0 = none.
        pin_memory: deliver tensors from which CUDA can copy asynchronously.
    Raises (while iterating) UserError from a worker, DataStalled, and RuntimeError when a worker dies twice.
    """

    def __init__(
        self,
        produce: Produce,
        *,
        start: Position,
        num_workers: int,
        prefetch_batches: int,
        prefetch_bytes: int,
        batch_bytes: int,
        watchdog_s: float,
        on_death: Callable[[int, Place | None], None],
        num_ahead: int = 0,
        pin_memory: bool = False,
    ):
        self._produce, self._position, self._watchdog_s, self._on_death = produce, start, watchdog_s, on_death
        self._pin_memory, self._max_asked_ahead = pin_memory, num_ahead
        count = num_buffers(
            prefetch_batches=prefetch_batches,
            prefetch_bytes=prefetch_bytes,
            num_workers=num_workers,
            batch_bytes=batch_bytes,
        )
        # a count is ordered before the batches that the buffers hold are finished, so it is there when it is asked for
        self._num_ahead = -(-num_ahead // num_workers) + count if num_ahead else 0
        self._board = Board(num_workers)
        self._restarted: set[int] = set()
        self._num_taken, self._num_counted = 0, 0
        self._targets: list[deque[Targets]] = [deque() for _ in range(num_workers)]
        self._workers: list[_Worker] = []
        for number in range(num_workers):
            self._workers.append(self._start(number, Buffers(count, batch_bytes=batch_bytes), num_known=0))
        # workers ignore SIGTERM, which multiprocessing would send, and wait for, when the interpreter ends
        self.close = Finalize(self, _close_all, args=(self._workers,), exitpriority=10)

    def _start(self, number: int, buffers: Buffers, *, num_known: int) -> _Worker:
        return _Worker(
            number,
            produce=self._produce,
            start=self._position,
            first=(number - self._num_taken) % len(self._targets),
            buffers=buffers,
            num_ahead=self._num_ahead,
            num_known=num_known,
            board=self._board,
        )

    def targets(self, num_batches: int) -> list[Targets]:
        """Of the next batches after those that were asked for before. Raises ValueError for more than `num_ahead`
        before the batches themselves.
        """
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
        if kind == "user_error":
            raise UserError(content)
        if kind == "error":
            raise RuntimeError(f"data worker {number} failed:\n{content}")
        if kind == "targets":
            self._targets[number].extend(content)
        else:
            self._workers[number].made.append(content)

    def _replace(self, number: int) -> None:
        worker, place = self._workers[number], self._board.marked(number)
        worker.process.join(5)
        exit_code, stacks = worker.process.exitcode, worker.dump_stacks()
        worker.close()
        self._on_death(number, place)
        if number in self._restarted:
            raise RuntimeError(
                f"data worker {number} died again (exit code {exit_code}): a worker is restarted once; the "
                f"samples it "
                "was reading are in the quarantine file"
            )
        get_logger(__name__).warning("exit code %s, restarted once; its stacks:\n%s", exit_code, stacks)
        self._restarted.add(number)
        if place is not None:
            self._board.poison(place)
        self._board.mark(number, None)
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
        reading = self._board.marked(number)
        raise DataStalled(
            f"data worker {number} gave no batch for {self._watchdog_s:.0f} s (data.watchdog_s) while "
            f"reading {reading}; "
            "the stacks of all workers are in the log"
        )


def _close_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()


def _die_with(parent: int) -> None:
    """End this process soon after its trainer, whatever it is doing.

    A trainer that is killed closes no pipe that its other workers hold too: a worker that waits for one would wait
    forever.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(
    number: int,
    connection: Connection,
    orders: Connection,
    stacks: Any,
    produce: Produce,
    start: Position,
    first: int,
    buffers: Buffers,
    num_known: int,
    board: Board,
    parent: int,
) -> None:
    """A worker's life. It outlives signals that schedulers send to the whole job, but not its parent."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    faulthandler.enable(file=stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    try:
        production = produce(start, first, WorkerGuard(board, number))
        if num_known:
            production.targets(num_known)
        deliveries = iter(production)
        while True:
            what, amount = orders.recv()
            if what == "count":
                for _ in range(amount):  # one by one: signs of life
                    connection.send(("targets", production.targets(1)))
                board.mark(number, None)
                continue
            delivery = next(deliveries, None)
            board.mark(number, None)  # whatever happens from here on is no sample's fault
            stored = None if delivery is None else (amount, buffers.put(amount, delivery))
            connection.send(("batch", stored))
    except (UserError, FileNotFoundError) as error:
        connection.send(("user_error", str(error)))
    except (BrokenPipeError, EOFError):  # the trainer is gone
        return
    except Exception:  # a bug: its traceback is raised again in the parent
        connection.send(("error", traceback.format_exc()))
