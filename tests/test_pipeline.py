"""The whole way at miniature size, through the real commands: pictures -> shards -> three stages -> replies.

Every step is a fixture, made when it is first asked for, by a fork of a process that has everything imported. Stage 1
alone is started by the `deepspeed` launcher, on two ranks: the one start of it in `make test`.
"""

import json
import subprocess

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.builds import build_arguments, write_imagefolder
from tests.helpers.processes import ROOT, environment
from vlgpt.images import png_bytes
from vlgpt.train.supervise import with_fresh_port

SMALL = ("steps=4", "log_interval_steps=2", "checkpoint.interval_steps=2", "optimizer.warmup_steps=1")
SHAPES = "{num_patches: 5, patch_width: 32, image_tokens: 5, image_width: 32, text_tokens: 8, text_width: 32}"
TINY = "{width: 32, depth: 1, num_heads: 2, mlp_ratio: 2.0, init_std: 1.0}"
EIGHT = ("global_batch=8", "micro_batch=8")
STAGES = ("clip", "decoder", "tokenizer", "pretrain", "finetune")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its name has a space."""
    return tmp_path_factory.mktemp("pipe line")


@pytest.fixture(scope="module")
def run(forks, folder):
    """Runs a command from the root of the repository."""

    def run_command(*command):
        command, log = [str(part) for part in command], folder / "log"
        assert forks.run(command, folder=ROOT, log=log) == [0], f"{command}\n{log.read_text()[-4000:]}"

    return run_command


def training(launcher, config, folder, *overrides):
    """The command of a run that writes to `folder`."""
    start = (
        f"{launcher}.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--config",
        f"demo/configs/{config}.yaml",
    )
    return [*start, *SMALL, *overrides, f"output_dir={folder}"]


def square(number):
    picture, colour = np.full((30, 30, 3), 255, np.uint8), np.random.default_rng(number).integers(0, 255, 3)
    picture[5:25, 5:25] = colour
    return png_bytes(Image.fromarray(picture)), f"a square of colour {colour[0]} {colour[1]}"


@pytest.fixture(scope="module")
def source(run, folder):
    """Shards with token lengths, and the random language model whose tokenizer was trained on them."""
    files = [(f"{n:02d}.png", data, {"text": text}) for n, (data, text) in enumerate(map(square, range(40)))]
    pictures, shards, model = write_imagefolder(folder / "pictures", files), folder / "shards", folder / "lm"
    run("-m", "data_prep.build", *build_arguments("folder", pictures, shards))
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
    run("-m", "demo.text_tokenizer", shards, "--output", model, *sizes)
    run("-m", "data_prep.index", shards, "--tokenizer", model)
    return f"data.sources=[{{name: a, path: '{shards}'}}]"


@pytest.fixture(scope="module")
def clip(run, folder, source):
    """The image encoder, and its features beside the shards."""
    sizes = (
        "stage.image_size_px=24 data.image_size_px=24 stage.width=32 stage.head_width=16 stage.image_depth=2"
    )
    sizes += " stage.text_depth=1 stage.context_length=8"
    text = f"stage.text_tokenizer={folder}/lm"
    run(*training("demo/train_parts", "clip", folder / "clip", source, *sizes.split(), text, *EIGHT))
    features = ("--encoder", folder / "clip/result", "--features", "patches,image_condition,text_condition")
    run("-m", "data_prep.features", folder / "shards", *features, "--views", "2")
    return folder / "clip"


@pytest.fixture(scope="module")
def decoder_training(folder, source, clip):
    sizes = (f"stage.shapes={SHAPES}", "stage.size_px=24", "data.image_size_px=24")
    return training("demo/train_parts", "decoder", folder / "decoder", source, *sizes, *EIGHT)


@pytest.fixture(scope="module")
def decoder(run, folder, decoder_training):
    run(*decoder_training)
    return folder / "decoder"


@pytest.fixture(scope="module")
def tokenizer(folder, source, clip):
    """Stage 1, by the launcher."""
    sizes = (f"stage.shapes={SHAPES}", f"stage.tokenizer={TINY}", f"stage.detokenizer={TINY}")
    sizes += ("stage.num_visual=3", "stage.visual_width=16", "global_batch=8", "micro_batch=2")
    command = training("launchers/train_tokenizer", "tokenizer", folder / "tokenizer", source, *sizes)
    two = with_fresh_port(["deepspeed", "--num_accelerators", "2", "--master_port", "{port}"])
    variables = environment(TORCH_EXTENSIONS_DIR=folder / "extensions")
    done = subprocess.run(
        [*two, *command], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def language(folder, source, clip, decoder, tokenizer):
    """The command of a stage of the language model, whose pictures the clip encodes and the decoder draws."""
    sizes = ("global_batch=2", "micro_batch=2", "data.sequence_length=64")
    parts = (f"stage.encoder.path={clip}/result", f"stage.picture_decoder={decoder}/result")
    common = (source, *sizes, *parts)
    return lambda launcher, config, place, *more: training(launcher, config, place, *common, *more)


@pytest.fixture(scope="module")
def pretrain(run, folder, tokenizer, language):
    models = (f"stage.language_model={folder}/lm", f"stage.image_tokenizer={tokenizer}/result")
    run(*language("launchers/pretrain", "pretrain", folder / "pretrain", *models))
    return folder / "pretrain"


@pytest.fixture(scope="module")
def finetune(run, folder, pretrain, language):
    model = f"stage.language_model={pretrain}/result"
    run(*language("launchers/finetune", "finetune", folder / "finetune", model))
    return folder / "finetune"


@pytest.mark.launcher
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_commits_logs_and_writes_a_result(request, name):
    run_dir = request.getfixturevalue(name)
    assert (run_dir / "result" / "done.json").is_file()
    assert (run_dir / "checkpoints" / "step_00000004" / "COMMITTED.json").is_file()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("loss/") for record in records for key in record)
    assert (run_dir / "config.yaml").is_file()


def test_a_finished_stage_does_nothing(run, decoder, decoder_training):
    before = (decoder / "metrics.jsonl").read_text()
    run(*decoder_training)
    assert (decoder / "metrics.jsonl").read_text() == before


@pytest.mark.launcher
def test_stage_two_left_the_image_tokenizer_as_stage_one_made_it(tokenizer, finetune):
    made = load_file(tokenizer / "result" / "image_tokenizer" / "model.safetensors")
    carried = load_file(finetune / "result" / "model.safetensors")
    for name, tensor in made.items():
        assert (carried[f"image_tokenizer.{name}"] == tensor).all(), name


@pytest.mark.launcher
def test_the_export_replies_with_text_and_pictures_that_carry_the_prompt(run, folder, finetune):
    out, sheet, picture = folder / "out", folder / "sheet.png", folder / "pictures" / "00.png"
    prompt, model = "<image> draw <it> & more", ("--model", finetune / "result")
    asked = ("--images", "force", "--image", picture, "--prompt", prompt)
    run("-m", "vlgpt", "generate", *model, "--output", out, *asked)
    assert json.loads((out / "reply.json").read_text())["images"] == [str(out / "00.png")]
    with Image.open(out / "00.png") as image:
        assert image.size == (24, 24) and image.text["prompt"] == prompt
    run("-m", "vlgpt", "reconstruct", *model, picture, "--output", sheet)
    width, height = Image.open(sheet).size  # four enlarged cells below their names
    assert width % 4 == 0 and width // 4 >= 24 and width // 4 < height < 2 * (width // 4)


@pytest.mark.launcher
def test_an_export_of_the_commit_equals_the_result_of_the_run(run, folder, pretrain):
    run("-m", "vlgpt", "export", pretrain, "--output", folder / "again")
    first, second = (
        load_file(place / "model.safetensors") for place in (pretrain / "result", folder / "again")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor == second[name]).all(), name
