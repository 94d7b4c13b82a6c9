"""Laws of a run: predictions are the same for every batch size, process count, kill and restart."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from evaluation import benchmarks, manifest
from evaluation.predictions import PredictionLog, check_ids, merge, process_of, read_jsonl, read_shards
from evaluation.run import main as run_main
from evaluation.run import run, select
from evaluation.run_all import main as run_all_main
from evaluation.score import main as score_main
from evaluation.score import read_predictions, score
from tests.helpers.official_files import picture
from tests.helpers.processes import ROOT
from tests.helpers.word_responder import WordResponder
from vlgpt.decoding.api import DecodeSettings
from vlgpt.errors import UserError


def examples_of(name, data, **options):
    benchmark = benchmarks.make(name, **options)
    return benchmark, benchmark.examples(data)


@pytest.mark.parametrize("name", ["vqav2", "visdial", "coco_generation", "coco_reconstruction"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_predictions_do_not_depend_on_batch_size_or_processes(name, num_processes, data, tmp_path):
    benchmark, examples = examples_of(name, data)
    wanted = run(
        benchmark, WordResponder(), examples=examples, output=tmp_path / "one", batch_size=1
    ).read_bytes()
    for batch_size in (3, 8):
        output = tmp_path / f"{batch_size}"
        options = {"examples": examples, "output": output, "batch_size": batch_size}
        paths = [
            run(benchmark, WordResponder(), **options, num_processes=num_processes, rank=rank)
            for rank in range(num_processes)
        ]
        assert paths[-1].read_bytes() == wanted
        assert paths[:-1] == [None] * (num_processes - 1)
        assert {p.name: p.read_bytes() for p in (output / "images").glob("*")} == {
            p.name: p.read_bytes() for p in (tmp_path / "one/images").glob("*")
        }


class GroupResponder(WordResponder):
    """Draws three pictures at a time, each of which shows what was asked beside it, as rounding does."""

    draw_batch_size = 3

    def draw(self, prompts, decoding):
        assert len(prompts) <= self.draw_batch_size
        self.num_asked += len(prompts)
        beside = sum(int(prompt.id) for prompt in prompts)
        return [picture(1000 * beside + int(prompt.id)) for prompt in prompts]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_pictures_made_together_are_always_made_beside_the_same_others(num_processes, data, tmp_path):
    benchmark, examples = examples_of("coco_generation", data)
    run(benchmark, GroupResponder(), examples=examples, output=tmp_path / "one", batch_size=1)
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "one/images").glob("*")}
    assert len(wanted) == len(examples) > 3
    output = tmp_path / "two"
    options = {"examples": examples, "output": output, "batch_size": 8, "num_processes": num_processes}
    for rank in range(num_processes):
        run(benchmark, GroupResponder(), **options, rank=rank)
    assert {p.name: p.read_bytes() for p in (output / "images").glob("*")} == wanted
    (shard, *_) = sorted((output / "shards").iterdir(), key=lambda path: -path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-9])  # a kill in the middle of the last group
    for path in (output / "images").glob("*"):
        path.unlink()
    again = GroupResponder()
    assert run(benchmark, again, examples=examples, output=output).is_file()
    assert again.num_asked == 3
    assert all(path.read_bytes() == wanted[path.name] for path in (output / "images").glob("*"))


def test_every_example_belongs_to_exactly_one_process(data):
    _, examples = examples_of("vqav2", data)
    shares = [{e.id for e in examples if process_of(e.id, num_processes=3) == rank} for rank in range(3)]
    assert sum(map(len, shares)) == len(examples) and set.union(*shares) == {e.id for e in examples}


@pytest.mark.parametrize("breaks_after", [0, 1, 3])
def test_a_stopped_run_goes_on_and_asks_nothing_twice(breaks_after, data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    wanted = run(benchmark, WordResponder(), examples=examples, output=tmp_path / "whole", batch_size=2)
    output, broken = tmp_path / "resumed", WordResponder(breaks_after=breaks_after)
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, broken, examples=examples, output=output, batch_size=2)
    assert not (output / "predictions.jsonl").exists()
    again = WordResponder()
    path = run(benchmark, again, examples=examples, output=output, batch_size=2, num_processes=1)
    assert broken.num_asked + again.num_asked == len(examples)
    assert path.read_bytes() == wanted.read_bytes()


def test_a_line_cut_by_a_kill_is_asked_again(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    wanted = run(benchmark, WordResponder(), examples=examples, output=tmp_path).read_bytes()
    (shard,) = (tmp_path / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-9])
    (tmp_path / "predictions.jsonl").unlink()
    again = WordResponder()
    assert run(benchmark, again, examples=examples, output=tmp_path).read_bytes() == wanted
    assert again.num_asked == 1


def test_a_restart_with_more_processes_keeps_what_is_done(data, tmp_path):
    benchmark, examples = examples_of("gqa", data)
    wanted = run(benchmark, WordResponder(), examples=examples, output=tmp_path / "whole").read_bytes()
    output = tmp_path / "split"
    with pytest.raises(KeyboardInterrupt):
        run(benchmark, WordResponder(breaks_after=3), examples=examples, output=output, batch_size=1)
    asked = []
    for rank in range(3):
        responder = WordResponder()
        path = run(benchmark, responder, examples=examples, output=output, num_processes=3, rank=rank)
        asked.append(responder.num_asked)
    assert sum(asked) == len(examples) - 3 and path.read_bytes() == wanted


KILLED = """
import time
from pathlib import Path
from tests.helpers.word_responder import WordResponder
from evaluation import benchmarks
from evaluation.run import run

class Slow(WordResponder):
    def generate(self, prompts, decoding):
        time.sleep(0.05)
        return super().generate(prompts, decoding)

benchmark = benchmarks.make("vqav2")
run(benchmark, Slow(), examples=benchmark.examples(Path({data!r})), output=Path({output!r}), batch_size=1)
"""


def test_a_kill_signal_loses_no_finished_answer(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    wanted = run(benchmark, WordResponder(), examples=examples, output=tmp_path / "whole").read_bytes()
    output = tmp_path / "killed"
    code = KILLED.format(data=str(data), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 120
    while process.poll() is None and len(read_shards(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=600)
    done = len(read_shards(output))
    assert 3 <= done < len(examples)
    again = WordResponder()
    assert run(benchmark, again, examples=examples, output=output).read_bytes() == wanted
    assert again.num_asked == len(examples) - done


def test_another_protocol_may_not_continue_a_run(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    run(benchmark, WordResponder(), examples=examples, output=tmp_path)
    other, others = (
        benchmarks.make("vqav2", prompt_file="vlgpt-i"),
        WordResponder(identity={"export_hash": "x"}),
    )
    for key, asked, responder, changes in (
        ("prompt.hash", other, WordResponder(), {}),
        ("decoding.num_beams", benchmark, WordResponder(), {"decoding": DecodeSettings(num_beams=3)}),
        ("responder.export_hash", benchmark, others, {}),
        ("questions.n", benchmark, WordResponder(), {"examples": examples[:3]}),
    ):
        with pytest.raises(UserError, match="another protocol") as error:
            run(asked, responder, **{"examples": examples, "output": tmp_path, **changes})
        assert key in str(error.value)


def test_scoring_options_do_not_forbid_a_restart_but_answer_options_do(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    run(benchmark, WordResponder(), examples=examples, output=tmp_path / "a")
    other = benchmarks.make("vqav2", mode="always")
    assert run(other, WordResponder(), examples=examples, output=tmp_path / "a") is not None
    visdial, dialogs = examples_of("visdial", data)
    run(visdial, WordResponder(), examples=dialogs, output=tmp_path / "b")
    with pytest.raises(UserError, match=r"answer_options\.normalise"):
        run(
            benchmarks.make("visdial", normalise="mean"),
            WordResponder(),
            examples=dialogs,
            output=tmp_path / "b",
        )


def test_two_different_answers_to_one_question_are_an_error(tmp_path):
    for rank, text in enumerate(("a", "b")):
        log = PredictionLog(tmp_path, rank=rank, num_processes=2)
        log.write([{"id": "1", "text": text}])
        log.close()
    with pytest.raises(UserError, match="'1' has two answers"):
        merge(tmp_path, ["1"])


def test_an_answer_given_twice_counts_once(tmp_path):
    for rank in range(2):
        log = PredictionLog(tmp_path, rank=rank, num_processes=2)
        log.write([{"id": "1", "text": "a"}, {"id": "2", "text": "b"}])
        log.close()
    assert [r["id"] for r in read_jsonl(merge(tmp_path, ["2", "1"]))] == ["2", "1"]


def test_missing_duplicate_and_foreign_ids_are_errors_that_list_them(data):
    benchmark, examples = examples_of("gqa", data)
    records = [{"id": e.id, "text": "red"} for e in examples]
    bad = [*records[1:], records[1], {"id": "999", "text": "x"}]
    with pytest.raises(UserError) as error:
        score(benchmark, bad, data)
    message = str(error.value)
    assert f"1 missing ids: {records[0]['id']}" in message
    assert f"1 duplicate ids: {records[1]['id']}" in message and "1 foreign ids: 999" in message
    result, _ = score(benchmark, bad, data, is_partial=True)
    assert result["n"] == 7 and result["num_examples"] == 8
    assert result["ids"] == {
        "is_partial": True, "missing": [records[0]["id"]], "duplicate": [records[1]["id"]], "foreign": ["999"]
    }  # fmt: skip


def test_one_process_file_of_two_cannot_be_scored_as_the_whole(data, tmp_path):
    benchmark, examples = examples_of("coco_caption", data)
    run(benchmark, WordResponder(), examples=examples, output=tmp_path, num_processes=2, rank=0)
    shard = tmp_path / "shards/00000-of-00002.jsonl"
    assert 0 < len(read_jsonl(shard)) < len(examples)
    with pytest.raises(UserError, match="missing ids"):
        score(benchmark, read_predictions(shard, benchmark), data)


def test_a_long_list_of_ids_is_shortened():
    text = str(check_ids([], [str(i) for i in range(50)]))
    assert text == "50 missing ids: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 40 more"


def test_a_limit_takes_the_same_random_subset_in_order(data):
    _, examples = examples_of("vqav2", data)
    chosen = select(examples, limit=5, seed=0)
    assert len(chosen) == 5 and list(chosen) == [e for e in examples if e in chosen]
    assert chosen == select(examples, limit=5, seed=0) != select(examples, limit=5, seed=1)
    assert {e.id for e in select(examples, limit=4, seed=0)} < {e.id for e in chosen}


def test_the_command_lines_run_score_and_record_the_protocol(data, tmp_path):
    output, results = tmp_path / "out", tmp_path / "results.json"
    base = ["vqav2", "--data", str(data)]
    assert (
        run_main([*base, "--responder", "oracle", "--output", str(output), "--shots", "2", "--limit", "5"])
        == 0
    )
    assert (
        score_main([*base, "--predictions", str(output / "predictions.jsonl"), "--output", str(results)]) == 0
    )
    result = json.loads(results.read_text())
    assert result["metrics"]["accuracy"]["value"] == 100 and result["n"] == 5 and result["shots"] == "2"
    record = result["run"]
    assert record["prompt"]["id"] == "vlgpt/qa" and len(record["prompt"]["hash"]) == 16
    assert record["decoding"]["num_beams"] == 5 and record["shots"]["seed"] == 0
    assert record["shots"]["pool"]["n"] == 4 and record["subset"] == {"limit": 5, "seed": 0}
    assert {"python", "numpy", "pillow"} <= set(record["versions"])
    assert result["scoring"]["options"]["mode"] == "official_2021"
    assert len(result["predictions"]["sha256"]) == 64
    assert len(json.loads((tmp_path / "results.per_example.json").read_text())) == 5
    assert len(read_jsonl(output / "predictions.jsonl")[0]["shots"]) == 2


def test_scoring_imports_no_torch(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    run(benchmark, WordResponder(), examples=examples, output=tmp_path)
    code = (
        "import sys; from evaluation.score import main; "
        f"main(['vqav2', '--data', {str(data)!r}, '--predictions', {str(tmp_path / 'predictions.jsonl')!r}, "
        f"'--output', {str(tmp_path / 'r.json')!r}]); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_predictions_of_another_benchmark_are_refused(data, tmp_path):
    benchmark, examples = examples_of("vqav2", data)
    run(benchmark, WordResponder(), examples=examples, output=tmp_path)
    with pytest.raises(UserError, match="holds predictions of vqav2, not of gqa"):
        score_main(
            ["gqa", "--data", str(data), "--predictions", str(tmp_path), "--output", str(tmp_path / "r.json")]
        )


def test_a_picture_outside_the_predictions_folder_is_refused(data, tmp_path):
    benchmark, _ = examples_of("coco_generation", data)
    (tmp_path / "predictions.jsonl").write_text('{"id": "00000", "image": "../../etc/secret.png"}\n')
    with pytest.raises(UserError, match="is outside"):
        read_predictions(tmp_path, benchmark)


def test_a_folder_of_pictures_counts_as_predictions(data, tmp_path):
    benchmark, examples = examples_of("coco_generation", data)
    for example in examples:
        picture(1).save(tmp_path / f"{example.id}.png")
    assert [record["id"] for record in read_predictions(tmp_path, benchmark)] == [e.id for e in examples]


def test_the_export_hash_sees_weights_and_names_but_not_the_card(tmp_path):
    (tmp_path / "picture_decoder").mkdir()
    for name in ("config.json", "model.safetensors", "picture_decoder/model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(name.encode())
    first = manifest.export_hash(tmp_path)
    (tmp_path / "README.md").write_text("other words")
    assert manifest.export_hash(tmp_path) == first
    (tmp_path / "picture_decoder/model.safetensors").write_bytes(b"other weights")
    second = manifest.export_hash(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "config2.json")
    assert len({first, second, manifest.export_hash(tmp_path)}) == 3


def test_scores_that_are_not_numbers_are_never_published(data):
    benchmark, examples = examples_of("visdial", data)
    records = [{"id": e.id, "scores": [float("nan")] * 100} for e in examples]
    with pytest.raises(ValueError, match="NaN"):
        score(benchmark, records, data)
    with pytest.raises(UserError, match="has 99 scores for 100 options"):
        score(benchmark, [{"id": e.id, "scores": list(np.zeros(99))} for e in examples], data)


@pytest.mark.parametrize("main", [run_main, run_all_main])
def test_a_rank_outside_the_processes_is_refused(main, tmp_path):
    """`--array=3,5` counts two tasks: without a word their shares would never be answered."""
    place = ["vqav2", "--model", "m", "--data", "d", "--output", "o"] if main is run_main else ["m", "d", "o"]
    with pytest.raises(UserError, match="NUM_TASKS"):
        main([*place, "--num-processes", "2", "--rank", "3"])
