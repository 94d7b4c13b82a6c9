"""Worker processes that make batches: in order, bounded, watched, and replaced once when one of them dies.

Every worker has its own pipe, so that the death of one (a decoder's segmentation fault, the kernel's
out-of-memory killer) can tear nothing of the others. What it was reading is on a board in shared memory:
that sample is blamed, put aside, and the new worker continues at the batch that is due.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # registers how tensors travel between processes
from torch import Tensor

from vlgpt.data.samples import Place
from vlgpt.data.stream import Delivery, Position
from vlgpt.log import UserError, get_logger

MAX_POISONED = 64
MAX_INLINE_BYTES = 1 << 18  # smaller tensors travel inside the message, larger ones in shared memory
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


Produce = Callable[[Position, int, WorkerGuard], Iterator[Delivery]]
"""(start, first batch after it, guard) -> every num_workers-th delivery."""


class _Worker:
    """A process, its pipe, the permits that bound how far it runs ahead, and a file for its stacks.

    It starts with one permit; its first batch tells how many fit into `max_bytes`.
    """

    def __init__(
        self,
        number: int,
        *,
        produce: Produce,
        start: Position,
        first: int,
        num_ahead: int,
        max_bytes: int,
        board: Board,
    ):
        context = ForkContext()
        self.number = number
        self.permits = context.Semaphore(1)
        self._num_ahead, self._max_bytes, self._is_first = num_ahead, max_bytes, True
        self.connection, child = context.Pipe(duplex=False)
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.process = context.Process(
            target=_work,
            args=(number, child, self.permits, self.stacks, produce, start, first, board, os.getpid()),
            daemon=True,
            name=f"vlgpt-data-{number}",
        )
        self.process.start()
        child.close()

    def receive(self, timeout_s: float) -> tuple[str, Any] | None:
        """The next message; None after `timeout_s`. Raises EOFError when the worker is dead."""
        ready = wait([self.connection, self.process.sentinel], timeout_s)
        if not ready:
            return None
        if self.connection not in ready and not self.connection.poll(0):
            raise EOFError
        try:
            message = self.connection.recv()
        except (OSError, EOFError) as error:  # its tensors or its pipe died with it
            raise EOFError from error
        for _ in range(self._more_permits(message[1]) + 1):
            self.permits.release()
        return message

    def _more_permits(self, content: Any) -> int:
        """What the size of the first batch allows beyond the one permit of the start."""
        if not self._is_first:
            return 0
        self._is_first = False
        return min(self._num_ahead, max(1, self._max_bytes // max(1, _num_bytes(content)))) - 1

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
        self.stacks.close()


class WorkerPool:
    """Deliveries of all workers in the order of the stream.

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
        watchdog_s: float,
        on_death: Callable[[int, Place | None], None],
    ):
        self._produce, self._position, self._watchdog_s, self._on_death = produce, start, watchdog_s, on_death
        self._num_ahead = max(1, -(-prefetch_batches // num_workers))
        self._max_bytes = prefetch_bytes // num_workers
        self._board = Board(num_workers)
        self._restarted: set[int] = set()
        self._next = 0
        self._workers = [self._start(number, first=number) for number in range(num_workers)]
        # workers ignore SIGTERM, which multiprocessing would send, and wait for, when the interpreter ends
        self.close = Finalize(self, _close_all, args=(self._workers,), exitpriority=10)

    def _start(self, number: int, *, first: int) -> _Worker:
        return _Worker(
            number,
            produce=self._produce,
            start=self._position,
            first=first,
            num_ahead=self._num_ahead,
            max_bytes=self._max_bytes,
            board=self._board,
        )

    def __iter__(self) -> Iterator[Delivery]:
        while True:
            number = self._next % len(self._workers)
            kind, content = self._receive(number)
            if kind == "end":
                return
            if kind == "user_error":
                raise UserError(content)
            if kind == "error":
                raise RuntimeError(f"data worker {number} failed:\n{content}")
            delivery = _unpack(content)
            self._position, self._next = delivery.end, self._next + 1
            yield delivery

    def _receive(self, number: int) -> tuple[str, Any]:
        deadline_s = time.monotonic() + self._watchdog_s
        while True:
            try:
                message = self._workers[number].receive(deadline_s - time.monotonic())
            except EOFError:
                self._replace(number)
                continue
            if message is not None:
                return message
            self._stalled(number)

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
        self._workers[number] = self._start(number, first=0)

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


def _work(
    number: int,
    connection: Connection,
    permits: Any,
    stacks: Any,
    produce: Produce,
    start: Position,
    first: int,
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
    try:
        for delivery in produce(start, first, WorkerGuard(board, number)):
            board.mark(number, None)
            while not permits.acquire(timeout=2):
                if os.getppid() != parent:
                    return
            connection.send(("batch", _pack(delivery)))
        connection.send(("end", None))
    except (UserError, FileNotFoundError) as error:
        connection.send(("user_error", str(error)))
    except BrokenPipeError:
        return
    except Exception:  # a bug: its traceback is raised again in the parent
        connection.send(("error", traceback.format_exc()))
    while os.getppid() == parent:  # tensors in flight are served by this process until it is killed
        time.sleep(1)


class _Inline:
    """A small tensor on its way."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def ndim(self) -> int:
        return self.array.ndim


def _pack(value: Any) -> Any:
    """Replace small tensors of a dataclass: a message part is far cheaper than a shared memory segment
    each.
    """
    if isinstance(value, Tensor):
        return _Inline(value.numpy()) if value.nbytes <= MAX_INLINE_BYTES else value
    return _map_fields(value, _pack)


def _unpack(value: Any) -> Any:
    if isinstance(value, _Inline):
        return torch.from_numpy(value.array)
    return _map_fields(value, _unpack)


def _num_bytes(value: Any) -> int:
    """Bytes of all tensors of a dataclass."""
    if isinstance(value, _Inline):
        return value.array.nbytes
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_num_bytes(getattr(value, f.name)) for f in fields(value))
    return 0


def _map_fields(value: Any, function: Callable[[Any], Any]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: function(getattr(value, f.name)) for f in fields(value)})
    return value
