"""Run a training command and start it again after a lost process, up to `--max-restarts` times without progress.

python launchers/supervise.py --run-dir runs/NAME -- deepspeed --master_port {port} launchers/pretrain.py ...
"""

import argparse
import sys
from pathlib import Path

from vlgpt import log
from vlgpt.train.supervise import supervise


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="output_dir of the run")
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--pause-s", type=float, default=10.0, help="before each restart")
    parser.add_argument("command", nargs="+", help="after `--`; {port} becomes a free port")
    arguments = parser.parse_args()
    log.configure()
    return supervise(
        arguments.command,
        run_dir=arguments.run_dir,
        max_restarts=arguments.max_restarts,
        pause_s=arguments.pause_s,
    )


if __name__ == "__main__":
    sys.exit(main())
