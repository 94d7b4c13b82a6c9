"""The sbatch files: their syntax and options everywhere, real arrays where a SLURM runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.corpus import picture
from tests.helpers.processes import ROOT, environment

PYTHON = environment(VLGPT_PYTHON=sys.executable)
SCRIPTS = sorted((ROOT / "data_prep" / "slurm").glob("*.sbatch"))


def test_scripts_run_one_task_and_hear_of_their_end():
    assert [path.stem for path in SCRIPTS] == ["build", "dedup", "features"]
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        assert "#SBATCH --ntasks=1" in lines
        assert path.stem == "dedup" or "#SBATCH --signal=B:TERM@120" in lines


def make_input(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04d}.jpg").write_bytes(picture(number, width=900, height=700))
    return folder


def build_arguments(folder: Path, output: Path) -> list[str]:
    return ["images", "--input", str(folder), "--output", str(output), "--shard-size", "4", "--name", "toy"]


def test_a_script_outside_slurm_builds_everything_alone(tmp_path):
    folder = make_input(tmp_path / "in", 6)
    command = ["bash", str(ROOT / "data_prep/slurm/build.sbatch"), *build_arguments(folder, tmp_path / "out")]
    variables = {name: value for name, value in PYTHON.items() if not name.startswith("SLURM")}
    subprocess.run(command, check=True, timeout=600, env=variables)
    assert (tmp_path / "out" / "_SUCCESS").is_file()


def test_sigterm_reaches_the_build_and_asks_for_a_requeue(tmp_path):
    """With a scontrol that writes down what it was asked."""
    folder = make_input(tmp_path / "in", 60)
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" > "{tmp_path}/asked"\n')
    scontrol.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"}
    variables = {**PYTHON, **job, "PATH": path, "SLURM_CPUS_PER_TASK": "1"}
    script = ["bash", str(ROOT / "data_prep/slurm/build.sbatch"), *build_arguments(folder, tmp_path / "out")]
    process = subprocess.Popen(script, env=variables, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=600) == 75
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    assert not list((tmp_path / "out").glob(".*.partial"))


def submit(*arguments: str, cwd: Path) -> str:
    command = ["sbatch", "--parsable", "--chdir", str(cwd), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=PYTHON)
    return done.stdout.split(";")[0].strip()


def states(job: str) -> list[str]:
    found = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True, timeout=600
    )
    return found.stdout.split()


def wait_for(job: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(state not in ("COMPLETED", "FAILED", "CANCELLED") for state in states(job)):
        assert time.monotonic() < deadline, f"job {job} is still {states(job)}"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_arrays_build_and_deduplicate_to_the_bytes_of_one_process(slurm, tmp_path):
    folder = make_input(tmp_path / "in", 40)
    shutil.copy(folder / "0003.jpg", folder / "zz_again.jpg")
    whole = [sys.executable, "-m", "data_prep.build", *build_arguments(folder, tmp_path / "whole")]
    subprocess.run(whole, check=True, timeout=600, cwd=ROOT)
    script = str(ROOT / "data_prep/slurm/build.sbatch")
    again = ("--array=0-3", "--cpus-per-task=1", script, *build_arguments(folder, tmp_path / "out"))
    job = submit(*again, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    subprocess.run(
        ["scancel", "--batch", "--signal=TERM", job], timeout=600, check=False
    )  # as before the time limit
    subprocess.run(["scontrol", "release", job], timeout=600, check=False, capture_output=True)
    time.sleep(2)
    wait_for(job, timeout_s=300)
    if not (tmp_path / "out" / "_SUCCESS").exists():  # the same line again finishes what was cut
        wait_for(submit(*again, cwd=tmp_path), timeout_s=300)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names), logs
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    script, work = str(ROOT / "data_prep/slurm/dedup.sbatch"), str(tmp_path / "work")
    for step in (
        ["hash", "out"],
        ["find", "out", "--work", work],
        ["apply", "out", "--work", work, "--output", "clean"],
    ):
        wait_for(submit("--array=0-1", script, *step, cwd=tmp_path), timeout_s=120)
    manifest = json.loads((tmp_path / "clean" / "manifest.json").read_text())
    assert manifest["dropped"]["filtered:duplicate"] == 1
