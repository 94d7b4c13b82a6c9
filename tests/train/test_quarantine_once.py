"""Laws of a run around its steps, without DeepSpeed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from tests.helpers.runs import run_settings
from tests.helpers.small_data import pair, picture, write_dataset
from vlgpt.train.loop import Run
from vlgpt.train.run import batches_for_statistics, begin, open_loader


def two_bad(number: int) -> tuple[str, bytes]:
    return ("png", b"no image") if number in (2, 5) else picture(number)


def test_a_bad_sample_that_statistics_meet_too_is_written_to_the_quarantine_once(tmp_path):
    folder = write_dataset(
        tmp_path / "pairs", [pair(n) for n in range(8)], shard_sizes=[8], make_picture=two_bad
    )
    data = {"sources": [{"name": "pairs", "path": str(folder)}], "pixels": True, "image_size_px": 8}
    settings = run_settings(
        output_dir=str(tmp_path / "run"),
        stage={"kind": "image_tokenizer"},
        data={**data, "num_workers": 0, "max_bad_fraction": 1.0},
        steps=2,
        global_batch=4,
        micro_batch=4,
    )
    seen = []
    stage = SimpleNamespace(
        batch_kind="conditions",
        document_tokenizer=None,
        count_targets=lambda batch: {},
        prepare=lambda batches, all_sum: seen.extend(next(batches).documents for _ in range(2)),
    )
    engine = SimpleNamespace(
        settings=settings,
        stage=stage,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        place=lambda batch: batch,
        gather_objects=lambda value: [value],
        all_sum=lambda values: values,
    )
    quarantine = tmp_path / "run" / "bad.jsonl"
    loader = open_loader(engine, settings.data, quarantine=quarantine)
    run = Run(settings=settings, engine=engine, loader=loader, facts={})
    assert begin(run).step == 0
    trained = [next(loader).documents for _ in range(2)]
    with batches_for_statistics(run) as batches:
        finished = [next(batches).documents for _ in range(2)]
    assert seen == trained == finished  # the same samples, the bad ones among them
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert len(lines) == 2 == len({line["key"] for line in lines})
