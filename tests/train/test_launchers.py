"""Whole runs through the real launchers: processes killed, commits damaged, stops asked for, other data on a node."""

import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.processes import ROOT, environment, run_ranks
from tests.helpers.protocol_driver import DAMAGES
from tests.helpers.small_data import pair, write_dataset
from tests.helpers.tiny_run import arguments, assert_equal, write_shards
from vlgpt import commits
from vlgpt.log import read_metrics

DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"]
TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--master_port", "{port}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def start(folder, command, *, pause_s=3.0, max_restarts=3):
    """The supervisor with a launcher; its output goes to FOLDER.log."""
    prefix = [sys.executable, "launchers/supervise.py", "--run-dir", str(folder)]
    prefix += ["--pause-s", str(pause_s), "--max-restarts", str(max_restarts), "--"]
    log = folder.with_suffix(".log").open("a")
    return subprocess.Popen(
        [*prefix, *map(str, command)], cwd=ROOT, env=environment(), stdout=log, stderr=log
    )


def finished(process, folder, *, code=0, timeout_s=600):
    try:
        found = process.wait(timeout=timeout_s)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
    assert found == code, folder.with_suffix(".log").read_text()[-4000:]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finished(start(folder, [*DEEPSPEED, *arguments(data, folder)]), folder)
    return folder


# ------------------------------------------------------------------------------------------------- kills and damages


def ranks_of(supervisor):
    """Training processes by rank."""
    found = {}
    for child in psutil.Process(supervisor.pid).children(recursive=True):
        try:
            if any(part.endswith("train_tokenizer.py") for part in child.cmdline()[:3]):  # not a launcher
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, KeyError):
            continue
    return found


def committed(folder):
    root = folder / "checkpoints"
    return commits.committed_tags(root)


def torn(folder):
    root = folder / "checkpoints"
    return [tag for tag in commits.tags(root) if not (root / tag / commits.MARKER).is_file()]


def wait_until(condition, *, timeout_s, what, pause_s=0.0005):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come"
        time.sleep(pause_s)


def kill_at_the_moment(supervisor, folder, number, rng):
    """Even numbers: while a commit is being written; odd ones: some time after one. Returns the newest commit."""
    before = committed(folder)[:1]
    wait_until(lambda: committed(folder)[:1] > before, timeout_s=120, what="a first commit", pause_s=0.02)
    wait_until(lambda: len(ranks_of(supervisor)) == 2, timeout_s=20, what="two ranks")
    victims = ranks_of(supervisor)
    if number % 2 == 0:
        wait_until(lambda: torn(folder), timeout_s=30, what="a commit being written")
        time.sleep(rng.random() * 0.01)
    else:
        time.sleep(rng.random() * 0.1)
    victims[rng.randrange(2)].send_signal(signal.SIGKILL)
    for process in victims.values():
        process.wait(timeout=600)
    return committed(folder)[0]


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.timeout(1500)
def test_eight_kills_and_five_damages_through_the_launcher_change_nothing(data, straight, tmp_path):
    folder = tmp_path / "run"
    rng = random.Random(0)
    supervisor = start(folder, [*DEEPSPEED, *arguments(data, folder)], pause_s=4.0, max_restarts=4)
    report = []
    try:
        for number in range(13):
            newest = kill_at_the_moment(supervisor, folder, number, rng)
            kind = list(DAMAGES)[number - 8] if number >= 8 else "none"
            if kind != "none":
                DAMAGES[kind](folder / "checkpoints" / newest, rng.randrange(1, 6))
            report.append((kind, newest))
    except AssertionError:
        supervisor.send_signal(signal.SIGINT)
        raise
    finished(supervisor, folder, timeout_s=300)
    text = folder.with_suffix(".log").read_text()
    resumed = [line.rsplit("/", 1)[1][:13] for line in text.splitlines() if "resumed from" in line]
    assert len(resumed) == 13, (report, resumed)
    for (kind, newest), found in zip(report, resumed):
        assert found == newest if kind == "none" else found < newest, (kind, newest, found)
    assert_equal(straight, folder)
    assert max(record["step"] for record in read_metrics(folder / "metrics.jsonl")) == 600


# ------------------------------------------------------------------------------------------- stops, torchrun, refusals


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_to_the_supervisor_commits_ends_with_75_and_the_run_goes_on(
    data, straight, tmp_path, launcher, number
):
    folder = tmp_path / "run"
    supervisor = start(folder, [*launcher, *arguments(data, folder)])
    wait_until(lambda: committed(folder), timeout_s=120, what="a first commit", pause_s=0.02)
    supervisor.send_signal(number)
    asked_s = time.monotonic()
    finished(supervisor, folder, code=75, timeout_s=60)
    assert time.monotonic() - asked_s < 30
    assert commits.step_of(committed(folder)[0]) < 600
    finished(start(folder, [*launcher, *arguments(data, folder)]), folder)
    assert_equal(straight, folder)


def refused(commands, folders):
    """What two ranks say that cannot train together, and the seconds that it took."""
    started_s = time.monotonic()
    said, codes = run_ranks([[ROOT / script, *rest] for script, *rest in commands], folders=folders)
    assert codes == [2, 2], said
    return said, time.monotonic() - started_s


@pytest.mark.slow
def test_other_settings_or_data_on_a_node_are_refused_before_anything_is_built(data, tmp_path):
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        for name in ("ds_configs", "launchers"):
            (tmp_path / node / name).symlink_to(ROOT / name)
    (tmp_path / "a" / "shards").symlink_to(data)
    write_dataset(tmp_path / "b" / "shards", [pair(number) for number in range(1, 41)], shard_sizes=[20, 20])
    folders = (tmp_path / "a", tmp_path / "b")
    same = arguments("shards", tmp_path / "run")
    said, seconds = refused([same, same], folders)
    assert all("differ in data" in text for text in said), said
    other = arguments("shards", tmp_path / "run", **{"optimizer.lr": 0.5})
    said, more = refused([same, other], (folders[0], folders[0]))
    assert all("differ in settings" in text for text in said), said
    assert max(seconds, more) < 30, "imports included; the meeting itself is measured in test_faults.py"
