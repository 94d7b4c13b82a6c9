"""Somebody else's benchmark, prompt file and job list: what cannot work says so, the rest reaches the report."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from evaluation import benchmarks
from evaluation.benchmarks.vqa import ShortAnswers
from evaluation.core import Example
from evaluation.metrics.postprocess import Style
from evaluation.prompts import load
from evaluation.responders import OracleResponder
from evaluation.run import run
from evaluation.run_all import main as run_all
from evaluation.score import score_folder
from tests.helpers.official_files import save_picture
from tests.helpers.processes import ROOT
from vlgpt.errors import UserError

RUN_ALL = ROOT / "evaluation/run_all.sh"


@dataclass(frozen=True, kw_only=True)
class Letters(ShortAnswers):
    """The right answer is a capital letter, which the default cut writes in lower case."""

    name: ClassVar[str] = "letters"
    train_split: ClassVar[str] = "train"
    split: str = "test"

    def examples(self, data: Path) -> Sequence[Example]:
        """Four questions of the test split, as many for demonstrations."""
        found = []
        for number, letter in enumerate("ABCA"):
            id, image = f"{self.split}-{number}", data / f"{number}.png"
            prompt = self.make_prompt(id, images=(image,), question=f"Letter {number}?")
            found.append(Example(id, prompt, letter, {"question": f"Letter {number}?", "image_id": id}))
        return found


@dataclass(frozen=True, kw_only=True)
class CleanLetters(Letters):
    """The same with a rule of its own."""

    cut: Style = "none"

    def clean(self, text: str) -> str:
        """The first capital letter."""
        found = re.search("[A-D]", text)
        return found[0] if found else ""


@pytest.fixture
def pictures(tmp_path) -> Path:
    for number in range(4):
        save_picture(tmp_path / f"data/{number}.png", number)
    return tmp_path / "data"


def result_of_oracle(name, data, output, **options):
    benchmark = benchmarks.make(f"tests.evaluation.test_own_benchmark:{name}", **options)
    examples = benchmark.examples(data)
    run(benchmark, OracleResponder(benchmark, examples), examples=examples, output=output)
    return score_folder(benchmark, output, data)


@pytest.mark.parametrize(("cut", "made"), [("emu", "'a' of 'A'"), ("llava", "'a' of 'A'")])
def test_truths_that_the_cut_changes_are_refused(pictures, tmp_path, cut, made):
    with pytest.raises(UserError, match=f"letters: 4 of 4 truths can never be right: cut={cut} makes {made}"):
        result_of_oracle("Letters", pictures, tmp_path / "out", cut=cut)


def test_truths_that_stay_are_scored_and_the_result_names_the_rule(pictures, tmp_path):
    result = result_of_oracle("Letters", pictures, tmp_path / "none", cut="none")
    assert result["metrics"]["accuracy"]["value"] == 100 and result["notes"]["cut"] == "none"
    result = result_of_oracle("CleanLetters", pictures, tmp_path / "own")
    assert result["metrics"]["accuracy"]["value"] == 100
    assert result["notes"]["cut"] == "tests.evaluation.test_own_benchmark:CleanLetters.clean"


LETTERS = "- {{benchmark: 'tests.evaluation.test_own_benchmark:{name}', shots: 2, seeds: [0, 1, 2]}}\n"


def test_few_shot_results_of_an_own_benchmark_reach_the_report_as_mean_and_deviation(pictures, tmp_path):
    (tmp_path / "jobs.yaml").write_text(LETTERS.format(name="CleanLetters"))
    output = tmp_path / "out"
    assert run_all(["shuffled", str(pictures), str(output), "--jobs", str(tmp_path / "jobs.yaml")]) == 0
    (entry,) = json.loads((output / "results.json").read_text())["few_shot"].values()
    assert entry["num_seeds"] == 3
    row = re.search(r'id="few-shot".*?<td>(.*?)</table>', (output / "report.html").read_text(), re.DOTALL)
    cells = re.sub("<[^>]+>", " ", row[1]).split()
    assert cells == [
        "tests.evaluation.test_own_benchmark:CleanLetters",
        "2",
        *(f"{entry[k]:.4g}" for k in ("mean", "std")),
        "3",
    ]


def start(*arguments, folder):
    """evaluation/run_all.sh in a folder of its own user."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable}
    command = [str(RUN_ALL), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_run_all_sh_reads_files_and_packages_of_the_callers_folder(pictures, tmp_path):
    (tmp_path / "lab_of_the_caller.py").write_text(Path(__file__).read_text())
    (tmp_path / "jobs.yaml").write_text("- benchmark: lab_of_the_caller:CleanLetters\n")
    done = start("oracle", "data", "out", "--jobs", "jobs.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/results.json").read_text())["skipped"] == {}


def test_run_all_sh_shows_all_options_and_counts_what_is_missing(tmp_path):
    done = start("--help", folder=tmp_path)
    assert done.returncode == 0 and all(
        flag in done.stdout for flag in ("--jobs", "--other-model", "--metrics")
    )
    done = start("oracle", folder=tmp_path)
    assert done.returncode == 2 and "data, output" in done.stderr


def test_when_no_job_could_run_the_reason_of_each_is_given(pictures, tmp_path):
    (tmp_path / "jobs.yaml").write_text(LETTERS.format(name="Letters") + "- {benchmark: no.such:Thing}\n")
    with pytest.raises(UserError) as error:
        run_all(["oracle", str(pictures), str(tmp_path / "out"), "--jobs", str(tmp_path / "jobs.yaml")])
    for reason in (
        "Letters-2shot-seed0: failed: letters: 4 of 4 truths",
        "Thing: failed",
        "cannot be imported",
    ):
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmark: gqa", "a job list is a YAML list, found dict"),
        ("- {shots: 2}", "job 1: key 'benchmark' is required"),
        ("- {benchmark: gqa, shot: 2}", "job 1: unknown key 'shot' .*did you mean 'shots'"),
        ("- {benchmark: gqa, seeds: 3}", "job 1: key 'seeds'"),
        ("- [", "jobs.yaml: not valid YAML"),
    ],
)
def test_a_broken_job_list_is_one_line(tmp_path, text, message):
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        run_all(["oracle", str(tmp_path), str(tmp_path / "out"), "--jobs", str(tmp_path / "jobs.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: {qa: {prompt: a}}", "key 'kind' is required"),
        ("{kind: own, prompts: {qa: {demonstration: a}}}", "key 'prompts.qa.prompt' is required"),
        ("{kind: own, prompts: {qa: {prompt: a, example: b}}}", "unknown key 'prompts.qa.example'"),
        ("{kind: own, prompts: {qa: {prompt: 3}}}", "key 'prompts.qa.prompt'"),
        ("kind: [", "not valid YAML"),
    ],
)
def test_a_broken_prompt_file_is_one_line(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "own.yaml"))
