"""Command lines: `vlgpt ...` and the training launchers. The one file of the library with argparse and console output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vlgpt.log import UserError, run_command


def launch_training(*, default_config: str, argv: Sequence[str] | None = None) -> int:
    """What the launchers run: `--deepspeed JSON --config YAML [a.b=c ...]`. Returns the exit code."""
    parser = argparse.ArgumentParser(description=f"Train one stage (default configuration: {default_config}).")
    parser.add_argument("--deepspeed", metavar="JSON", required=True, help="ZeRO settings, see ds_configs/")
    parser.add_argument("--config", metavar="YAML", default=default_config, help="the run, see launchers/configs/")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, such as optimizer.lr=1e-4")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from vlgpt.config import load_run

    settings = load_run(arguments.config, arguments.overrides)
    from vlgpt.train.engine import read_config
    from vlgpt.train.run import is_finished, run_training

    ds_config = read_config(arguments.deepspeed)
    if is_finished(settings):
        sys.stderr.write(f"{settings.run_dir} is complete: nothing to do\n")
        return 0
    return run_training(settings, ds_config, ds_source=arguments.deepspeed)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vlgpt`."""
    parser = argparse.ArgumentParser(prog="vlgpt", description="VL-GPT: read and write text and images in one sequence.")
    parser.parse_args(argv)
    return run_command(lambda: (_ for _ in ()).throw(UserError("not built yet")))
