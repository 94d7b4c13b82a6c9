"""Stage 1: image tokenizer and detokenizer.

deepspeed launchers/train_tokenizer.py --deepspeed ds_configs/zero2.json --config YAML [KEY=VALUE ...]
"""

import sys

from vlgpt.cli import launch_training

if __name__ == "__main__":
    sys.exit(launch_training())
