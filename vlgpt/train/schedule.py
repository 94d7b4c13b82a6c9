"""Learning rate: linear warm-up, cosine to a floor."""

from __future__ import annotations

import math

from vlgpt.settings import OptimizerSettings


def learning_rate(step: int, *, steps: int, settings: OptimizerSettings) -> float:
    """Rate of optimizer step `step`, counted from 1."""
    warmup = min(settings.warmup_steps, steps)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)
