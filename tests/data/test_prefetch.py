"""Laws of how far data workers run ahead of the trainer."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlgpt.data.buffers import Buffers
from vlgpt.data.stream import Draft, Position, Production, Report
from vlgpt.data.workers import WorkerPool
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings, SourceSettings

BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Tensors:
    pixels: Tensor


class CountingMaker:
    """Makes batches of zeros and counts them, in memory that the worker shares with the test."""

    def __init__(self) -> None:
        self.made = np.frombuffer(mmap.mmap(-1, 16), dtype=np.int64)  # drafts, batches

    def draft(self, rows: Any, guard: Any) -> Draft:
        self.made[0] += 1
        return Draft([], Report())

    def without_images(self, draft: Draft) -> None:
        return None

    def finish(self, draft: Draft, guard: Any) -> tuple[Tensors, Report]:
        self.made[1] += 1
        return Tensors(torch.zeros(BATCH_BYTES, dtype=torch.uint8)), draft.report


def made_ahead(at_least: tuple[int, int], *, num_ahead: int = 0, **limits: int) -> tuple[int, int]:
    """How many drafts and batches one worker makes while the trainer holds the first two batches; waits until there are
    `at_least` as many.
    """
    maker: Any = CountingMaker()

    def produce(start: Position, first: int, guard: Any) -> Production:
        return Production(maker, repeat(([], start)), guard, count_targets=lambda batch: {"text": 1.0})

    source = SourceSettings(name="s", path="p")
    pool = WorkerPool(
        produce,
        start=Position(),
        settings=DataSettings(sources=(source,), num_workers=1, watchdog_s=60.0, **limits),  # type: ignore[arg-type]
        batch_bytes=BATCH_BYTES,
        on_death=lambda worker, place: None,
        num_ahead=num_ahead,
    )
    batches: Iterator[Any] = iter(pool)
    pool.targets(num_ahead)
    next(batches), next(batches)
    deadline_s = time.monotonic() + 200
    while any(maker.made < np.array(at_least) + 2) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.3)  # would it go on?
    pool.close()
    drafts, finished = maker.made.tolist()
    return drafts - 2, finished - 2


@pytest.mark.parametrize(
    ("num_batches", "num_megabytes", "wanted"), [(2, 100, 2), (8, 100, 8), (8, 3, 3), (8, 1, 1)]
)
def test_workers_run_ahead_by_batches_and_by_bytes(num_batches: int, num_megabytes: int, wanted: int) -> None:
    limits = {"prefetch_batches": num_batches, "prefetch_bytes": num_megabytes << 20}
    assert made_ahead((wanted, wanted), **limits) == (wanted, wanted)


@pytest.mark.parametrize("num_ahead", [1, 64])
def test_however_many_batches_are_counted_ahead_no_more_are_finished(num_ahead: int) -> None:
    limits = {"prefetch_batches": 3, "prefetch_bytes": 100 << 20}
    wanted = (num_ahead + 3, 3)
    assert made_ahead(wanted, num_ahead=num_ahead, **limits) == wanted


def test_batches_for_which_there_is_no_memory_are_refused_with_their_size() -> None:
    with pytest.raises(UserError, match=r"2 batches of up to 562949953\.4 MB .*data\.prefetch_batches"):
        Buffers(2, batch_bytes=1 << 49)


def test_a_batch_that_does_not_fit_is_never_written_into_the_next_buffer() -> None:
    buffers = Buffers(2, batch_bytes=1000)
    kept = buffers.put(1, Tensors(torch.ones(1000, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="does not fit"):
        buffers.put(0, Tensors(torch.zeros(4000, dtype=torch.uint8)))
    assert buffers.take(kept, pin_memory=False).pixels.sum() == 1000
