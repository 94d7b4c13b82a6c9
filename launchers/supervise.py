"""Run a training command and start it again after a lost process, up to `--max-restarts` times without progress.

python launchers/supervise.py --run-dir runs/NAME -- deepspeed --master_port {port} launchers/pretrain.py ...
"""

import sys

from vlgpt.cli import launch_supervised

if __name__ == "__main__":
    sys.exit(launch_supervised())
