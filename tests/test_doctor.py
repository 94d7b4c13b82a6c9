"""Seeded faults, each found with its fix; a sound configuration has none."""

import pytest
import torch
import yaml

from vlgpt.config import validate
from vlgpt.doctor import environment
from vlgpt.doctor.environment import batch_bytes, check_environment, numbers
from vlgpt.doctor.lint import lint
from vlgpt.settings import RunSettings


def language(tmp_path, **stage):
    """A sound stage-2 configuration whose folders exist."""
    shards = tmp_path / "data" / "pairs"
    shards.mkdir(parents=True, exist_ok=True)
    (shards / "00000.tar").touch()
    (shards / "00000.patches.npy").touch()
    (tmp_path / "stage1").mkdir(exist_ok=True)
    return {
        "name": "test",
        "output_dir": str(tmp_path / "run"),
        "stage": {
            "kind": "language",
            "language_model": "huggyllama/llama-7b",
            "image_tokenizer": str(tmp_path / "stage1"),
            **stage,
        },
        "data": {"sources": [{"name": "pairs", "path": str(shards)}], "features": ["patches"]},
        "optimizer": {"lr": 2e-4, "warmup_steps": 10},
        "steps": 2000,
        "global_batch": 64,
        "micro_batch": 8,
    }


def image(tmp_path):
    values = language(tmp_path)
    for name in ("image_condition", "text_condition"):
        (tmp_path / "data" / "pairs" / f"00000.{name}.npy").touch()
    values["stage"] = {"kind": "image_tokenizer"}
    values["data"]["features"] = ["patches", "image_condition", "text_condition"]
    return values


def findings(tmp_path, values, **options):
    path = tmp_path / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return lint(path, **options)


def edit(values, key, value):
    *steps, last = key.split(".")
    for step in steps:
        values = values[int(step)] if step.isdigit() else values.setdefault(step, {})
    if value is None:
        values.pop(last)
    else:
        values[last] = value


def test_a_sound_configuration_has_no_findings(tmp_path):
    assert findings(tmp_path, language(tmp_path), num_processes=4) == []
    assert findings(tmp_path, image(tmp_path), num_processes=4) == []


SOURCE = {"name": "pairs", "path": "/nonexistent/folder", "weight": 1.0}
# base, key, faulty value, words of the finding, words of the fix
FAULTS = [
    (language, "optimizer.learning_rate", 1e-4, "learning_rate", "correct this key"),
    (language, "optimizer.lr", "fast", "lr", "correct this key"),
    (language, "steps", None, "steps", "correct this key"),
    (language, "stage.trained", "some", "trained", "correct this key"),
    (language, "global_batch", 60, "global_batch 60", "global_batch=64"),
    (language, "optimizer.warmup_steps", 3000, "warmup_steps 3000", "warmup_steps=60"),
    (language, "optimizer.betas", [0.98, 0.9], "wrong order", "[0.9, 0.98]"),
    (language, "optimizer.lr", 0.5, "very high", "2e-4"),
    (language, "checkpoint.interval_steps", 9000, "beyond the last step", "interval_steps=200"),
    (language, "data.sources.0.path", "/nonexistent/folder", "does not exist", "docs/datasets.md"),
    (language, "data.sources.0.path", "EMPTY", "no shards", "data_prep.build"),
    (language, "data.features", ["patches", "visual"], "'visual' is not computed", "data_prep.features"),
    (language, "data.sources.0.weight", 0.0, "all weights are 0", "at least one"),
    (language, "data.sources.0.ramp", [0.6, 0.4], "ends before it begins", "[0.4, 0.6]"),
    (language, "data.temperature", 2.0, "no effect", "mixing=temperature"),
    (language, "data.features", [], "neither patches nor visual", "data.pixels=true"),
    (language, "data", {"pixels": True}, "needs an encoder", "stage.encoder="),
    (language, "data.pixels", True, "patches are read from disk", "data.pixels=false"),
    (language, "data.sequence_length", 32, "cannot hold one image", "sequence_length=512"),
    (language, "stage.template", "alpaca", "'alpaca' is unknown", "vicuna"),
    (language, "stage.image_tokenizer", None, "plain language model", "result folder of stage 1"),
    (language, "stage.init_from", "/no/such/run", "init_from", "run the stage before"),
    (language, "stage.init_from", "EMPTY", "no committed weights", "run folder of stage 2"),
    (language, "stage.attention", "flash_attention_2", "not installed", "flash-attn"),
    (language, "stage", {"text_weight": 0.0, "visual_weight": 0.0}, "nothing is trained", "1.0"),
    (language, "faults", {"spike_rollback": True, "spike_sigma": 0.0}, "spike_sigma is 0", "spike_sigma=6.0"),
    (language, "validation", {"sources": ["TRAIN"]}, "trained on too", "held-out"),
    (language, "data.sources", ["TRAIN", "TRAIN"], "stands twice", "its own name"),
    (image, "stage.tokenizer", {"width": 1000, "num_heads": 16}, "not divisible", "num_heads"),
    (image, "data.features", ["patches", "image_condition"], "no text_condition", "add text_condition"),
    (image, "stage.encoder", {"path": "ViT-B-16"}, "197 of 768", "num_patches=197"),
    (
        image,
        "stage.tokenizer_from",
        "/no/such/result",
        "holds no image_tokenizer",
        "result folder of stage 1",
    ),
    (image, "stage.frozen", ["tokenizer", "detokenizer"], "nothing would be trained", "correct this key"),
    (language, "stage.frozen", ["embeddings"], "trained=all", "correct this key"),
    (language, "stage.encoder", {"path": "x.json", "library": "ip_adapter"}, "no patches", "transformers"),
    (
        image,
        "stage.conditioner",
        {"path": "/no/parts.json", "library": "ip_adapter"},
        "is no file",
        "docs/decoders.md",
    ),
]


@pytest.mark.parametrize(
    "base, key, value, words, fix", FAULTS, ids=[f"{f[1]}-{n}" for n, f in enumerate(FAULTS)]
)
def test_a_seeded_fault_is_found_with_its_fix(tmp_path, base, key, value, words, fix):
    values = base(tmp_path)
    source = values["data"]["sources"][0]
    if value == "EMPTY":
        value = str(tmp_path / "empty")
        (tmp_path / "empty").mkdir()
    if isinstance(value, list):
        value = [source if item == "TRAIN" else item for item in value]
    if isinstance(value, dict):
        value = {k: [source] if v == ["TRAIN"] else v for k, v in value.items()}
        if key == "data":
            value = {**values["data"], "features": [], **value}
        elif key == "stage":
            value = {**values["stage"], **value}
    edit(values, key, value)
    found = findings(tmp_path, values, num_processes=4)
    assert len(found) == 1, found
    assert words in found[0].text
    assert fix in found[0].fix
    assert found[0].level in ("error", "warning")


def test_a_key_that_stands_twice_is_found(tmp_path):
    text = yaml.safe_dump(language(tmp_path)) + "\nsteps: 3000\n"
    (found,) = findings(tmp_path, text)
    assert "'steps' stands twice" in found.text


def test_the_environment_is_read_without_errors_here():
    found = check_environment()
    assert not [finding for finding in found if finding.level == "error"]
    assert any("gloo" in f.text or "GPU 0" in f.text for f in found)
    assert numbers("2.15.0+cpu") == (2, 15, 0) > numbers("2.6")


def test_a_disk_that_is_too_small_for_the_checkpoints_is_an_error(tmp_path, monkeypatch):
    run = validate(RunSettings, language(tmp_path), where="test")
    usage = type("Usage", (), {"free": 5 << 30})
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: usage)
    (found,) = [f for f in environment.check_environment(run) if f.level == "error"]
    assert "5.0 GiB free" in found.text and "checkpoint.keep" in found.fix


def test_what_doctor_says_of_a_batch_is_the_most_that_the_loader_makes(tmp_path):
    values = language(tmp_path)
    values["data"] = {**values["data"], "features": [], "pixels": True, "image_size_px": 224}
    run = validate(RunSettings, values, where="test")
    # 512 positions hold at most 15 images of 32 embeddings and two marks
    assert batch_bytes(run) == 8 * (512 * 24 + 15 * 3 * 224 * 224)
    (found,) = [f for f in check_environment(run, num_processes=4) if "loaders hold" in f.text]
    assert "4 x 4 batches of 18.2 MB" in found.text and found.level == "ok"
    deep = validate(RunSettings, {**values, "global_batch": 64 * 4096}, where="test")
    assert batch_bytes(deep) == batch_bytes(run), "accumulation costs nothing"
    greedy = {**values["data"], "prefetch_batches": 10_000, "prefetch_bytes": 1 << 50}
    run = validate(RunSettings, {**values, "data": greedy, "micro_batch": 64}, where="test")
    (found,) = [f for f in check_environment(run, num_processes=8) if "loaders hold" in f.text]
    assert found.level == "warning" and "data.prefetch_bytes" in found.fix
    run = validate(RunSettings, image(tmp_path), where="test")
    numbers = 257 * 1024 + 16 * 768 + 77 * 768
    assert batch_bytes(run) == 8 * (4 + 4 * numbers)


def test_a_limit_on_open_files_that_a_run_will_reach_is_an_error(tmp_path, monkeypatch):
    run = validate(RunSettings, language(tmp_path), where="test")
    for limit, level in ((256, "error"), (300, "ok")):
        monkeypatch.setattr(environment.resource, "getrlimit", lambda _, limit=limit: (limit, 4096))
        (found,) = [f for f in environment.check_environment(run) if "ulimit -n" in f.text]
        assert found.level == level
        assert "259" in found.text, "one tar, its features and their scales, and a process's own files"
        assert ("ulimit -n 259" in found.fix) == (level == "error")


@pytest.mark.parametrize(
    ("num_gpus", "free", "level"), [(8, 64 << 20, "warning"), (8, 2 << 30, "ok"), (0, 0, "ok")]
)
def test_a_small_dev_shm_matters_to_nccl_only(num_gpus, free, level, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which asks for the count
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    (found,) = [f for f in environment.check_environment() if "/dev/shm" in f.text]
    assert found.level == level
    assert ("--shm-size" in found.fix) == (level == "warning")
