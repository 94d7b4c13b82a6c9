"""Exit codes of training, the kill switch, and the detector of loss spikes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

EXIT_USER_ERROR = 2  # configuration or data: starting again changes nothing
EXIT_NON_FINITE = 70  # too many non-finite steps in a row
EXIT_REPLICAS = 71  # ranks hold different weights
EXIT_DISK_FULL = 74  # a commit does not fit and checkpoint.on_disk_full = stop
EXIT_PREEMPTED = 75  # SIGTERM or SIGUSR1: committed; run the same command to go on
EXIT_KILL_SWITCH = 76  # the file KILL_SWITCH appeared: committed

KILL_SWITCH = "KILL_SWITCH"
STOP_REQUEST = "STOP_REQUEST"
EXIT_CODE = "exit_code"


def is_kill_switch_on(run_dir: Path) -> bool:
    """Whether the file RUN/KILL_SWITCH exists: commit after this step and stop, whatever restarts the run."""
    return (run_dir / KILL_SWITCH).exists()


def is_stop_requested(run_dir: Path) -> bool:
    """Whether RUN/STOP_REQUEST exists, by which the supervisor asks for a commit: a signal would kill the launcher."""
    return (run_dir / STOP_REQUEST).exists()


def request_stop(run_dir: Path, is_wanted: bool = True) -> None:
    """Make or remove the file RUN/STOP_REQUEST."""
    if is_wanted:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / STOP_REQUEST).touch()
    else:
        (run_dir / STOP_REQUEST).unlink(missing_ok=True)


def record_exit_code(run_dir: Path, code: int | None) -> None:
    """Keep how a run ended in RUN/exit_code, since torchrun turns every code into 1; None forgets it."""
    if code is None:
        (run_dir / EXIT_CODE).unlink(missing_ok=True)
    elif run_dir.is_dir():
        (run_dir / EXIT_CODE).write_text(str(code))


def recorded_exit_code(run_dir: Path) -> int | None:
    """What `record_exit_code` kept, None when the run was killed before it could."""
    path = run_dir / EXIT_CODE
    text = path.read_text() if path.is_file() else ""
    return int(text) if text.isdigit() else None


@dataclass
class SpikeDetector:
    """Moving mean and variance of the loss; a value more than `sigma` deviations above the mean is a spike.

    The first `warmup` values are never spikes. Not part of a commit: after a resume it warms up again.
    """

    sigma: float
    decay: float = 0.98
    warmup: int = 50
    num_seen: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def is_spike(self, loss: float) -> bool:
        """Judge one finite loss, then learn from it. NaN and infinity are never spikes: DeepSpeed skips those."""
        if self.sigma == 0 or not math.isfinite(loss):
            return False
        deviation = math.sqrt(self.variance) + 1e-6 * abs(self.mean)
        # A spike does not enter the statistics, so that a second one is measured against the same normal loss.
        if self.num_seen >= self.warmup and loss - self.mean > self.sigma * deviation:
            return True
        self.num_seen += 1
        rate = max(1 - self.decay, 1 / self.num_seen)
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference * difference)
        return False
