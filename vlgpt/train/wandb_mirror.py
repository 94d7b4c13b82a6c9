"""Numbers of a run to Weights & Biases, when `wandb_project` is set. metrics.jsonl stays the record."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vlgpt.errors import UserError
from vlgpt.settings import RunSettings


class WandbMirror:
    """Sends every number that the metrics log gets. WANDB_MODE=offline writes to RUN/wandb instead of the network.

    Raises UserError when the package is missing.
    """

    def __init__(self, settings: RunSettings):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "wandb_project is set, but wandb is not installed: pip install wandb, or remove it"
            ) from error
        identity = hashlib.sha256(str(settings.run_dir.resolve()).encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=settings.wandb_project,
            name=settings.name,
            id=identity,  # the same after a resume: one curve
            resume="allow",
            dir=str(settings.run_dir),
            config=settings.model_dump(mode="json"),
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()
