"""Laws of run_all, the report and comparisons: complete, resumable, beside the paper, and nothing in it can run."""

import json
from pathlib import Path

import pytest
import yaml

from evaluation import benchmarks, report
from evaluation.compare import compare
from evaluation.compare import main as compare_main
from evaluation.report import pick
from evaluation.responders import ShuffledResponder
from evaluation.run import run
from evaluation.run_all import JOBS, jobs
from evaluation.run_all import main as run_all
from evaluation.score import read_predictions, score, write_results
from tests.helpers import official_files
from tests.helpers.html_pages import Page, assert_only_own_style, inert

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> </p>"\'&{{ 7*7 }} javascript:alert(3)'


@pytest.fixture(scope="module")
def finished(data, clip_folder, tmp_path_factory) -> Path:
    """A whole run_all of the oracle."""
    output = tmp_path_factory.mktemp("all")
    assert (
        run_all(["oracle", str(data), str(output), "--clip", str(clip_folder), "--fd-clip", str(clip_folder)])
        == 0
    )
    return output


def test_run_all_answers_everything_that_has_data_and_names_the_rest(finished):
    summary = json.loads((finished / "results.json").read_text())
    assert set(official_files.ALL) <= set(summary["results"])
    assert "train_balanced_questions.json not found" in summary["skipped"]["gqa-dagger-seed0"]
    assert "8 shots wanted" in summary["skipped"]["vqav2-8shot-seed0"]
    assert summary["few_shot"]["vqav2 4"] == {"mean": 100.0, "std": 0.0, "num_seeds": 3}
    assert summary["results"]["vqav2"]["run"]["prompt"]["hash"]


def test_run_all_again_asks_and_scores_nothing(finished, data, clip_folder, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("evaluation.score.score", forbidden)
    monkeypatch.setattr("evaluation.run.answer", forbidden)
    before = (finished / "results.json").read_bytes()
    assert (
        run_all(
            ["oracle", str(data), str(finished), "--clip", str(clip_folder), "--fd-clip", str(clip_folder)]
        )
        == 0
    )
    assert (finished / "results.json").read_bytes() == before


def test_run_all_without_options_or_data_says_what_is_missing(data, tmp_path, capsys):
    job_list = tmp_path / "jobs.yaml"
    job_list.write_text("- {benchmark: magicbrush, needs: [clip]}\n- {benchmark: easy_vqa}\n")
    assert run_all(["oracle", str(data), str(tmp_path / "out"), "--jobs", str(job_list)]) == 0
    summary = json.loads((tmp_path / "out/results.json").read_text())
    assert summary["skipped"] == {"magicbrush": "needs the option clip"}
    assert list(summary["results"]) == ["easy_vqa"]


def test_the_job_list_covers_every_benchmark_and_shot_number_of_the_paper():
    given = {"clip": "x", "inception": "y"}
    planned = list(jobs(JOBS, prompts="vlgpt", given=given))
    assert {job.benchmark for job in planned} >= set(official_files.ALL)
    assert {job.few_shot.shots for job in planned if job.benchmark == "vqav2"} == {0, 2, 4, 8}
    assert sum(job.few_shot.is_text_only for job in planned) == 5
    assert len({job.name for job in planned}) == len(planned)
    assert all(job.few_shot.shots == 0 for job in jobs(JOBS, prompts="vlgpt-i", given=given))
    by_name = {job.name: job for job in planned}
    assert by_name["coco_generation"].options == {"inception": "y", "clip": "x"}


def test_the_report_shows_our_numbers_beside_the_papers(finished):
    page = Page((finished / "report.html").read_text())
    text = " ".join("".join(page.words).split())
    for wanted in ("Table 1", "Table 2", "Table 3", "80.22", "133.7", "this model", "VL-GPT-I"):
        assert wanted in text, wanted
    assert "split val2014, paper" in text
    assert page.tags.count("img") >= 20 and "std 0.00 over 3 seeds" in text


def test_examples_are_best_worst_and_random_without_repetition():
    scores = {str(i): float(i % 50) for i in range(200)}
    picked = pick(scores, list(scores))
    assert {why: len(ids) for why, ids in picked.items()} == {"best": 7, "worst": 7, "random": 6}
    assert len({id for ids in picked.values() for id in ids}) == 20
    assert {scores[id] for id in picked["best"]} == {49.0, 48.0}
    assert {scores[id] for id in picked["worst"]} == {0.0, 1.0}
    turned = pick(scores, list(scores), higher_is_better=False)
    assert {scores[id] for id in turned["best"]} == {0.0, 1.0}
    assert pick({}, ["a", "b"]).keys() == {"random"}
    few = pick({str(i): float(i) for i in range(9)}, [str(i) for i in range(9)])
    assert few == {"best": [str(i) for i in (8, 7, 6, 5, 4, 3, 2)], "worst": ["0", "1"]}


def hostile_page(tmp_path) -> str:
    """A report of captions, questions, ids and replies that try to become markup."""
    data = tmp_path / "data"
    official_files.write_vizwiz(data)
    path = data / "vizwiz/val.json"
    records = json.loads(path.read_text())
    for record in records:
        record["question"] = HOSTILE
        record["answer_type"] = HOSTILE
        record["answers"] = [{"answer": HOSTILE, "answer_confidence": "yes"}] * 10
    path.write_text(json.dumps(records))
    benchmark = benchmarks.make("vizwiz")
    output = tmp_path / "out"
    examples = benchmark.examples(data)
    run(
        benchmark,
        ShuffledResponder(benchmark, examples),
        examples=examples,
        output=output / HOSTILE[:8].strip("<"),
    )
    (name,) = [path.name for path in output.iterdir()]
    loaded = read_predictions(output / name, benchmark)
    result, per_example = score(benchmark, loaded, data, run=None)
    write_results(result, per_example, output / name / "results.json")
    report.write(output, data=data, names=[name], skipped={"x": HOSTILE})
    return (output / "report.html").read_text()


def test_hostile_captions_stay_text(tmp_path):
    text = "".join(inert(hostile_page(tmp_path)).words)
    assert text.count("<script>alert(1)</script>") >= 10 and "{{ 7*7 }}" in text
    assert "49" not in text.split()


def test_the_content_policy_allows_only_embedded_pictures_and_its_own_style(finished):
    assert_only_own_style((finished / "report.html").read_text())


def test_paper_values_are_complete():
    paper = yaml.safe_load(report.PAPER.read_text())
    for key in ("table_1", "table_2", "table_3", "table_4"):
        assert all(len(row) == len(paper[key]["columns"]) for row in paper[key]["rows"].values()), key
    assert paper["table_2"]["rows"]["VL-GPT-I"] == [133.7, 67.2, 51.5, 50.3, 38.9, 51.8, 11.53]
    assert paper["table_1"]["rows"]["VL-GPT"] == [80.22, 79.14]
    assert paper["table_3"]["rows"]["VL-GPT"] == [57.2, 58.6, 58.9, 38.9, 41.8, 44.2]
    assert set(paper["ours"]) <= set(paper["table_2"]["rows"])


@pytest.fixture(scope="module")
def two_results(data, tmp_path_factory):
    """The same shuffled answers scored in two modes, and another shuffle."""
    folder = tmp_path_factory.mktemp("compare")
    paths = []
    for name, seed, mode in (("a", 1, "official_2021"), ("b", 1, "always"), ("c", 2, "official_2021")):
        benchmark = benchmarks.make("vqav2", mode=mode)
        examples = benchmark.examples(data)
        run(
            benchmark,
            ShuffledResponder(benchmark, examples, seed=seed),
            examples=examples,
            output=folder / name,
        )
        from evaluation import manifest

        records = read_predictions(folder / name, benchmark)
        result, per_example = score(benchmark, records, data, run=manifest.read(folder / name))
        write_results(result, per_example, folder / name / "results.json")
        paths.append(folder / name / "results.json")
    return paths


def test_a_comparison_names_what_differs_in_protocol(two_results):
    a, b, c = two_results
    lines = compare(a, b)["protocol"]
    assert 'scoring.options.mode: "official_2021" | "always"' in lines
    assert "responder" not in " ".join(lines)
    assert "run.responder.seed: 1 | 2" in compare(a, c)["protocol"]
    assert compare(a, a)["protocol"] == []


def test_a_comparison_has_a_paired_interval_that_holds_the_difference(two_results):
    a, _, c = two_results
    paired = compare(a, c)["paired"]
    metrics = compare(a, c)["metrics"]["accuracy"]
    assert paired["low"] <= paired["difference"] <= paired["high"] and paired["num_pairs"] == 12
    assert paired["difference"] == pytest.approx(metrics["difference"])
    same = compare(a, a)["paired"]
    assert (same["low"], same["high"], same["is_significant"]) == (0, 0, False)
    assert compare(c, a)["paired"]["difference"] == pytest.approx(-paired["difference"])


def test_the_compare_command_prints_both(two_results, capsys):
    assert compare_main([str(two_results[0]), str(two_results[1])]) == 0
    shown = capsys.readouterr().out
    assert "scoring.options.mode" in shown and "accuracy" in shown and "interval" in shown
    assert compare_main([str(two_results[0]), str(two_results[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "vqav2"
