"""Runs shards in worker processes that may die: of a damaged picture, of memory, of a killed parent.

Worker w of W takes shards w, w + W, ... of the task. A worker killed by its own decoder (segmentation fault
and the like) is started again without the record it died on; a worker whose parent is gone stops by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from data_prep.job import Job, ShardBuilder
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.shards import ShardReport

CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
MAX_CRASHES = 100
POLL_S = 0.2
STOP_TIMEOUT_S = 30
STOPPED = 75
"""Exit code after SIGTERM or SIGUSR1: start me again."""


class WorkerDied(Exception):
    """A worker was killed from outside (most often by a lack of memory) or failed in an unforeseen way."""


class Stopped(Exception):
    """The scheduler asked to stop; what is finished stays."""


@dataclass
class _Worker:
    shards: list[int]
    process: Any
    reports: Connection
    record: Any
    """Shared number of the input record being worked on, -1 between records."""


def run_shards(
    job: Job,
    shards: Sequence[int],
    *,
    num_workers: int,
    retry: bool,
    on_report: Callable[[ShardReport], None],
) -> None:
    """Build the shards, calling `on_report` for each as it is finished.

    Raises UserError from a worker, Stopped after SIGTERM or SIGUSR1, and WorkerDied when a worker died for
    another reason than a crash of a decoder.
    """
    if num_workers == 0:
        builder = ShardBuilder(job)
        for shard in shards:
            on_report(builder.build(shard, retry=retry))
        return
    with _StopSignals() as stop:
        started = [_start(job, list(shards[first::num_workers]), retry) for first in range(num_workers)]
        workers = [worker for worker in started if worker]
        try:
            _supervise(job, workers, stop, retry, on_report)
        finally:
            for worker in workers:
                if worker.process.is_alive():
                    worker.process.terminate()
            for worker in workers:
                worker.process.join(timeout=STOP_TIMEOUT_S)
                if worker.process.is_alive():  # stuck in one record; a killed shard is simply made again
                    worker.process.kill()
                    worker.process.join()


def _supervise(
    job: Job,
    workers: list[_Worker],
    stop: _StopSignals,
    retry: bool,
    on_report: Callable[[ShardReport], None],
) -> None:
    crashed: set[int] = set()
    active: dict[Any, _Worker] = {worker.reports: worker for worker in workers}
    while active:
        if stop.is_requested:
            raise Stopped
        for connection in wait(list(active), timeout=POLL_S):
            worker = active[connection]
            try:
                message = worker.reports.recv()
            except EOFError:
                del active[connection]
                worker.process.join()
                if again := _after_exit(job, worker, crashed, retry):
                    workers.append(again)
                    active[again.reports] = again
                continue
            if isinstance(message, Exception):
                raise message
            worker.shards.remove(int(message.name))
            on_report(message)


def _after_exit(job: Job, worker: _Worker, crashed: set[int], retry: bool) -> _Worker | None:
    """Start a crashed worker again on its remaining shards, without the record it died on."""
    code = worker.process.exitcode
    if code == 0:
        return None
    if code == STOPPED:
        raise Stopped
    record = int(worker.record.value)
    if code >= 0 or -code not in CRASH_SIGNALS or record < 0:
        raise WorkerDied(
            f"a worker ended with exit code {code} at input record {record}; run the build again"
        )
    crashed.add(record)
    get_logger(__name__).warning("input record %d killed a worker (signal %d); it is dropped", record, -code)
    if len(crashed) > MAX_CRASHES:
        raise WorkerDied(f"{len(crashed)} input records killed a worker; the last is {record}")
    return _start(replace(job, crashed=job.crashed | crashed), worker.shards, retry)


def _start(job: Job, shards: list[int], retry: bool) -> _Worker | None:
    if not shards:
        return None
    context = multiprocessing.get_context(
        "fork"
    )  # sources may hold anything: nothing is pickled on the way in
    receiver, sender = context.Pipe(duplex=False)
    record = context.Value("q", -1, lock=False)
    process = context.Process(target=_work, args=(job, shards, retry, sender, record, os.getpid()))
    process.start()
    sender.close()
    return _Worker(list(shards), process, receiver, record)


def _work(job: Job, shards: list[int], retry: bool, sender: Connection, record: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = _StopSignals()
    stop.__enter__()

    def on_record(number: int) -> None:
        record.value = number
        if stop.is_requested or os.getppid() != parent:
            raise SystemExit(STOPPED)

    builder = ShardBuilder(job, on_record=on_record)
    try:
        for shard in shards:
            report = builder.build(shard, retry=retry)
            record.value = -1
            sender.send(report)
    except (UserError, OSError) as error:
        sender.send(UserError(str(error)))


class _StopSignals:
    """SIGTERM and SIGUSR1 (sent by SLURM before the time limit) set a mark that is looked at between records.

    Raising from the handler instead would now and then be lost: Python swallows exceptions in callbacks after
    a fork and in finalisers.
    """

    def __init__(self) -> None:
        self.is_requested = False

    def __enter__(self) -> _StopSignals:
        self._old = {number: signal.signal(number, self._mark) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _mark(self, number: int, frame: Any) -> None:
        self.is_requested = True
