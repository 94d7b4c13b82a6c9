"""Other processes of a test: their environment, and ranks that are started side by side without a launcher."""

import os
import subprocess
import sys
from pathlib import Path

from vlgpt.files import free_port

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent


def environment(**more):
    """This process's, with this source tree and the programs of this Python before any other."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in more.items()},
    }


def run_ranks(commands, *, folders=(), timeout_s=600):
    """Run a script per rank (path and arguments), perhaps in a folder each: -> what they wrote, and the exit codes."""
    world = {"WORLD_SIZE": len(commands), "LOCAL_SIZE": len(commands)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=folders[rank] if folders else None,
            env=environment(RANK=rank, LOCAL_RANK=rank, **world),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return outputs, [process.wait() for process in processes]
