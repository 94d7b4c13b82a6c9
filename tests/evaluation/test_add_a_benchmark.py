"""The example of docs/evaluation.md is a whole benchmark: it runs, scores, has demonstrations, and stays short."""

import json
import re
from pathlib import Path

import pytest
from official_files import save_picture, write_json

from evaluation.run import main as run
from evaluation.score import main as score

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
NAME = "counting:Counting"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with the example as a module, and data for it."""
    section = DOCS.read_text(encoding="utf-8").split("## Add a benchmark")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(code.splitlines()) < 100
    (tmp_path / "counting.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for split, count in (("test", 12), ("train", 4)):
        records = []
        for number in range(count):
            image = f"{split}/{number}.png"
            save_picture(tmp_path / "data/counting" / image, number)
            records.append({"image": image, "question": "How many dogs are there?", "count": number % 4})
        write_json(tmp_path / f"data/counting/{split}.json", records)
    return tmp_path


def result_of(folder: Path, responder: str, *flags: str) -> dict:
    data, output = str(folder / "data"), folder / responder
    assert run([NAME, "--responder", responder, "--data", data, "--output", str(output), *flags]) == 0
    results = output / "results.json"
    assert score([NAME, "--data", data, "--predictions", str(output), "--output", str(results)]) == 0
    return json.loads(results.read_text())


def test_the_example_of_the_docs_reaches_its_maximum_with_demonstrations(folder):
    result = result_of(folder, "oracle", "--shots", "2", "--option", "worst_error=20")
    assert result["benchmark"] == NAME and result["shots"] == "2" and result["n"] == 12
    assert {name: entry["value"] for name, entry in result["metrics"].items()} == {
        "accuracy": 100, "mean_error": 0
    }  # fmt: skip
    assert result["scoring"]["options"]["worst_error"] == 20


def test_shuffled_answers_are_wrong_in_the_example_of_the_docs(folder):
    metrics = result_of(folder, "shuffled")["metrics"]
    assert metrics["accuracy"]["value"] < 60 and metrics["mean_error"]["value"] > 0
    assert metrics["accuracy"]["chance"] == pytest.approx(100 * 2 / 11)
