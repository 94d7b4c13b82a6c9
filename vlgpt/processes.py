"""Worker processes: pipes, the watch on the parent, stop signals, who is to blame for a crash, and array shares.

`Worker` is one process with pipes of its own, so that its death (a decoder's segmentation fault, the kernel's
out-of-memory killer) breaks nothing of the others. `run_workers` runs several of them to their end. The data loader
(`vlgpt/data/workers.py`), the build, the index and the features of data_prep use them; evaluation starts its ranks
with `run_ranks`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np

from vlgpt.errors import UserError

PARENT_POLL_S = 1.0
MESSAGE_POLL_S = 0.2
STOP_TIMEOUT_S = 30
# EX_TEMPFAIL of sysexits.h: a failure that is worth another try.
STOPPED = 75
"""Exit code after SIGTERM or SIGUSR1: start me again."""
_IDLE = -1


class Stopped(SystemExit):
    """The scheduler asked to stop; what is finished stays. Not caught, it ends the process with exit code 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@dataclass(frozen=True)
class Share:
    """Items `first, first + step, ...`: what one of `step` tasks or workers does. Raises UserError unless it is one
    of them. `flag` names the option in the message.
    """

    first: int = 0
    step: int = 1
    flag: str = "--task-index"

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.step:
            raise UserError(
                f"{self.flag} must be between 0 and {self.step - 1}, found {self.first}; SLURM arrays start at 0, and "
                "some tasks of N again are NUM_TASKS=N sbatch --array=3,5"
            )

    def of(self, total: int) -> range:
        """The numbers of this share among `total` items."""
        return range(self.first, total, self.step)

    def split(self, worker: int, num_workers: int) -> Share:
        """The part of worker `worker` of this share."""
        return Share(self.first + worker * self.step, self.step * num_workers)


WHOLE = Share()
"""All items: a single task."""


class Mark:
    """Shared memory in which a worker notes the numbers of what it works on, so that a crash can be blamed on it.

    It must be made before the process is forked.
    """

    def __init__(self, width: int):
        # Anonymous and shared: the parent reads it after the child was killed, and no file is left to clean up.
        self._values = np.frombuffer(mmap.mmap(-1, width * 8), dtype=np.int64)
        self.set(None)

    def set(self, numbers: Sequence[int] | None) -> None:
        """Work on this begins; None: on nothing in particular."""
        self._values[:] = _IDLE if numbers is None else numbers

    def get(self) -> tuple[int, ...] | None:
        """What the worker works on."""
        return None if self._values[0] == _IDLE else tuple(self._values.tolist())


class Channel:
    """The worker's side of the pipes."""

    def __init__(self, messages: Connection, orders: Connection):
        self._messages, self._orders = messages, orders

    def send(self, message: object) -> None:
        """Give something to the parent. Raises BrokenPipeError when it is gone."""
        self._messages.send(("message", message))

    def next_order(self) -> Any:
        """What the parent ordered next; waits for it. Raises EOFError when the parent is gone."""
        return self._orders.recv()

    def fail(self, kind: str, text: str) -> None:
        """Make `Worker.receive` raise."""
        self._messages.send((kind, text))


Work = Callable[[Channel], None]
Method = Literal["fork", "spawn"]


class Worker:
    """A process that does `work(channel)` and ends; it also ends, whatever it does, when its parent is gone.

    Args:
        method: `fork` pickles nothing on the way in; `spawn` survives CUDA and threads, and pickles `work`.
    """

    def __init__(self, work: Work, *, name: str, method: Method = "fork"):
        context = get_context(method)
        self.name = name
        self._messages, messages = context.Pipe(duplex=False)
        orders, self._orders = context.Pipe(duplex=False)
        self.process = context.Process(  # type: ignore[attr-defined]  # typeshed: BaseContext has no Process
            target=_run, args=(work, messages, orders, os.getpid()), daemon=True, name=name
        )
        self.process.start()
        # These ends belong to the child. A copy held here would keep the pipe open, and its death would go unnoticed.
        messages.close()
        orders.close()

    @property
    def connection(self) -> Connection:
        """For `multiprocessing.connection.wait`: ready when there is a message, or the process is dead."""
        return self._messages

    def order(self, order: object) -> None:
        """Give the worker something for `Channel.next_order`. A dead worker is noticed by `receive`."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.send(order)

    def receive(self, timeout_s: float) -> Any:
        """The next message; None after `timeout_s`.

        Raises EOFError when the process has ended, UserError that the work raised, and RuntimeError with the
        traceback of any other error.
        """
        ready = wait([self._messages, self.process.sentinel], timeout_s)
        if not ready:
            return None
        # A process may send and end at once: what is in the pipe comes before its end.
        if self._messages not in ready and not self._messages.poll(0):
            raise EOFError
        try:
            kind, content = self._messages.recv()
        except OSError as error:  # the pipe died with its process
            raise EOFError from error
        if kind == "user_error":
            raise UserError(content)
        if kind == "error":
            raise RuntimeError(f"{self.name} failed:\n{content}")
        return content

    def exit_code(self) -> int:
        """Of a process that has closed its pipe: waits for its end. Negative: the signal that killed it."""
        self.process.join()
        return self.process.exitcode or 0

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the process: SIGTERM, and SIGKILL after `timeout_s` (0: at once)."""
        if timeout_s and self.process.is_alive():
            self.process.terminate()
            self.process.join(timeout_s)
        self.process.kill()
        self.process.join()
        self._messages.close()
        self._orders.close()


def _run(work: Work, messages: Connection, orders: Connection, parent: int) -> None:
    """Run a worker. It ignores Ctrl-C, which reaches the whole process group: the parent decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    channel = Channel(messages, orders)
    with contextlib.suppress(BrokenPipeError, EOFError):  # the parent is gone
        try:
            work(channel)
        except (UserError, FileNotFoundError) as error:
            channel.fail("user_error", str(error))
        except (BrokenPipeError, EOFError):
            raise
        except Exception:  # a bug: its traceback is raised again in the parent
            channel.fail("error", traceback.format_exc())


def _end_with(parent: int) -> None:
    """End this process soon after its parent, whatever it is doing.

    EOF on a pipe would not tell: workers that were forked later hold the write end of its orders too, so a worker
    that waits for orders of a killed parent would wait forever.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


class StopSignals:
    """A context in which SIGTERM and SIGUSR1 (sent by SLURM before the time limit) set `is_requested`.

    Raising from the handler instead would sometimes be lost: Python swallows exceptions in callbacks after a fork
    and in finalisers.
    """

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> StopSignals:
        self._old = {number: signal.signal(number, self._mark) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True


def run_workers(
    works: Sequence[Callable[[], Iterable[object]]],
    *,
    on_item: Callable[[int, Any], None],
    on_death: Callable[[int, int], Callable[[], Iterable[object]] | None],
    method: Method = "fork",
) -> None:
    """Do all works, each in a process of its own, until the last one ends.

    Args:
        works: what they yield is sent to this process.
        on_item: called with (number of the work, item).
        on_death: called with (number of the work, exit code) when a process ends with another code than 0. It raises to
            end everything, or returns the work that another process is to do in its place (None: nothing).
    Raises UserError and RuntimeError from a worker, and Stopped after SIGTERM or SIGUSR1. The others are then stopped.
    """
    with StopSignals() as stop:
        workers: dict[int, Worker] = {}
        try:
            for number, work in enumerate(works):
                workers[number] = Worker(partial(_send_items, work), name=f"worker {number}", method=method)
            while workers:
                if stop.is_requested:
                    raise Stopped
                ready = wait([worker.connection for worker in workers.values()], timeout=MESSAGE_POLL_S)
                for number, worker in list(workers.items()):
                    if worker.connection not in ready:
                        continue
                    try:
                        on_item(number, worker.receive(0))
                    except EOFError:
                        code = worker.exit_code()
                        worker.stop(0)
                        del workers[number]
                        if code and (again := on_death(number, code)) is not None:
                            workers[number] = Worker(
                                partial(_send_items, again), name=worker.name, method=method
                            )
        finally:
            # All are asked before any is waited for, so that they end side by side.
            for worker in workers.values():
                worker.process.terminate()
            for worker in workers.values():
                worker.stop()


def _send_items(work: Callable[[], Iterable[object]], channel: Channel) -> None:
    for item in work():
        channel.send(item)


def run_ranks(module: str, arguments: Sequence[str], num_processes: int) -> int:
    """Run `python -m module ... --rank R` once per rank on this machine: -> the worst exit code."""
    command = [sys.executable, "-m", module, *arguments, "--rank"]
    children = [subprocess.Popen([*command, str(rank)]) for rank in range(num_processes)]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    # Of a rank that a signal killed it is negative: without `abs` that would count as better than success.
    return max(codes, key=abs)
