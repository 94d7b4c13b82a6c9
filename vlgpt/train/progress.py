"""Speed, waiting time and the progress line of a run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from vlgpt.batch import Batch, ConditionBatch
from vlgpt.log import get_logger
from vlgpt.planning.flops import FlopMeter, peak_flops
from vlgpt.settings import RunSettings
from vlgpt.train.engine import Engine


@dataclass(frozen=True)
class Content:
    """What a micro-batch held: numbers and document names, no tensors."""

    # A small tensor kept of every batch would fragment the allocator's memory between the large ones.

    documents: tuple[str | tuple[str, ...], ...]
    num_images: int
    num_positions: int = 0
    num_padding: int = 0

    @staticmethod
    def of(batch: Batch | ConditionBatch) -> Content:
        """Of a packed batch, or of one of images."""
        if not isinstance(batch, Batch):
            return Content(batch.documents, len(batch.documents))
        num_images = 0 if batch.images is None else len(batch.images)
        num_padding = int((batch.segment_ids == 0).sum())
        return Content(batch.documents, num_images, batch.token_ids.numel(), num_padding)


class Progress:
    """Counts work between log lines; shows a bar with time left on a terminal, aligned lines elsewhere."""

    def __init__(self, settings: RunSettings, start: int, *, engine: Engine):
        steps, is_shown = settings.steps, engine.rank == 0
        self.steps, self.start, self.is_shown = steps, start, is_shown
        self.meter = FlopMeter(engine.stage)
        self.peak_flops = peak_flops(settings.peak_tflops)
        self.started = time.monotonic()
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, leave=True)
        self._reset()

    def _reset(self) -> None:
        self.num_steps = self.num_tokens = self.num_images = self.num_padding = self.num_positions = 0
        self.seconds = self.wait_s = 0.0

    def add(self, contents: list[Content], seconds: float, wait_s: float) -> None:
        """One optimizer step of this rank took `seconds`, of which `wait_s` were spent waiting for data."""
        self.num_steps += 1
        self.seconds += seconds
        self.wait_s += wait_s
        for content in contents:
            self.num_tokens += content.num_positions - content.num_padding
            self.num_padding += content.num_padding
            self.num_positions += content.num_positions
            self.num_images += content.num_images
        if self._bar is not None:
            self._bar.update(1)

    def rates(self, engine: Engine) -> dict[str, float]:
        """Rates since the last call, summed over ranks (collective)."""
        flops = self.meter.take()
        sums = torch.tensor(
            [self.num_tokens, self.num_images, self.num_padding, self.num_positions, flops],
            dtype=torch.float64,
        )
        tokens, images, padding, positions, flops = engine.all_sum(sums).tolist()
        seconds = max(self.seconds, 1e-9)
        values = {
            "images_per_s": images / seconds,
            "step_s": seconds / max(self.num_steps, 1),
            "data_wait_share": self.wait_s / seconds,
        }
        if positions:
            values["tokens_per_s"] = tokens / seconds
            values["padding_share"] = padding / positions
        per_device = flops / seconds / engine.world_size
        values["tflops_per_device"] = per_device / 1e12
        if self.peak_flops is not None:
            values["mfu"] = per_device / self.peak_flops
        values["memory_peak_gb"] = float(engine.all_max(torch.tensor([memory_peak_gb()])).item())
        self._reset()
        return values

    def line(self, step: int, values: dict[str, Any]) -> None:
        """One aligned line with the time left."""
        if not self.is_shown:
            return
        elapsed = time.monotonic() - self.started
        left_s = elapsed / max(step - self.start, 1) * (self.steps - step)
        losses = "  ".join(
            f"{key.removeprefix('loss/')} {value:7.4f}"
            for key, value in values.items()
            if key.startswith("loss/") and key.count("/") == 1 and value is not None
        )
        norm = values.get("gradient_norm")
        shown_norm = "   nan" if norm is None else f"{norm:6.2f}"
        speed = f"  {values['tokens_per_s']:,.0f} tok/s" if "tokens_per_s" in values else ""
        speed += f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        text = (
            f"step {step:6d}/{self.steps}  {losses}  |g| {shown_norm}  lr {values['learning_rate']:.2e}  "
            f"{values['step_s'] * 1e3:6.0f} ms/step{speed}  "
            f"wait {values['data_wait_share']:4.0%}  left {_clock(left_s)}"
        )
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            get_logger().info(text)

    def close(self) -> None:
        """Stop the meter and leave the progress bar."""
        self.meter.close()
        if self._bar is not None:
            self._bar.close()


def memory_peak_gb() -> float:
    """Highest use so far: of the GPU's memory if there is one, else of this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
