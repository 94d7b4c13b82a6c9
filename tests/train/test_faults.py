"""What ends, refuses or repairs a run: hangs, wrong ranks, drifted replicas, spikes, full disks, lost processes."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.processes import ROOT, environment
from tests.helpers.small_data import feature_spec
from vlgpt import commits
from vlgpt.errors import UserError
from vlgpt.files import free_port
from vlgpt.train.agreement import disagreement, replica_digest
from vlgpt.train.facts import check_features
from vlgpt.train.faults import SpikeDetector
from vlgpt.train.loop import Run, write_validation
from vlgpt.train.observers import Uploader, Watchdog
from vlgpt.train.supervise import supervise

HANG = """
import sys, time, pathlib
from vlgpt.train.observers import Watchdog
dog = Watchdog(pathlib.Path(sys.argv[1]), rank=3, timeout_s=0.8)
dog.heartbeat(17)
def stuck_in_a_collective():
    time.sleep(60)
stuck_in_a_collective()
"""
JOIN = """
import json, sys, time
from vlgpt.train.agreement import join_ranks
from vlgpt.errors import UserError
started_s = time.monotonic()
try:
    join_ranks(json.loads(sys.argv[1]), timeout_s=300)
    said = "joined"
except UserError as error:
    said = str(error)
print(json.dumps([said, time.monotonic() - started_s]))
"""


def python(code, *arguments, **variables):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**variables), **pipes)


def test_a_hang_ends_the_process_with_stacks_of_all_threads(tmp_path):
    process = python(HANG, tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 72
    assert "stuck_in_a_collective" in (tmp_path / "stacks_rank_3.txt").read_text()
    assert "stuck_in_a_collective" in errors and "after step 17" in errors
    assert json.loads((tmp_path / "heartbeat_rank_3.json").read_text())["step"] == 17


def test_a_validation_feeds_the_watchdog_at_every_batch(tmp_path):
    seen = []

    class Noting(Watchdog):
        def heartbeat(self, step):
            super().heartbeat(step)
            seen.append(step)

    def validate(step, on_batch):
        for _ in range(3):
            on_batch()
        return {"validation/text": 1.0}

    dog = Noting(tmp_path, rank=0, timeout_s=600.0)
    engine = SimpleNamespace(evaluation=contextlib.nullcontext, rank=0)
    run = Run(settings=None, engine=engine, loader=None, facts={}, validate=validate, observers=dog)
    write_validation(run, 7)
    dog.close()
    assert seen == [7, 7, 7]


def join(processes):
    """Start processes of (RANK, WORLD_SIZE, facts) that meet at one port; returns what each said, and its time."""
    port = free_port()
    started = [
        python(
            JOIN, json.dumps(facts), RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        for rank, world, facts in processes
    ]
    return [json.loads(process.communicate(timeout=600)[0].strip().splitlines()[-1]) for process in started]


def test_equal_ranks_meet():
    assert [said for said, _ in join([(0, 2, {"lr": 1}), (1, 2, {"lr": 1})])] == ["joined", "joined"]


@pytest.mark.parametrize(
    "processes, reason",
    [
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], "rank 1 is taken twice"),
        ([(0, 2, {"settings": {"lr": 1}}), (1, 2, {"settings": {"lr": 2}})], "differ in settings"),
        ([(0, 2, {}), (1, 3, {})], "differ in world_size"),
        ([(2, 2, {})], "RANK is 2, but WORLD_SIZE is 2"),
    ],
    ids=["doubled", "other settings", "other world", "outside"],
)
def test_wrong_ranks_and_other_settings_are_refused_before_the_timeout(processes, reason):
    for said, seconds in join(processes):
        assert reason in said
        assert seconds < 250, "join_ranks waited for its 300 s"


def test_a_flipped_bit_in_one_replica_is_found_and_its_rank_named():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).to(torch.bfloat16) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    assert not disagreement([replica_digest(model) for model in models])
    models[2][0].weight.data.view(torch.int16)[3, 4] ^= 1
    assert disagreement([replica_digest(model) for model in models]) == "ranks [2] differ from the other 2"


def test_a_spike_is_seen_once_the_normal_is_known_and_does_not_shift_it():
    generator = torch.Generator().manual_seed(0)
    losses = (2 + 0.05 * torch.randn(300, generator=generator)).tolist()
    detector = SpikeDetector(sigma=6.0)
    assert not any(detector.is_spike(loss) for loss in losses), "noise was taken for a spike"
    before = detector.mean
    assert detector.is_spike(3.0) and detector.is_spike(2.8)
    assert detector.mean == before
    assert not detector.is_spike(float("nan")), "non-finite steps are DeepSpeed's matter"


def test_a_commit_that_does_not_fit_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(commits.CommitFailed, match=r"needs [\d,]+ bytes, [\d,]+ are free"):
        commits.check_space(tmp_path, first_estimate=1 << 60)
    commits.check_space(tmp_path, first_estimate=1)


def committed(root):
    folder = root / commits.tag_of(7)
    (folder / "part").mkdir(parents=True)
    path = folder / "part" / "rank_0_data.bin"
    path.write_bytes(b"weights" * 100)
    commits.write_manifest(folder, 0, [path])
    commits.commit(folder, world_size=1, facts={"step": 7})
    return folder


def test_an_uploaded_commit_verifies_and_a_failed_upload_is_logged(tmp_path, caplog):
    folder = committed(tmp_path / "here")
    uploader = Uploader(f"file://{tmp_path}/there")
    uploader.after_commit(folder)
    uploader.close()
    assert commits.verify(tmp_path / "there" / folder.name)["step"] == 7
    broken = Uploader("nosuchprotocol://bucket")
    assert "was not uploaded" not in caplog.text
    with caplog.at_level("ERROR", "vlgpt"):
        broken.after_commit(folder)
        broken.close()
    assert "step_00000007 was not uploaded to nosuchprotocol://bucket" in caplog.text


FLAKY = """
import pathlib, sys
root = pathlib.Path(sys.argv[1]); codes = sys.argv[3:]
root.mkdir(exist_ok=True)
ports = root / "ports"; text = ports.read_text() if ports.exists() else ""
ports.write_text(text + sys.argv[2] + "\\n")
sys.exit(int(codes[len(text.split())]))
"""


@pytest.mark.parametrize(
    "codes, wanted, num_runs",
    [((1, 247, 0), 0, 3), ((1, 75), 75, 2), ((1, 1, 1, 1), 1, 3), ((70,), 70, 1), ((2,), 2, 1)],
)
def test_the_supervisor_restarts_lost_processes_only_and_gives_up(tmp_path, codes, wanted, num_runs):
    command = [sys.executable, "-c", FLAKY, str(tmp_path / "r"), "{port}", *map(str, codes)]
    started_s = time.monotonic()
    assert supervise(command, run_dir=tmp_path, max_restarts=2, pause_s=0.0) == wanted
    ports = (tmp_path / "r" / "ports").read_text().split()
    assert len(ports) == num_runs and all(port.isdigit() for port in ports)
    assert time.monotonic() - started_s < 60


def test_an_exit_code_survives_a_launcher_that_turns_it_into_one(tmp_path):
    code = f"import pathlib, sys; pathlib.Path({str(tmp_path)!r}, 'exit_code').write_text('70'); sys.exit(1)"
    assert supervise([sys.executable, "-c", code], run_dir=tmp_path, max_restarts=2, pause_s=0.0) == 70


PATIENT = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[1]); (run / "started").touch()
while not (run / "STOP_REQUEST").exists():
    time.sleep(0.02)
sys.exit(75)
"""


def signalled(folder, number):
    """Exit code of a supervisor that got a signal while its command ran."""
    supervisor = [ROOT / "launchers" / "supervise.py", "--run-dir", folder, "--pause-s", "0"]
    command = [sys.executable, *supervisor, "--", sys.executable, "-c", PATIENT, folder]
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment(),
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore it
    )
    deadline_s = time.monotonic() + 200
    while not (folder / "started").exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(number)
    try:
        return process.wait(timeout=600)
    finally:
        (folder / "STOP_REQUEST").touch()  # ends the command, should the supervisor have left it running
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_supervisor_reaches_the_run_as_a_request(tmp_path, number):
    assert signalled(tmp_path, number) == 75


def test_after_an_interrupt_nothing_starts_again(tmp_path):
    assert signalled(tmp_path, signal.SIGINT) not in (0, 75)


@pytest.mark.parametrize(
    ("feature", "weights_hash", "layer", "reason"),
    [
        ("patches", "e", "-2", None),
        ("visual", "e+t", "-2", None),
        ("patches", "other", "-2", "another encoder"),
        ("visual", "other+t", "-2", "another encoder"),
        ("visual", "e+old", "-2", "another image tokenizer"),
        ("patches", "e", "-1", "layer '-1'"),
    ],
)
def test_cached_features_of_other_weights_than_the_runs_are_refused(feature, weights_hash, layer, reason):
    spec = feature_spec(name=feature, weights_hash=weights_hash, layer=layer)
    stage = SimpleNamespace(encoder=SimpleNamespace(layer_name="-2"))
    frozen = {"encoder": "e", "image_tokenizer": "t"}
    if reason is None:
        check_features({feature: spec}, stage, frozen)
        check_features({feature: spec}, SimpleNamespace(encoder=None), {})  # nothing held, nothing compared
    else:
        with pytest.raises(UserError, match=reason):
            check_features({feature: spec}, stage, frozen)
