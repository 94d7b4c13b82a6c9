"""The whole way at miniature size, through the real commands: pictures -> shards -> three stages -> replies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.processes import ROOT
from vlgpt.train.supervise import with_fresh_port

SMALL = [
    "steps=4",
    "log_interval_steps=2",
    "checkpoint.interval_steps=2",
    "optimizer.warmup_steps=1",
]
SHAPES = "{num_patches: 5, patch_width: 32, image_tokens: 5, image_width: 32, text_tokens: 8, text_width: 32}"
TINY = "{width: 32, depth: 1, num_heads: 2, mlp_ratio: 2.0, init_std: 1.0}"


def run(*command, folder, timeout_s=800):
    """Run a command from the repository root; returns its stdout."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def train(launcher, config, folder, *overrides, through=("python",)):
    start = [sys.executable] if through == ("python",) else list(through)
    return run(
        *start,
        f"{launcher}.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--config",
        f"demo/configs/{config}.yaml",
        *SMALL,
        *overrides,
        folder=folder,
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Everything up to the tuned export, in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("pipe line")
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = []
    rng = np.random.default_rng(0)
    for number in range(40):
        colour = rng.integers(0, 255, 3)
        picture = np.full((30, 30, 3), 255, np.uint8)
        picture[5:25, 5:25] = colour
        Image.fromarray(picture).save(pictures / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": f"a square of colour {colour[0]} {colour[1]}"})
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shards, model = folder / "shards", folder / "language_model"
    run(
        sys.executable,
        "-m",
        "data_prep.build",
        "folder",
        "--input",
        pictures,
        "--output",
        shards,
        folder=folder,
    )
    sizes = [
        "--vocabulary-size",
        "400",
        "--width",
        "32",
        "--depth",
        "1",
        "--num-heads",
        "2",
        "--mlp-width",
        "64",
    ]
    run(sys.executable, "-m", "demo.text_tokenizer", shards, "--output", model, *sizes, folder=folder)
    run(sys.executable, "-m", "data_prep.index", shards, "--tokenizer", model, folder=folder)
    train_all(folder, shards, model)
    return folder


def train_all(folder, shards, model):
    source = f"data.sources=[{{name: a, path: '{shards}'}}]"
    clip = ["stage.image_size_px=24", "data.image_size_px=24", "stage.width=32", "stage.head_width=16"]
    clip += [
        "stage.image_depth=2",
        "stage.text_depth=1",
        "stage.context_length=8",
        f"stage.text_tokenizer={model}",
    ]
    batch = ["global_batch=8", "micro_batch=8"]
    train("demo/train_parts", "clip", folder, source, *clip, *batch, f"output_dir={folder}/clip")
    features = ["--encoder", folder / "clip/result", "--features", "patches,image_condition,text_condition"]
    run(sys.executable, "-m", "data_prep.features", shards, *features, "--views", "2", folder=folder)
    shapes = [source, f"stage.shapes={SHAPES}"]
    decoder = ["stage.size_px=24", "data.image_size_px=24", *batch, f"output_dir={folder}/decoder"]
    train("demo/train_parts", "decoder", folder, *shapes, *decoder)
    tokenizer = [
        f"stage.tokenizer={TINY}",
        f"stage.detokenizer={TINY}",
        "stage.num_visual=3",
        "stage.visual_width=16",
    ]
    two = with_fresh_port(["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"])
    tokenizer += ["global_batch=8", "micro_batch=2", f"output_dir={folder}/tokenizer"]
    train("launchers/train_tokenizer", "tokenizer", folder, *shapes, *tokenizer, through=two)
    common = [source, "global_batch=2", "micro_batch=2", "data.sequence_length=64"]
    common += [f"stage.encoder.path={folder}/clip/result", f"stage.picture_decoder={folder}/decoder/result"]
    language = [f"stage.language_model={model}", f"stage.image_tokenizer={folder}/tokenizer/result"]
    train("launchers/pretrain", "pretrain", folder, *common, *language, f"output_dir={folder}/pretrain")
    tuned = [f"stage.language_model={folder}/pretrain/result", f"output_dir={folder}/finetune"]
    train("launchers/finetune", "finetune", folder, *common, *tuned)


@pytest.mark.launcher
def test_every_stage_commits_logs_and_writes_a_result(pipeline):
    for name in ("clip", "decoder", "tokenizer", "pretrain", "finetune"):
        run_dir = pipeline / name
        assert (run_dir / "result" / "done.json").is_file(), name
        assert (run_dir / "checkpoints" / "step_00000004" / "COMMITTED.json").is_file(), name
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert any(key.startswith("loss/") for record in records for key in record), name
        assert (run_dir / "config.yaml").is_file()


@pytest.mark.launcher
def test_a_finished_stage_does_nothing(pipeline):
    before = (pipeline / "decoder" / "metrics.jsonl").read_text()
    shards = pipeline / "shards"
    train(
        "demo/train_parts",
        "decoder",
        pipeline,
        f"data.sources=[{{name: a, path: '{shards}'}}]",
        f"stage.shapes={SHAPES}",
        "stage.size_px=24",
        "data.image_size_px=24",
        "global_batch=8",
        "micro_batch=8",
        f"output_dir={pipeline}/decoder",
    )
    assert (pipeline / "decoder" / "metrics.jsonl").read_text() == before


@pytest.mark.launcher
def test_stage_two_left_the_image_tokenizer_as_stage_one_made_it(pipeline):
    made = load_file(pipeline / "tokenizer" / "result" / "image_tokenizer" / "model.safetensors")
    carried = load_file(pipeline / "finetune" / "result" / "model.safetensors")
    for name, tensor in made.items():
        assert (carried[f"image_tokenizer.{name}"] == tensor).all(), name


@pytest.mark.launcher
def test_the_export_replies_with_text_and_pictures_that_carry_the_prompt(pipeline):
    out = pipeline / "out"
    prompt = "<image> draw <it> & more"
    picture = pipeline / "pictures" / "00.png"
    arguments = [
        "--model",
        pipeline / "finetune/result",
        "--output",
        out,
        "--images",
        "force",
        "--image",
        picture,
    ]
    printed = run(sys.executable, "-m", "vlgpt", "generate", *arguments, "--prompt", prompt, folder=pipeline)
    record = json.loads(printed)
    assert record["images"] == [str(out / "00.png")]
    with Image.open(out / "00.png") as image:
        assert image.size == (24, 24) and image.text["prompt"] == prompt
    sheet = pipeline / "sheet.png"
    arguments = ["--model", pipeline / "finetune/result", picture, "--output", sheet]
    run(sys.executable, "-m", "vlgpt", "reconstruct", *arguments, folder=pipeline)
    width, height = Image.open(sheet).size  # four enlarged cells below their names
    assert width % 4 == 0 and width // 4 >= 24 and width // 4 < height < 2 * (width // 4)


@pytest.mark.launcher
def test_an_export_of_the_commit_equals_the_result_of_the_run(pipeline):
    target = pipeline / "again"
    run(sys.executable, "-m", "vlgpt", "export", pipeline / "pretrain", "--output", target, folder=pipeline)
    first = load_file(pipeline / "pretrain" / "result" / "model.safetensors")
    second = load_file(target / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor == second[name]).all(), name
    shutil.rmtree(target)
