"""A page to talk with a model: text and images, both ways.

python launchers/chat.py --model runs/demo/finetune/result [--examples demo/examples.txt] [--port 7860]
"""

import sys

from vlgpt.cli import launch_chat

if __name__ == "__main__":
    sys.exit(launch_chat())
