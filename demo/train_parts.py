"""Demo only: the tiny CLIP and the image decoder.

deepspeed demo/train_parts.py --deepspeed ds_configs/zero2.json --config YAML [KEY=VALUE ...]
"""

import sys

from vlgpt.cli import launch_training

if __name__ == "__main__":
    sys.exit(launch_training())
