"""The commit protocol: only whole checkpoints are ever resumed, whatever was killed or damaged."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from tests.helpers.processes import HELPERS, environment
from tests.helpers.protocol_driver import Pair
from vlgpt import commits, files
from vlgpt.errors import UserError
from vlgpt.train import together


def write_checkpoint(root, step, *, world_size=2, content=b"weights"):
    folder = root / commits.tag_of(step)
    folder.mkdir(parents=True)
    for rank in range(world_size):
        path = folder / f"rank_{rank}_data.bin"
        path.write_bytes(content + bytes([rank]) * 1000)
        commits.write_manifest(folder, rank, [path])
    commits.commit(folder, world_size=world_size, facts={"step": step})
    return folder


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step)
    assert together.newest(tmp_path).tag == commits.tag_of(30)
    assert together.newest(tmp_path / "nothing") is None


DAMAGES = {
    "missing": lambda folder: (folder / "rank_1_data.bin").unlink(),
    "truncated": lambda folder: os.truncate(folder / "rank_0_data.bin", 10),
    "bit flip": lambda folder: (folder / "rank_1_data.bin").write_bytes(
        bytes([(folder / "rank_1_data.bin").read_bytes()[0] ^ 1])
        + (folder / "rank_1_data.bin").read_bytes()[1:]
    ),
    "no marker": lambda folder: (folder / commits.MARKER).unlink(),
    "empty marker": lambda folder: (folder / commits.MARKER).write_text(""),
    "marker of another shape": lambda folder: (folder / commits.MARKER).write_text("[]"),
    "manifest changed": lambda folder: (folder / "rank_0.json").write_text('{"rank": 0, "files": []}'),
    "manifest missing": lambda folder: (folder / "rank_1.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    write_checkpoint(tmp_path, 10)
    DAMAGES[damage](write_checkpoint(tmp_path, 20))
    found = together.newest(tmp_path)
    assert found.tag == commits.tag_of(10)
    assert [tag for tag, _ in found.skipped] == [commits.tag_of(20)]


def test_starting_anew_over_damaged_checkpoints_is_refused(tmp_path):
    DAMAGES["truncated"](write_checkpoint(tmp_path, 10))
    with pytest.raises(UserError, match="has 10 bytes"):
        together.newest(tmp_path)


def test_pruning_keeps_the_newest_good_ones_and_never_the_last(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path, step)
    torn = tmp_path / commits.tag_of(50)
    torn.mkdir()
    commits.prune(tmp_path, keep=2)
    assert commits.tags(tmp_path) == [commits.tag_of(step) for step in (50, 40, 30)]
    assert together.newest(tmp_path).tag == commits.tag_of(40)


def test_a_commit_without_all_manifests_is_refused(tmp_path):
    folder = tmp_path / commits.tag_of(5)
    folder.mkdir()
    commits.write_manifest(folder, 0, [])
    with pytest.raises(ValueError, match="manifest of rank 1 is missing"):
        commits.commit(folder, world_size=2, facts={})


def test_a_manifest_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    folder = tmp_path / commits.tag_of(5)
    folder.mkdir()
    commits.write_manifest(folder, 0, [])
    late = threading.Timer(0.3, commits.write_manifest, (folder, 1, []))
    late.start()
    commits.commit(folder, world_size=2, facts={"step": 5}, patience_s=30.0)
    late.join()
    assert commits.verify(folder)["step"] == 5


def save_by_threads(root, step, fail_at=lambda place, rank: None):
    """A save by two ranks -> what each raised. `fail_at(place, rank)` may raise."""
    pipes, errors = multiprocessing.Pipe(), [None, None]

    def write(folder, rank):
        (folder / f"rank_{rank}_data.bin").write_bytes(b"weights")
        fail_at("write", rank)

    def owned(folder, rank):
        fail_at("manifest", rank)
        return [folder / f"rank_{rank}_data.bin"]

    def life(rank):
        try:
            together.save(
                Pair(rank, pipes[rank]),
                root,
                step=step,
                write=lambda folder: write(folder, rank),
                owned=lambda folder: owned(folder, rank),
                keep=2,
                first_estimate=1,
            )
        except Exception as error:
            errors[rank] = error
        finally:
            pipes[rank].close()  # a rank that still waits for this one fails at once

    threads = [threading.Thread(target=life, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["write", "manifest", "marker"])
def test_a_rank_that_cannot_write_leaves_no_commit_on_any(tmp_path, monkeypatch, place, rank):
    assert save_by_threads(tmp_path, 10) == [None, None]

    def fail_at(here, by):
        if (here, by) == (place, rank):
            raise OSError("no space left on device")

    def fail_to_commit(*arguments, **options):
        raise OSError("no space left on device")

    if place == "marker":
        monkeypatch.setattr(commits, "commit", fail_to_commit)  # only rank 0 writes it
    errors = save_by_threads(tmp_path, 20, fail_at)
    assert [type(error) for error in errors] == [commits.CommitFailed] * 2, errors
    assert "no space left on device" in str(errors[0])
    assert str(errors[0]) == str(errors[1])
    assert commits.tags(tmp_path) == [commits.tag_of(10)]
    assert together.newest(tmp_path).tag == commits.tag_of(10)


def test_a_small_file_is_either_old_or_new_whatever_fails_in_between(tmp_path, monkeypatch):
    target = tmp_path / "marker.json"
    files.write_atomic(target, b"old")

    def fail(source, destination):
        raise OSError("killed here")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        files.write_atomic(target, b"new")
    assert target.read_text() == "old"


def drive(*arguments, timeout_s=250):
    """Run the driver of process pairs; returns its report."""
    command = [sys.executable, HELPERS / "protocol_driver.py", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["imported"] == [], "the driver must stay small"
    return report


def test_a_pair_killed_at_any_point_of_a_save_goes_on_from_its_newest_commit(tmp_path):
    report = drive("kill", tmp_path, 0, 16)
    assert (report["num_kills"], report["problems"]) == (16, [])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_hundred_kills_before_inside_and_after_every_write_and_rename(tmp_path, seed):
    report = drive("kill", tmp_path, seed, 100)
    assert (report["num_kills"], report["problems"]) == (100, [])
    places = {f"{when} {what}" for what in ("write", "fsync", "replace") for when in ("before", "after")}
    assert places | {"inside write"} <= set(report["kinds"]), "a kind of place was never hit"


def test_five_kinds_of_damage_at_ten_places_lead_both_ranks_to_the_same_commit(tmp_path):
    report = drive("damage", tmp_path)
    assert (report["num_damages"], report["problems"]) == (50, [])
