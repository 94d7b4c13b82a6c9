"""`killed_at.py PLACE SCRIPT ARGUMENTS...`: run a script, and kill -9 its process at a chosen moment.

The moment is the first renaming of a file whose new path holds PLACE: the same in every run, whatever the machine's speed.
"""

import os
import runpy
import signal
import sys

_, PLACE, *sys.argv = sys.argv


def kill_at_rename(event, arguments):
    if event == "os.rename" and PLACE in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill_at_rename)
runpy.run_path(sys.argv[0], run_name="__main__")
