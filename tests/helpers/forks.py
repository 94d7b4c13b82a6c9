"""Real processes whose start-up is paid once: this one imports everything, every rank of every act is a fork of it.

Reads acts from stdin, one JSON a line, and answers each with the exit codes of its ranks, as `Forks` below does it.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback

import pytest

from tests.helpers.processes import environment
from vlgpt.files import free_port


class Forks:
    """The process in which everything is imported. `run` does what a launcher does."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(HF_HUB_OFFLINE=1),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, command, *, folder, log, num_ranks=1, is_death_of_all=True):
        """Run a script (or `-m module`) in `folder`, output appended to `log`: -> exit codes, -9 for a killed rank.

        As under a launcher one rank that fails ends all, unless `is_death_of_all` is false.
        """
        act = {"command": [str(part) for part in command], "folder": str(folder), "log": str(log)}
        act |= {"ranks": num_ranks, "port": free_port(), "is_death_of_all": is_death_of_all}
        self.process.stdin.write(json.dumps(act) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


def serve():
    """Import, then fork and wait, act after act. Returns in the children only: their act and rank."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print while they are imported

    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - which compiles, and imports the compiler
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, CLIPModel, LlamaForCausalLM  # noqa: F401

    import evaluation.training_probe  # noqa: F401
    import vlgpt.export
    import vlgpt.train.run  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        act, children = json.loads(line), {}
        for rank in range(act["ranks"]):
            child = os.fork()
            if child == 0:
                return act, rank
            children[child] = rank
        codes = [0] * act["ranks"]
        while children:
            child, status = os.waitpid(-1, 0)
            codes[children.pop(child)] = code = os.waitstatus_to_exitcode(status)
            for other in children if code and act["is_death_of_all"] else ():
                os.kill(other, signal.SIGKILL)
        answers.write(json.dumps(codes) + "\n")
        answers.flush()
    os._exit(0)


def become(act, rank):
    """Rank `rank` of an act, as a launcher would have started it."""
    log = os.open(act["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(act["folder"])
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(act["ranks"]),
        "LOCAL_SIZE": str(act["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(act["port"]),
    }
    sys.argv = act["command"]
    if sys.argv[0] == "-m":
        _, module, *rest = sys.argv
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def leave(code):
    """End as the interpreter would, but for taking apart what the fork shares: that copies all of its memory."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    place = serve()
    try:
        become(*place)
    except SystemExit as stopped:
        leave(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)
