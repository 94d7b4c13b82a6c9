"""A window of `torch.profiler`, asked for in the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlgpt.log import get_logger
from vlgpt.settings import ProfileSettings


class ProfileWindow:
    """Profiles `num_steps` steps from `start_step`; RUN/profile/rank_R.json opens in chrome://tracing or Perfetto."""

    def __init__(self, settings: ProfileSettings, folder: Path, *, rank: int):
        self.settings, self.folder, self.rank = settings, folder, rank
        self._profiler: Any = None

    def before_step(self, step: int) -> None:
        if self.settings.num_steps and step == self.settings.start_step:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(
                activities=activities, record_shapes=True, profile_memory=True
            )
            self._profiler.start()

    def after_step(self, step: int) -> None:
        if self._profiler is None or step < self.settings.start_step + self.settings.num_steps - 1:
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank_{self.rank}.json"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        get_logger().info("profile written to %s", path)
