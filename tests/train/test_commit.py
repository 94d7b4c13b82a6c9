"""The commit protocol: only whole checkpoints are ever resumed, whatever was killed or damaged."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vlgpt.log import UserError
from vlgpt.train import commit


def write_checkpoint(root, step, *, world_size=2, content=b"weights"):
    folder = root / commit.tag_of(step)
    folder.mkdir(parents=True)
    for rank in range(world_size):
        path = folder / f"rank_{rank}_data.bin"
        path.write_bytes(content + bytes([rank]) * 1000)
        commit.write_manifest(folder, rank, [path])
    commit.commit(folder, world_size=world_size, facts={"step": step})
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    assert commit.newest(tmp_path).tag == commit.tag_of(30)
    assert commit.newest(tmp_path / "nothing") is None


DAMAGES = {
    "missing": lambda folder: (folder / "rank_1_data.bin").unlink(),
    "truncated": lambda folder: os.truncate(folder / "rank_0_data.bin", 10),
    "bit flip": lambda folder: (folder / "rank_1_data.bin").write_bytes(
        bytes([(folder / "rank_1_data.bin").read_bytes()[0] ^ 1])
        + (folder / "rank_1_data.bin").read_bytes()[1:]
    ),
    "no marker": lambda folder: (folder / commit.MARKER).unlink(),
    "empty marker": lambda folder: (folder / commit.MARKER).write_text(""),
    "marker of another shape": lambda folder: (folder / commit.MARKER).write_text("[]"),
    "manifest changed": lambda folder: (folder / "rank_0.json").write_text('{"rank": 0, "files": []}'),
    "manifest missing": lambda folder: (folder / "rank_1.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    write_checkpoint(tmp_path, 10)
    DAMAGES[damage](write_checkpoint(tmp_path, 20))
    found = commit.newest(tmp_path)
    assert found.tag == commit.tag_of(10)
    assert [tag for tag, _ in found.skipped] == [commit.tag_of(20)]


def test_starting_anew_over_damaged_checkpoints_is_refused(tmp_path):
    DAMAGES["truncated"](write_checkpoint(tmp_path, 10))
    with pytest.raises(UserError, match="has 10 bytes"):
        commit.newest(tmp_path)


def test_pruning_keeps_the_newest_good_ones_and_never_the_last(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    torn = tmp_path / commit.tag_of(50)
    torn.mkdir()
    commit.prune(tmp_path, keep=2)
    assert commit.tags(tmp_path) == [commit.tag_of(step) for step in (50, 40, 30)]
    assert commit.newest(tmp_path).tag == commit.tag_of(40)


def test_a_commit_without_all_manifests_is_refused(tmp_path):
    folder = tmp_path / commit.tag_of(5)
    folder.mkdir()
    commit.write_manifest(folder, 0, [])
    with pytest.raises(ValueError, match="manifest of rank 1 is missing"):
        commit.commit(folder, world_size=2, facts={})


def test_a_small_file_is_either_old_or_new_whatever_fails_in_between(tmp_path, monkeypatch):
    target = tmp_path / "marker.json"
    commit.write_atomically(target, "old")

    def fail(source, destination):
        raise OSError("killed here")

    monkeypatch.setattr(commit.os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        commit.write_atomically(target, "new")
    assert target.read_text() == "old"


WRITER = """
import sys, pathlib, os
from vlgpt.train import commit
root = pathlib.Path(sys.argv[1])
step = 0
while True:
    step += 1
    folder = root / commit.tag_of(step)
    if folder.exists():
        continue
    folder.mkdir(parents=True)
    for rank in range(2):
        path = folder / f"rank_{rank}_data.bin"
        with path.open("wb") as file:
            for block in range(64):
                file.write(bytes([step % 251]) * 4096)
        commit.write_manifest(folder, rank, [path])
    commit.commit(folder, world_size=2, facts={"step": step})
    print(step, flush=True)
    commit.prune(root, keep=2)
"""


def kill_writer_after(tmp_path, delay_s):
    """Run the writer, SIGKILL it, and return the last step that it reported as committed."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    lines = process.stdout.read().split()
    process.wait(timeout=20)
    return int(lines[-1]) if lines else 1


@pytest.mark.parametrize("number", range(4))
def test_a_kill_at_any_moment_loses_no_committed_checkpoint(tmp_path, number):
    reported = kill_writer_after(tmp_path, 0.003 + 0.0137 * number)
    found = commit.newest(tmp_path)
    assert found is not None and found.marker["step"] >= reported
    assert json.loads((tmp_path / found.tag / commit.MARKER).read_text())["step"] == commit.step_of(found.tag)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(100))
def test_a_hundred_kills_lose_no_committed_checkpoint(tmp_path, number):
    reported = kill_writer_after(tmp_path, 0.001 * number + 0.0003 * (number % 7))
    found = commit.newest(tmp_path)
    assert found is not None and found.marker["step"] >= reported
