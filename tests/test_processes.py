"""Laws of worker processes: everything they make arrives, and every end is told apart."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from vlgpt.errors import UserError
from vlgpt.processes import Mark, Stopped, Worker, run_workers


def count(stop: int) -> Iterator[int]:
    yield from range(stop)


def refuse(error: Exception) -> Iterator[int]:
    yield 1
    raise error


def no_death(worker: int, exit_code: int) -> None:
    raise AssertionError(f"worker {worker} died with {exit_code}")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_everything_that_workers_yield_arrives_in_order(method):
    found: dict[int, list[int]] = {0: [], 1: []}
    works = [partial(count, 300), partial(count, 2)]
    run_workers(works, on_item=lambda w, item: found[w].append(item), on_death=no_death, method=method)
    assert found == {0: list(range(300)), 1: [0, 1]}


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [(UserError("wrong"), UserError, "^wrong$"), (ZeroDivisionError("a bug"), RuntimeError, "a bug")],
)
def test_errors_of_a_worker_are_raised_in_the_parent(error, raised, text):
    with pytest.raises(raised, match=text):
        run_workers([partial(refuse, error)], on_item=lambda worker, item: None, on_death=no_death)


def test_a_worker_that_dies_is_replaced_and_its_mark_tells_what_it_worked_on():
    mark, found, codes = Mark(2), [], []

    def die() -> Iterator[str]:
        yield "before"
        mark.set((3, 4))
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out

    def on_death(worker: int, exit_code: int) -> partial:
        codes.append(exit_code)
        return partial(iter, ["after"])

    run_workers([die], on_item=lambda worker, item: found.append(item), on_death=on_death)
    assert (found, codes, mark.get()) == (["before", "after"], [-signal.SIGKILL], (3, 4))


def test_a_stop_signal_ends_all_workers():
    def on_item(worker: int, item: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def endless() -> Iterator[int]:
        yield os.getpid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1000)

    with pytest.raises(Stopped) as stopped:
        run_workers([endless, endless], on_item=on_item, on_death=no_death)
    assert stopped.value.code == 75


ORPHAN = """
import os, sys, time
from vlgpt.processes import Worker
workers = [Worker(lambda channel: channel.next_order(), name=str(n)) for n in range(2)]
print(*(worker.process.pid for worker in workers), flush=True)
time.sleep(1000)
"""


def test_workers_end_soon_after_a_killed_parent():
    process = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 200
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_orders_reach_a_worker_and_a_dead_one_takes_none():
    def double(channel) -> None:
        while (order := channel.next_order()) is not None:
            channel.send(2 * order)

    worker = Worker(double, name="double")
    worker.order(4)
    assert worker.receive(200) == 8
    assert worker.receive(0) is None
    worker.order(None)
    with pytest.raises(EOFError):
        worker.receive(200)
    assert worker.exit_code() == 0
    worker.order(1)
    worker.stop(0)
