"""Start a training command again when a process was lost: a fresh port each time, a bounded number of times."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vlgpt import commits
from vlgpt.files import free_port
from vlgpt.log import get_logger
from vlgpt.train import faults

# Codes after which starting again changes nothing, or must not happen. 75 is for the scheduler, which requeues.
FINAL_CODES = frozenset(
    {
        0,
        faults.EXIT_USER_ERROR,
        faults.EXIT_NON_FINITE,
        faults.EXIT_DISK_FULL,
        faults.EXIT_PREEMPTED,
        faults.EXIT_KILL_SWITCH,
    }
)


def supervise(command: Sequence[str], *, run_dir: Path, max_restarts: int = 3, pause_s: float = 10.0) -> int:
    """Run `command` until it ends for good; returns its exit code (128 + n after signal n).

    Restarts are counted while the newest commit stays the same; a new commit resets the count. SIGTERM and SIGUSR1 ask
    the run to commit and end with 75, through the file RUN/STOP_REQUEST: a launcher that got the signal itself would
    kill its processes. SIGINT ends the command at once; nothing starts again after it.
    """
    logger = get_logger()
    faults.request_stop(run_dir, False)
    num_restarts, newest = 0, _newest_step(run_dir)
    while True:
        code, is_interrupted = _run_once(with_fresh_port(command), run_dir)
        if code in FINAL_CODES or is_interrupted:
            return code
        if faults.is_stop_requested(run_dir):
            logger.warning("exit code %d while a stop was asked for: not started again", code)
            return faults.EXIT_PREEMPTED
        step = _newest_step(run_dir)
        num_restarts = 1 if step > newest else num_restarts + 1
        newest = step
        if num_restarts > max_restarts:
            logger.error("exit code %d; %d restarts brought no new commit: giving up", code, max_restarts)
            return code
        what = (code, num_restarts, max_restarts, step, pause_s)
        logger.warning("exit code %d; restart %d of %d from step %d in %g s", *what)
        time.sleep(pause_s)


def with_fresh_port(command: Sequence[str]) -> list[str]:
    """The command with `{port}` replaced by a free port; ports of a crashed run may still be held."""
    port = str(free_port())
    return [part.replace("{port}", port) for part in command]


def _run_once(command: Sequence[str], run_dir: Path) -> tuple[int, bool]:
    """Exit code of one start, and whether SIGINT ended it."""
    faults.record_exit_code(run_dir, None)
    interrupts: list[int] = []
    process = subprocess.Popen(command, start_new_session=True)

    def ask_for_a_commit(number: int, frame: object) -> None:
        faults.request_stop(run_dir)

    def interrupt(number: int, frame: object) -> None:
        interrupts.append(number)
        os.killpg(process.pid, number)

    handlers = {signal.SIGTERM: ask_for_a_commit, signal.SIGUSR1: ask_for_a_commit, signal.SIGINT: interrupt}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # Processes that a crashed launcher left behind would hold the devices.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            get_logger().debug("all processes of the command have ended")
    code = code if code >= 0 else 128 - code
    recorded = faults.recorded_exit_code(run_dir)
    return (code if recorded is None or code == 0 else recorded), bool(interrupts)


def _newest_step(run_dir: Path) -> int:
    return max(map(commits.step_of, commits.committed_tags(run_dir / "checkpoints")), default=0)
