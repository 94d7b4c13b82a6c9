"""A real (tiny, random) export goes through the whole evaluation: every benchmark, resumed, in any batch size."""

import json
from dataclasses import replace

import pytest

from evaluation import benchmarks
from evaluation.predictions import read_jsonl
from evaluation.responders import ModelResponder
from evaluation.run import run
from evaluation.run_all import main as run_all
from tests.helpers.official_files import ALL
from vlgpt.errors import UserError

JOBS = """
- {benchmark: easy_vqa, shots: 2}
- {benchmark: coco_caption}
- {benchmark: vizwiz, shots: dagger, options: {second_prompt: qa_answerable}}
- {benchmark: vqav2, shots: 2}
- {benchmark: okvqa}
- {benchmark: gqa}
- {benchmark: visdial}
- {benchmark: coco_reconstruction, needs: [clip]}
- {benchmark: flickr30k_reconstruction, needs: [clip]}
- {benchmark: magicbrush, needs: [clip]}
- {benchmark: coco_generation, needs_any: [inception, fd_clip], optional: [clip]}
"""


def test_an_export_runs_through_every_kind_of_benchmark(export, data, clip_folder, tmp_path):
    job_list = tmp_path / "jobs.yaml"
    job_list.write_text(JOBS)
    arguments = [str(export), str(data), str(tmp_path / "out"), "--jobs", str(job_list), "--limit", "3"]
    arguments += ["--num-beams", "2", "--clip", str(clip_folder), "--fd-clip", str(clip_folder)]
    assert run_all(arguments) == 0
    summary = json.loads((tmp_path / "out/results.json").read_text())
    assert {result["benchmark"] for result in summary["results"].values()} == set(ALL)
    assert not summary["skipped"]
    answerable = [r["answerable"] for r in read_jsonl(tmp_path / "out/vizwiz-dagger-seed0/predictions.jsonl")]
    assert len(answerable) == 3 and all(0 < share < 1 for share in answerable)
    for result in summary["results"].values():
        responder = result["run"]["responder"]
        assert len(responder["export_hash"]) == 32 and responder["template"] == "short"
        assert responder["encoder_hash"] and responder["decoder_hash"] and result["n"] == 3
        assert "<img" in (tmp_path / "out/report.html").read_text()
    pictures = read_jsonl(tmp_path / "out/coco_generation/predictions.jsonl")
    assert all((tmp_path / "out/coco_generation" / record["image"]).is_file() for record in pictures)


@pytest.mark.parametrize("name", ["easy_vqa", "visdial", "coco_generation", "coco_reconstruction"])
def test_a_models_predictions_do_not_depend_on_the_batch_size(name, export, data, tmp_path):
    responder = ModelResponder.load(export)
    benchmark = benchmarks.make(name)
    examples = benchmark.examples(data)[:6]
    files = [
        run(benchmark, responder, examples=examples, output=tmp_path / str(size), batch_size=size)
        for size in (1, 3, 8)
    ]
    first = files[0].read_text()
    assert [file.read_text() for file in files[1:]] == [first, first]
    for picture in (tmp_path / "1/images").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "8/images" / picture.name).read_bytes()


def test_pictures_change_with_the_seed_only_where_the_decoder_draws_noise(export, data):
    responder = ModelResponder.load(export)
    benchmark = benchmarks.make("coco_reconstruction")
    prompts = [example.prompt for example in benchmark.examples(data)[:2]]
    first, again = (responder.reconstruct(prompts, benchmark.decoding) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    text_only = responder.reconstruct(prompts, replace(benchmark.decoding, use="text"))
    assert text_only[0].tobytes() != first[0].tobytes()


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is no export folder \(no config.json\)"):
        ModelResponder.load(tmp_path)
