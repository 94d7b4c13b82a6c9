"""When no step ends in time: stacks of all threads to the log and to a file, then the process ends itself.

A lost rank leaves the others waiting inside a collective that may never return (NCCL), where no exception can be
raised. A thread watches the time since the last sign of life and ends the process, so that the launcher can restart.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path

from vlgpt.log import get_logger

EXIT_HANG = 72


class Watchdog:
    """Ends the process with exit code 72 when `beat` is not called for `timeout_s`.

    `folder` gets `heartbeat_rank_R.json` (step and time of the last sign of life) and, on a hang, `stacks_rank_R.txt`.
    """

    def __init__(self, folder: Path, *, rank: int, timeout_s: float):
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self._last_s, self._step = time.monotonic(), 0
        self._written_s = 0.0
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """A sign of life after a step, a validation or a commit."""
        self._last_s, self._step = time.monotonic(), step

    def close(self) -> None:
        """End the watch; may be called twice."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        period_s = min(5.0, self.timeout_s / 4)
        while not self._closed.wait(period_s):
            silent_s = time.monotonic() - self._last_s
            self._write_heartbeat(silent_s)
            if silent_s > self.timeout_s:
                self._end(silent_s)

    def _write_heartbeat(self, silent_s: float) -> None:
        path = self.folder / f"heartbeat_rank_{self.rank}.json"
        record = {"step": self._step, "time_s": round(time.time() - silent_s, 1), "pid": os.getpid()}
        try:
            path.write_text(json.dumps(record))
        except OSError as error:  # a full disk must not end the watch
            get_logger().warning("heartbeat of rank %d cannot be written: %s", self.rank, error)

    def _end(self, silent_s: float) -> None:
        get_logger().error(
            "rank %d: no step ended for %.0f s after step %d (step_timeout_s = %g); stacks follow",
            self.rank,
            silent_s,
            self._step,
            self.timeout_s,
        )
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        try:
            with (self.folder / f"stacks_rank_{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            get_logger().error("stacks cannot be written: %s", error)
        os._exit(EXIT_HANG)  # the main thread may hang inside a collective for ever
