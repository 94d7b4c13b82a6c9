"""Logging: one logger for people, one metrics file for programs, TensorBoard and Weights & Biases beside it."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def get_logger(name: str = "vlgpt") -> logging.Logger:
    """The logger `vlgpt` or a child of it. Importing configures nothing: a command line calls `configure`."""
    return logging.getLogger(name if name.startswith("vlgpt") else f"vlgpt.{name}")


def configure(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Send the logger `vlgpt` to stderr; ranks other than 0 print warnings and errors only."""
    logger = logging.getLogger("vlgpt")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    where = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(logging.Formatter(f"%(asctime)s{where} %(levelname).1s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False


class MetricsSink:
    """Receives the numbers of a run. This one drops them: ranks other than 0 hold it."""

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Take in one record."""

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Take in an image `(3, H, W)` in [0, 1]."""

    def close(self) -> None:
        """No record comes any more."""


class MetricsLog(MetricsSink):
    """metrics.jsonl (one JSON object per line) and TensorBoard events of one run; only rank 0 should hold one."""

    def __init__(self, folder: Path, *, use_tensorboard: bool = True, mirrors: Sequence[MetricsSink] = ()):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._mirrors = mirrors
        self._writer = None
        if use_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                get_logger().warning(
                    "tensorboard is not installed: metrics.jsonl only (pip install tensorboard)"
                )
            else:
                self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Append one record; numbers also go to TensorBoard under their own names."""
        record = {"step": step, "time_s": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for mirror in self._mirrors:
            mirror.write(step, values)
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """Add an image `(3, H, W)` in [0, 1] to TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image, step)

    def close(self) -> None:
        """Close the metrics file and everything that mirrors it."""
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()
        if self._writer is not None:
            self._writer.close()


class WandbMirror(MetricsSink):
    """Sends every number to Weights & Biases; metrics.jsonl stays the record.

    WANDB_MODE=offline writes to RUN/wandb instead of the network. Raises UserError when the package is missing.
    """

    def __init__(self, run_dir: Path, *, project: str, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb_project is set, but wandb is not installed: pip install wandb, or remove it"
            ) from error
        # One id per folder, so that a resumed run goes on with its curve instead of starting another.
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(run_dir), config=dict(config)
        )

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Send the numbers of one record."""
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Mark the run at Weights & Biases as finished, after its uploads."""
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl (a line cut by a crash is left out)."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
