"""The real SLURM on one node: two tasks without ssh, and preemption that commits, requeues and goes on exactly."""

import json
import os
import sys
import time

import pytest

from tests.helpers.processes import ROOT, environment
from tests.helpers.slurm_node import call
from tests.helpers.tiny_run import arguments, assert_equal, write_shards

TASK = """
import os, sys, pathlib, signal, time, json, hashlib
from vlgpt import commits
from vlgpt.train import together
folder = pathlib.Path(sys.argv[1]); steps = int(sys.argv[2])
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
from vlgpt.train.agreement import join_ranks
join_ranks({"steps": steps}, timeout_s=120)
(folder / f"met_{rank}").write_text(f"{rank}/{world}")
if rank == 0:
    root = folder / "checkpoints"
    found = together.newest(root)
    step, value = (found.marker["step"], found.marker["value"]) if found else (0, "")
    (folder / "starts").open("a").write(f"{step}\\n")
    def save():
        tag = root / commits.tag_of(step); tag.mkdir(parents=True, exist_ok=True)
        commits.write_manifest(tag, 0, []); commits.commit(tag, world_size=1, facts={"step": step, "value": value})
    while step < steps:
        time.sleep(0.25); step += 1
        value = hashlib.sha256(f"{value}{step}".encode()).hexdigest()
        if asked:
            save(); sys.exit(75)
    save()
    (folder / "result.json").write_text(json.dumps(value))
"""


def submit(folder, *, num_tasks, steps):
    script = folder / "task.py"
    script.write_text(TASK)
    command = [
        "sbatch",
        "--parsable",
        f"--ntasks={num_tasks}",
        f"--ntasks-per-node={num_tasks}",
        "--overcommit",
    ]
    command += [
        f"--output={folder}/job.log",
        "launchers/slurm/train.sbatch",
        str(script),
        str(folder),
        str(steps),
    ]
    done = call(*command, cwd=ROOT, env=environment(PYTHON=sys.executable))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(path, *, timeout_s, log):
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        found = log.read_text() if log.exists() else "no log"
        assert time.monotonic() < deadline_s, f"{path.name} did not come: {found[-2000:]}"
        time.sleep(0.5)


@pytest.mark.parametrize("folder", ["launchers", "data_prep", "evaluation"])
def test_scripts_are_valid_bash_requeued_and_keep_their_log(folder):
    scripts = sorted((ROOT / folder / "slurm").glob("*.sbatch"))
    assert scripts and call("bash", "-n", *scripts).returncode == 0
    for path in scripts:
        assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(path.read_text().splitlines()), path


@pytest.mark.parametrize(
    "visible, local_rank",
    [(None, 3), ("", 3), ("0,1,2,3", 3), ("4,5,6,7", 3), ("0", 0), ("GPU-8f2a", 0), ("0,1", 1)],
)
def test_local_rank_is_a_device_that_the_task_sees(visible, local_rank):
    """Under --gres=gpu:4 every task sees four devices, under --gpus-per-task=1 one, whatever its number."""
    variables = environment(SLURM_PROCID=7, SLURM_NTASKS=8, SLURM_LOCALID=3)
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    done = call("bash", "launchers/slurm/task.sh", "env", cwd=ROOT, env=variables)
    assert {"RANK=7", "WORLD_SIZE=8", f"LOCAL_RANK={local_rank}"} <= set(done.stdout.splitlines())


def test_srun_is_told_the_cores_of_a_task(tmp_path):
    """With an srun and a scontrol that tell what they were asked: SLURM 22.05 and later hand nothing down."""
    for name, body in {"srun": 'echo "cores: ${SRUN_CPUS_PER_TASK:-none}"', "scontrol": "echo host"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": 42, "SLURM_JOB_NODELIST": "host", "SLURM_NTASKS": 1, "SLURM_JOB_NUM_NODES": 1}
    path = f"{tmp_path}:{os.environ['PATH']}"
    variables = environment(PATH=path, SLURM_SUBMIT_DIR=ROOT, **job)
    for cores in ("12", "none"):
        asked = {} if cores == "none" else {"SLURM_CPUS_PER_TASK": cores}
        done = call("bash", "launchers/slurm/train.sbatch", "x", cwd=ROOT, env=variables | asked)
        assert f"cores: {cores}" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_tasks_meet_without_ssh(slurm, tmp_path):
    submit(tmp_path, num_tasks=2, steps=1)
    for rank in range(2):
        wait_for(tmp_path / f"met_{rank}", timeout_s=120, log=tmp_path / "job.log")
        assert (tmp_path / f"met_{rank}").read_text() == f"{rank}/2"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_preempted_job_commits_is_queued_again_and_ends_like_an_uninterrupted_one(slurm, tmp_path):
    (tmp_path / "straight").mkdir()
    (tmp_path / "preempted").mkdir()
    submit(tmp_path / "straight", num_tasks=1, steps=200)
    folder = tmp_path / "preempted"
    job = submit(folder, num_tasks=1, steps=200)
    wait_for(folder / "starts", timeout_s=120, log=folder / "job.log")
    time.sleep(3)
    call("scancel", "-b", "-s", "USR1", job)
    wait_for(folder / "checkpoints", timeout_s=60, log=folder / "job.log")
    wait_for(
        folder / "result.json", timeout_s=400, log=folder / "job.log"
    )  # SLURM restarts a job after two minutes
    wait_for(tmp_path / "straight" / "result.json", timeout_s=60, log=folder / "job.log")
    starts = [int(line) for line in (folder / "starts").read_text().split()]
    assert len(starts) == 2 and starts[0] == 0 and 0 < starts[1] < 200
    assert (folder / "result.json").read_text() == (tmp_path / "straight" / "result.json").read_text()
    assert "exit code 75" in (folder / "job.log").read_text()
    assert json.loads((folder / "result.json").read_text())


def submit_training(folder, data):
    """The real trainer, two tasks; an `ssh` that tells on its caller comes first in PATH."""
    folder.mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/sh\ntouch {folder}/ssh_was_used\nexit 1\n")
    ssh.chmod(0o755)
    options = [
        "--parsable",
        "--ntasks=2",
        "--ntasks-per-node=2",
        "--overcommit",
        f"--output={folder}/job.log",
    ]
    run = [str(part) for part in arguments(data, folder / "run")]
    path = f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"
    done = call(
        "sbatch",
        *options,
        "launchers/slurm/train.sbatch",
        *run,
        cwd=ROOT,
        env=environment(PYTHON=sys.executable, PATH=path),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_by_two_tasks_is_preempted_queued_again_and_ends_like_an_uninterrupted_run(slurm, tmp_path):
    data = write_shards(tmp_path / "shards")
    straight, preempted = tmp_path / "straight", tmp_path / "preempted"
    submit_training(straight, data)
    wait_for(straight / "run" / "result" / "done.json", timeout_s=240, log=straight / "job.log")
    job = submit_training(preempted, data)
    log = preempted / "job.log"
    wait_for(preempted / "run" / "checkpoints" / "step_00000010" / "COMMITTED.json", timeout_s=120, log=log)
    call("scancel", "-b", "-s", "USR1", job)
    wait_for(preempted / "run" / "result" / "done.json", timeout_s=400, log=log)
    text = log.read_text()
    assert "exit code 75" in text and "resumed from" in text
    assert_equal(straight / "run", preempted / "run")
    assert not list(tmp_path.rglob("ssh_was_used"))
