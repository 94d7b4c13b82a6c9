"""kill -9 at any moment: what stands under a final name is whole, and the end is what an undisturbed run
gives.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.builds import assert_every_tar_is_whole, build_arguments
from tests.helpers.corpus import picture
from tests.helpers.processes import ROOT


def command(folder: Path, output: Path, *options: str) -> list[str]:
    settings = ("--shard-size", 8, "--num-workers", 2, "--name", "toy", "--max-bad-fraction", 0.05)
    arguments = build_arguments("images", folder, output, *settings, *options)
    return [sys.executable, "-m", "data_prep.build", *arguments]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> int:
    _, error = process.communicate(timeout=240)
    assert process.returncode in (0, -signal.SIGKILL), error.decode()
    return process.returncode


def content(output: Path) -> dict[str, bytes]:
    names = [
        path for path in output.iterdir() if path.suffix in (".tar", ".idx", ".json") and path.name[0] != "."
    ]
    return {path.name: path.read_bytes() for path in names}


def wait_for_changes(output: Path, processes: list[subprocess.Popen], *, number: int) -> None:
    """Until the builds have created or renamed files in the output `number` times, or one of them has ended."""

    def files() -> set[tuple[str, int]]:
        return {(entry.name, entry.inode()) for entry in os.scandir(output)} if output.exists() else set()

    seen = files()
    deadline = time.monotonic() + 200
    while number and time.monotonic() < deadline and all(process.poll() is None for process in processes):
        now = files()
        number -= now != seen
        seen = now
        time.sleep(0.002)


def build_with_kills(folder: Path, output: Path, *, num_kills: int, num_tasks: int, seed: int) -> int:
    """Start every task, kill all after a random number of changes on disk, start again; returns how many kills hit a
    running build. Counting changes instead of seconds lands the kills within the work on any machine.
    """
    chance = random.Random(seed)
    hits = 0
    for _ in range(4 * num_kills + 1):
        tasks = [
            command(folder, output, "--task-index", str(task), "--num-tasks", str(num_tasks))
            for task in range(num_tasks)
        ]
        processes = [start(task) for task in tasks]
        is_killed = hits < num_kills
        if is_killed:
            wait_for_changes(output, processes, number=chance.randint(1, 6))
            for process in processes:
                process.send_signal(signal.SIGKILL)
        codes = [finish(process) for process in processes]
        assert_every_tar_is_whole(output)
        if not is_killed:
            assert codes == [0] * num_tasks
            break
        if any(code != 0 for code in codes):
            hits += 1
        else:  # the build ended before its kill, which then proves nothing: all over again
            shutil.rmtree(output)
            hits = 0
    return hits


def assert_kills_lose_nothing(
    tmp_path: Path, *, num_pictures: int, num_kills: int, num_tasks: int, seed: int
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(num_pictures):
        (folder / f"{number:04d}.jpg").write_bytes(picture(number, width=900, height=700))
    (folder / "damaged.jpg").write_bytes(b"damaged")
    assert finish(start(command(folder, tmp_path / "whole"))) == 0
    hits = build_with_kills(folder, tmp_path / "killed", num_kills=num_kills, num_tasks=num_tasks, seed=seed)
    assert hits == num_kills, "kills that hit no running build prove nothing"
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert (tmp_path / "killed" / "_SUCCESS").is_file()


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_killed_builds_end_as_undisturbed_ones(tmp_path, num_tasks):
    assert_kills_lose_nothing(tmp_path, num_pictures=63, num_kills=2, num_tasks=num_tasks, seed=num_tasks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_thirty_kills_lose_nothing(tmp_path, num_tasks):
    assert_kills_lose_nothing(tmp_path, num_pictures=800, num_kills=30, num_tasks=num_tasks, seed=num_tasks)


def test_sigterm_stops_cleanly_with_the_code_that_asks_for_a_restart(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(200):
        os.link(_first(folder, number), folder / f"{number:04d}.jpg")
    (folder / "first.dat").unlink()
    process = start(command(folder, output))
    deadline = time.monotonic() + 200
    while not list(output.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 75, error.decode()
    assert b"run the same command again" in error
    assert not list(output.glob(".*.partial"))
    assert len(list(output.glob("*.tar"))) < 25, "the workers went on to the end"
    assert_every_tar_is_whole(output)
    assert finish(start(command(folder, output))) == 0
    assert (output / "_SUCCESS").is_file()


def _first(folder: Path, number: int) -> Path:
    path = folder / "first.dat"
    if not path.exists():
        path.write_bytes(picture(number, width=900, height=700))
    return path
