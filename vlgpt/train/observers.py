"""What accompanies a run: watchdog, profiler, uploads of commits, a moving average of the weights.

The loop tells one list of observers what happens and does not know which of them a run has.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlgpt.commits import AVERAGE_FILE, MARKER
from vlgpt.log import get_logger
from vlgpt.settings import ProfileSettings
from vlgpt.train.engine import Engine

EXIT_HANG = 72


class Observer:
    """Base of all observers. Every method does nothing, so that each observer defines only what it needs."""

    def before_step(self, step: int) -> None:
        """Step `step` begins."""

    def after_update(self, step: int) -> None:
        """The optimizer has changed the weights. Not called for a skipped step."""

    def after_step(self, step: int) -> None:
        """The step is over, skipped or not."""

    def heartbeat(self, step: int) -> None:
        """The run is alive: after a validation batch, a validation, a commit, a resume."""

    def tensors(self, *, is_kept: bool) -> dict[str, dict[str, Tensor]]:
        """Files of trained weights that belong into a commit, on the ranks that say `is_kept` (collective)."""
        return {}

    def resume(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """The commit in `folder` was loaded; `trained` are its fp32 weights (collective)."""

    def after_commit(self, folder: Path) -> None:
        """Rank 0 holds a new commit."""

    def before_result(self) -> None:
        """Training has ended and the result comes next (collective)."""

    def close(self) -> None:
        """The run ends, in success or not."""


NO_OBSERVER = Observer()


class Observers(Observer):
    """Several observers as one, called in the order given."""

    def __init__(self, observers: Iterable[Observer]):
        self._all = tuple(observers)

    def before_step(self, step: int) -> None:
        """Passes the call to every observer in order, like all methods of this class."""
        for observer in self._all:
            observer.before_step(step)

    def after_update(self, step: int) -> None:
        for observer in self._all:
            observer.after_update(step)

    def after_step(self, step: int) -> None:
        for observer in self._all:
            observer.after_step(step)

    def heartbeat(self, step: int) -> None:
        for observer in self._all:
            observer.heartbeat(step)

    def tensors(self, *, is_kept: bool) -> dict[str, dict[str, Tensor]]:
        """Files of all observers together; their names must differ."""
        found: dict[str, dict[str, Tensor]] = {}
        for observer in self._all:
            found |= observer.tensors(is_kept=is_kept)
        return found

    def resume(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        for observer in self._all:
            observer.resume(folder, trained)

    def after_commit(self, folder: Path) -> None:
        for observer in self._all:
            observer.after_commit(folder)

    def before_result(self) -> None:
        for observer in self._all:
            observer.before_result()

    def close(self) -> None:
        for observer in self._all:
            observer.close()


class Watchdog(Observer):
    """Ends the process with exit code 72 when no sign of life comes for `timeout_s`.

    A lost rank leaves the others inside a collective that may never return (NCCL), where no exception can be raised. So
    a thread watches the time and ends the process, and the launcher can restart the run. `folder` gets
    `heartbeat_rank_R.json` (step and time of the last sign of life) and, on a hang, `stacks_rank_R.txt`.
    """

    def __init__(self, folder: Path, *, rank: int, timeout_s: float):
        self.folder, self.rank, self.timeout_s = folder, rank, timeout_s
        self._last_s, self._step = time.monotonic(), 0
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, step: int) -> None:
        """The process is alive: the time limit starts again."""
        self._last_s, self._step = time.monotonic(), step

    def after_step(self, step: int) -> None:
        """The step counts as a sign of life."""
        self.heartbeat(step)

    def before_result(self) -> None:
        """Stop watching before the result is written."""
        # Statistics over data and the export may take longer than a step may.
        self.close()

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
        # Not sys.exit: the main thread may hang inside a collective, and an exception here would end this thread only.
        os._exit(EXIT_HANG)


class ProfileWindow(Observer):
    """Profiles `num_steps` steps from `start_step`; RUN/profile/rank_R.json opens in chrome://tracing or Perfetto."""

    def __init__(self, settings: ProfileSettings, folder: Path, *, rank: int):
        self.settings, self.folder, self.rank = settings, folder, rank
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Start the profiler at the first step of the window."""
        if self.settings.num_steps and step == self.settings.start_step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True
            )
            self._profiler.start()

    def after_step(self, step: int) -> None:
        """Stop after the last step of the window and write a Chrome trace for each rank."""
        if self._profiler is None or step < self.settings.start_step + self.settings.num_steps - 1:
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.rank}.json"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        get_logger().info("profile written to %s", path)


class Uploader(Observer):
    """Copies commits to `url`, in the background and one at a time. A failure is logged, training goes on."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._thread: threading.Thread | None = None

    def after_commit(self, folder: Path) -> None:
        """Start the upload of a commit in a thread, after the previous one has ended."""
        self.close()
        self._thread = threading.Thread(target=self._run, args=(folder,), name="upload")
        self._thread.start()

    def close(self) -> None:
        """Wait until the last copy is made."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, folder: Path) -> None:
        try:
            upload(folder, self.url)
        except (OSError, ValueError, ImportError) as error:  # ImportError: the protocol's package is missing
            get_logger().error("%s was not uploaded to %s: %s", folder.name, self.url, error)


def upload(folder: Path, url: str) -> None:
    """Copy a committed folder to url/TAG, at any fsspec URL. The marker goes last, so half a copy is no commit.

    Raises OSError, ValueError (unknown protocol) or ImportError.
    """
    from fsspec.core import url_to_fs

    fs, root = url_to_fs(url)
    target = f"{str(root).rstrip('/')}/{folder.name}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    for path in [*files, folder / MARKER]:
        name = f"{target}/{path.relative_to(folder).as_posix()}"
        fs.makedirs(name.rsplit("/", 1)[0], exist_ok=True)
        fs.put_file(str(path), name)
    get_logger().info("%s uploaded to %s", folder.name, url)


class MovingAverage(Observer):
    """Exponential moving average of the trained weights, kept like their fp32 masters: every rank its own partition.

    average = rate * average + (1 - rate) * weights after every step, with rate = min(decay, (1 + t) / (10 + t)): it
    starts low, so that a short run does not average in its random start. Costs 4 bytes per trained parameter, divided
    over the ranks, and no communication but at a commit.
    """

    def __init__(self, engine: Engine, *, decay: float):
        self.engine, self.decay = engine, decay
        self._averages = [master.detach().clone() for master in engine.masters()]

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Move the averages towards the fp32 weights; the decay grows with the step, up to its setting."""
        rate = min(self.decay, (1 + step) / (10 + step))
        for average, master in zip(self._averages, self.engine.masters()):
            average.lerp_(master, 1 - rate)

    def state(self, *, is_kept: bool = True) -> dict[str, Tensor]:
        """The averaged weights by name, on the CPU of ranks that say `is_kept` (collective)."""
        with self._in_the_place_of_masters():
            return self.engine.trainable_state(is_kept=is_kept)

    def tensors(self, *, is_kept: bool) -> dict[str, dict[str, Tensor]]:
        """The averaged weights as one file of the commit (collective)."""
        return {AVERAGE_FILE: self.state(is_kept=is_kept)}

    def resume(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """The average of a commit; one written without starts from its weights. Raises UserError."""
        path = folder / AVERAGE_FILE
        if not path.is_file():
            get_logger().warning("%s has no moving average: it starts from the weights", folder.name)
        with self._in_the_place_of_masters():
            self.engine.load_masters(load_file(path) if path.is_file() else trained)

    def before_result(self) -> None:
        """The average takes the place of the weights: the result and its statistics are made from it."""
        self.engine.load_weights(self.state())

    # DeepSpeed gathers and scatters its masters and nothing else. Swapped into their place, the averages are gathered
    # by the same code, at any ZeRO stage.
    @contextlib.contextmanager
    def _in_the_place_of_masters(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self._averages, self.engine.masters()):
            held = master.detach().clone()
            master.data.copy_(average)
            average.copy_(held)
