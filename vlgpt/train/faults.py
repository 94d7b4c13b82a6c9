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


def is_kill_switch_on(run_dir: Path) -> bool:
    """Whether somebody made the file RUN/KILL_SWITCH: commit after this step and stop, whatever restarts the run."""
    return (run_dir / KILL_SWITCH).exists()


@dataclass
class SpikeDetector:
    """Moving mean and variance of the loss; a value more than `sigma` deviations above the mean is a spike.

    Spikes do not enter the statistics, so that a second one is measured against the same normal. The first `warmup`
    values only feed them. Not part of a commit: after a resume it warms up again.
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
        if self.num_seen >= self.warmup and loss - self.mean > self.sigma * deviation:
            return True
        self.num_seen += 1
        rate = max(1 - self.decay, 1 / self.num_seen)
        difference = loss - self.mean
        self.mean += rate * difference
        self.variance = (1 - rate) * (self.variance + rate * difference * difference)
        return False
