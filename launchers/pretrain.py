"""Stage 2: multimodal pre-training.

deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json --config YAML [KEY=VALUE ...]
"""

import sys

from evaluation.training_probe import make_probe
from vlgpt.cli import launch_training

if __name__ == "__main__":
    sys.exit(launch_training(make_probe=make_probe))
