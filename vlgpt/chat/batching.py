"""A bounded queue in front of the model: waiting requests of equal settings are answered as one batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from vlgpt.chat.reply import Failed, Request, answer
from vlgpt.decoding.generator import Generator
from vlgpt.log import get_logger

logger = get_logger("chat")


class QueueFull(Exception):
    """No more requests are taken; `retry_after_s` estimates when there will be room."""

    def __init__(self, num_waiting: int, retry_after_s: int):
        super().__init__(f"{num_waiting} requests are waiting: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ShuttingDown(Exception):
    """The queue is closed."""


class Batcher:
    """One thread that decodes, and the requests that wait for it.

    The oldest request goes first and takes with it up to `max_batch` - 1 later ones of equal settings. Replies depend
    on no other request of a batch (a law of `Generator`), so batching is invisible but for speed.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        max_batch: int = 8,
        max_waiting: int = 32,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.generator, self.max_batch, self.max_waiting = generator, max_batch, max_waiting
        self._on_batch = on_batch
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._batch_s = 1.0  # moving average
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def submit(self, request: Request) -> None:
        """Put a request in the queue; its `emit` gets one last event in any case.

        Raises QueueFull when `max_waiting` requests wait already, ShuttingDown after `close`.
        """
        with self._changed:
            if self._is_closed:
                raise ShuttingDown("the server is shutting down")
            if len(self._waiting) >= self.max_waiting:
                self._drop_dead()
            if len(self._waiting) >= self.max_waiting:
                num_batches = 1 + len(self._waiting) / self.max_batch
                raise QueueFull(len(self._waiting), max(1, round(num_batches * self._batch_s)))
            self._waiting.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Fail what waits, cancel what runs, end the thread."""
        self._refuse(Failed("unavailable", "the server is shutting down"))
        self._thread.join(timeout=60)

    def _refuse(self, failed: Failed) -> None:
        """Take nothing more; what waits fails, what runs is cancelled."""
        with self._changed:
            self._is_closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            for request in self._running:
                request.cancel()
            self._changed.notify()
        for request in waiting:
            request.emit(failed)

    def _drop_dead(self) -> None:
        """Cancelled and late requests make room for new ones."""
        dead = [request for request in self._waiting if request.failure is not None]
        for request in dead:
            self._waiting.remove(request)
            failure = request.failure
            assert failure is not None
            request.emit(failure)

    def _take(self) -> list[Request] | None:
        """The next batch; waits for one. None when the queue is closed."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            key = self._waiting[0].batch_key
            batch = [r for r in self._waiting if r.batch_key == key][: self.max_batch]
            for request in batch:
                self._waiting.remove(request)
            self._running = batch
            return batch

    def _work(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """Wait for a batch and answer it; nothing of it is held afterwards. False when that was the last one."""
        batch = self._take()
        if batch is None:
            return False
        start = time.monotonic()
        answer(self.generator, batch)
        with self._changed:
            self._running = []
        seconds = time.monotonic() - start
        self._batch_s += 0.2 * (seconds - self._batch_s)
        self._on_batch(len(batch), seconds)
        if not self.generator.is_device_alive:  # as after an assertion on a GPU
            logger.error("the device is lost: no more requests are taken, restart the process")
            self._refuse(Failed("unavailable", "the server has lost its device"))
            return False
        return True
