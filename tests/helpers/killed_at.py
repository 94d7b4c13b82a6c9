"""`killed_at.py PLACE SCRIPT ARGUMENTS...`: run a script, and kill -9 its process at a chosen moment.

The moment is the first renaming of a file whose new path holds PLACE: the same in every run, on any machine.
"""

import os
import runpy
import signal
import sys

LAUNCHERS = [word for word in sys.argv[1:] if word.startswith("--local_rank")]  # deepspeed puts it first
PLACE, SCRIPT, *rest = (word for word in sys.argv[1:] if word not in LAUNCHERS)
sys.argv = [SCRIPT, *LAUNCHERS, *rest]


def kill_at_rename(event, arguments):
    if event == "os.rename" and PLACE in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill_at_rename)
runpy.run_path(SCRIPT, run_name="__main__")
