"""The probe during training is the evaluation of the export, on fewer examples."""

import pytest
import torch

from evaluation import benchmarks
from evaluation.predictions import read_jsonl
from evaluation.responders import ModelResponder
from evaluation.run import run, select
from evaluation.score import score
from evaluation.training_probe import make_probe
from tests.helpers.official_files import write_coco, write_easy_vqa
from tests.helpers.runs import run_settings
from tests.helpers.tiny_clip import save_fitting_clip
from tests.helpers.tiny_unified import new_document_tokenizer, new_model
from vlgpt.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export with its CLIP, and small official files."""
    from vlgpt.export import export_model

    folder = tmp_path_factory.mktemp("probe")
    tokenizer = new_document_tokenizer()
    save_fitting_clip(folder / "clip")
    encoder = {"path": str(folder / "clip"), "library": "open_clip", "layer": -2, "has_cls": True}
    export_model(
        new_model(tokenizer, num_patches=5).eval(), folder / "export", tokenizer=tokenizer, encoder=encoder
    )
    write_coco(folder / "data")
    write_easy_vqa(folder / "data")
    return folder


def settings_of(folder, *probes, kind="language"):
    stage = {"kind": "language", "language_model": str(folder / "export"), "template": "short"}
    stage["encoder"] = {"path": str(folder / "clip")}
    stage = stage if kind == "language" else {"kind": "image_tokenizer"}
    return run_settings(output_dir=str(folder / "run"), stage=stage, validation={"probes": probes})


def questions(folder, name, **more):
    return {"benchmark": name, "data": str(folder / "data"), "num_examples": 4, **more}


def test_a_probe_gives_what_the_evaluation_of_the_export_gives(folder, tmp_path):
    from vlgpt.stages.build import build_stage

    names = ("coco_caption", "easy_vqa")
    settings = settings_of(folder, *(questions(folder, name, batch_size=3) for name in names))
    stage = build_stage(settings, num_sources=1)
    parts = list(make_probe(settings)(stage.eval(), 10))
    assert parts.count({}) == 4, "a sign of life after each batch: 2 of up to 3 examples for every benchmark"
    found = {name: value for part in parts for name, value in part.items()}
    responder = ModelResponder.load(folder / "export")
    for name in names:
        benchmark = benchmarks.make(name)
        examples = benchmark.examples(folder / "data")
        subset = {"limit": 4, "seed": 0}
        chosen = select(examples, **subset)
        path = run(benchmark, responder, examples=chosen, output=tmp_path / name, subset=subset)
        wanted, _ = score(benchmark, read_jsonl(path), folder / "data", run={"subset": subset})
        for metric, value in wanted["metrics"].items():
            assert found[f"{name}/{metric}"] == pytest.approx(value["value"]), (name, metric)
    assert len(found) >= 3


def test_a_probe_works_on_a_stage_in_bf16_as_training_holds_it(folder):
    from vlgpt.stages.build import build_stage

    settings = settings_of(folder, questions(folder, "coco_caption"), questions(folder, "easy_vqa"))
    stage = build_stage(settings, num_sources=1)
    parts = make_probe(settings)(stage.to(torch.bfloat16).eval(), 10)
    assert any("easy_vqa/accuracy" in part for part in parts)


@pytest.mark.parametrize(
    "probe, kind, reason",
    [
        ("nonsense", "language", "benchmark 'nonsense' is unknown"),
        ("coco_reconstruction", "language", "draws images"),
        ("coco_caption", "image_tokenizer", "validation.probes are for stage.kind=language"),
    ],
)
def test_a_probe_that_cannot_be_asked_is_refused(folder, probe, kind, reason):
    with pytest.raises(UserError, match=reason):
        make_probe(settings_of(folder, questions(folder, probe), kind=kind))
