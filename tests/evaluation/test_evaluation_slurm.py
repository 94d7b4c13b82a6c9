"""The sbatch files of the evaluation: their syntax everywhere, a real job array where a SLURM runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.predictions import read_jsonl
from evaluation.run_all import main as run_all
from tests.helpers.processes import ROOT, environment

SCRIPTS = sorted((ROOT / "evaluation/slurm").glob("*.sbatch"))
JOBS = "- {benchmark: vqav2}\n- {benchmark: coco_caption}\n- {benchmark: visdial}\n- {benchmark: gqa}\n"


def test_scripts_take_their_places_from_variables():
    assert [path.stem for path in SCRIPTS] == ["run", "run_all"]
    for path in SCRIPTS:
        assert all(f'"${{{name}:?' in path.read_text() for name in ("EXPORT", "DATA", "OUT"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_missing_setting_is_named(path):
    variables = {key: value for key, value in os.environ.items() if key not in ("EXPORT", "DATA", "OUT")}
    done = subprocess.run(
        ["bash", str(path)],
        env={**variables, "BENCHMARK": "gqa"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "EXPORT: export folder" in done.stderr


def submit(script: Path, *, output: Path, log: Path, **variables: str) -> None:
    """A job array of two tasks on CPUs, waited for."""
    command = ["sbatch", "--wait", "--array=0-1", "--gres=none", "--mem=0", "--cpus-per-task=1"]
    command += [f"--output={log}-%a.log", str(script)]
    variables = environment(PYTHON=sys.executable, EXPORT="oracle", OUT=output, **variables)
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=400)
    logs = "\n".join(path.read_text() for path in log.parent.glob(f"{log.name}-*.log"))
    assert done.returncode == 0, done.stderr + logs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_array_answers_scores_and_reports_what_one_process_does(slurm, data, tmp_path):
    job_list = tmp_path / "jobs.yaml"
    job_list.write_text(JOBS)
    assert run_all(["oracle", str(data), str(tmp_path / "one"), "--jobs", str(job_list)]) == 0
    flags = f"--device cpu --dtype float32 --jobs {job_list}"
    submit(SCRIPTS[1], output=tmp_path / "array", log=tmp_path / "all", DATA=str(data), ARGS=flags)
    for name in ("vqav2", "coco_caption", "visdial", "gqa"):
        one, array = tmp_path / "one" / name, tmp_path / "array" / name
        assert (array / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
        shares = [len(read_jsonl(path)) for path in sorted(array.glob("shards/*.jsonl"))]
        assert len(shares) == 2 and sum(shares) == len(read_jsonl(one / "predictions.jsonl"))
    assert (tmp_path / "array/results.json").read_bytes() == (tmp_path / "one/results.json").read_bytes()
    assert (tmp_path / "array/report.html").is_file()
