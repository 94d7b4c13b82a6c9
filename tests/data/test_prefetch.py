"""Laws of how far data workers run ahead of the trainer."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlgpt.data.stream import Delivery, Position
from vlgpt.data.workers import WorkerPool

BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Tensors:
    pixels: Tensor


def produced_ahead(*, prefetch_batches: int, prefetch_bytes: int, at_least: int) -> int:
    """How many batches one worker makes while the trainer holds the first two; waits until it made `at_least`."""
    made = np.frombuffer(mmap.mmap(-1, 8), dtype=np.int64)  # shared with the worker

    def produce(start: Position, first: int, guard: Any) -> Iterator[Any]:
        while True:
            made[0] += 1
            yield Delivery(Tensors(torch.zeros(BATCH_BYTES, dtype=torch.uint8)), start, None)  # type: ignore[arg-type]

    options: dict[str, Any] = {"watchdog_s": 60.0, "on_death": lambda worker, place: None}
    limits = {"prefetch_batches": prefetch_batches, "prefetch_bytes": prefetch_bytes}
    pool = WorkerPool(produce, start=Position(), num_workers=1, **limits, **options)
    batches = iter(pool)
    next(batches), next(batches)
    deadline_s = time.monotonic() + 200
    while made[0] < at_least + 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.3)  # would it go on?
    pool.close()
    return int(made[0]) - 2


@pytest.mark.parametrize(
    ("num_batches", "num_megabytes", "wanted"), [(2, 100, 2), (8, 100, 8), (8, 3, 3), (8, 1, 1)]
)
def test_workers_run_ahead_by_batches_and_by_bytes(num_batches: int, num_megabytes: int, wanted: int) -> None:
    wanted += 1  # one more waits in the worker's hands
    limits = {"prefetch_batches": num_batches, "prefetch_bytes": num_megabytes << 20}
    assert produced_ahead(**limits, at_least=wanted) == wanted
