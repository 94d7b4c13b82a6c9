"""Every shipped configuration lives its whole life: killed, resumed, finished, exported, reloaded, spoken to.

Only sizes change (`shipped_parts.sizes`): command, paths, precision and everything else are those of the YAML. In `make
test` the ranks are forks of one process that has everything imported; slow, the launcher starts them, 16 to 27 s each
time (tests/test_pipeline.py starts it once in `make test`).
"""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.processes import HELPERS, ROOT, environment
from tests.helpers.shipped_parts import CONFIGS, DECODER, command_of, jpeg, sizes, write_workspace
from vlgpt import (
    commits,
    hf,  # noqa: F401 - registers our classes
)
from vlgpt import settings as s
from vlgpt.config import load_run
from vlgpt.files import free_port
from vlgpt.log import read_metrics

pytestmark = pytest.mark.timeout(600)
CONFIG_OF = {f"{path.parent.name}/{path.stem}": path for path in CONFIGS}
ZERO = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
VARIANTS = {  # what the documentation offers in place of parts that the YAMLs name
    "open_clip": ("pretrain/vlgpt_7b", ["stage.encoder={path: laion/open_clip, library: open_clip}"]),
    "conditioner": (
        "tokenizer/vlgpt_7b",
        ["data.features=[]", f"stage.conditioner={{path: {DECODER}, library: ip_adapter}}"],
    ),
}
SIZES = {
    "width", "depth", "num_heads", "num_visual", "visual_width", "num_patches", "patch_width", "image_tokens",
    "image_width", "text_tokens", "text_width", "steps", "global_batch", "micro_batch", "warmup_steps",
    "interval_steps", "num_workers", "image_size_px", "statistics_samples",
}  # fmt: skip
LIVES = [(name, zero) for name in CONFIG_OF for zero in ZERO]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder that every command is run in."""
    folder = tmp_path_factory.mktemp("shipped")
    write_workspace(folder)
    (folder / "photo.jpg").write_bytes(jpeg(3)[1])
    return folder


# ------------------------------------------------------------------------------------------------------ substitution


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}.{key}").items()}


def smaller(name):
    """The overrides `key=value` that make a shipped configuration small."""
    return [f"{key}={value}" for key, value in sizes(load_run(CONFIG_OF[name])).items()]


@pytest.mark.parametrize("name", CONFIG_OF)
def test_only_sizes_and_counts_of_a_shipped_configuration_are_changed(name):
    before = flat(load_run(CONFIG_OF[name]).model_dump())
    after = flat(load_run(CONFIG_OF[name], smaller(name)).model_dump())
    assert before.keys() == after.keys()
    changed = {key.rpartition(".")[2] for key in before if before[key] != after[key]}
    assert changed and changed <= SIZES, changed - SIZES


# ------------------------------------------------------------------------------------------------------------- lives


def tail(log):
    return log.read_text()[-6000:] if log.exists() else "no output"


def forked(forks, workspace):
    """How to run a command as forks: -> the exit code that all ranks share, or all of them."""

    def run(command, *, log, num_ranks=1):
        codes = forks.run(command, folder=workspace, log=log, num_ranks=num_ranks)
        return codes[0] if len(set(codes)) == 1 else codes

    return run


def launched(workspace):
    """How to run a command with the `deepspeed` launcher, or by itself: -> its exit code, -9 for a kill."""

    def run(command, *, log, num_ranks=None):
        start = [sys.executable]
        if num_ranks:
            start = ["deepspeed", "--num_accelerators", str(num_ranks), "--master_port", str(free_port())]
        with log.open("a") as file:
            done = subprocess.run(
                [*start, *command], cwd=workspace, env=environment(), stdout=file, stderr=file, timeout=250
            )
        return done.returncode - 256 if done.returncode > 128 else done.returncode

    return run


def newest(run):
    root = run / "checkpoints"
    return max(commits.step_of(tag) for tag in commits.committed_tags(root))


def live(name, zero, workspace, run_command, *changes):
    """Start, 2 steps, kill -9, resume on as many ranks, kill -9, resume on one, finish: -> the run folder."""
    launcher, option, _, *rest = command_of(CONFIG_OF[name])
    command = [launcher, option, f"ds_configs/{zero}.json", *rest, *smaller(name), *changes]
    output_dir = load_run(CONFIG_OF[name], changes).output_dir
    run = workspace / output_dir
    run.parent.mkdir(parents=True, exist_ok=True)
    for act, num_ranks, done, dies_at in (("start", 2, 0, 3), ("resume", 2, 2, 4), ("finish", 1, 3, None)):
        log = run.with_name(f"{run.name}_{act}.log")
        killer = [] if dies_at is None else [str(HELPERS / "killed_at.py"), commits.tag_of(dies_at)]
        code = run_command([*killer, *command], log=log, num_ranks=num_ranks)
        where = f"{name} under {zero}, {act}: {code}\n{tail(log)}"
        assert code == (0 if dies_at is None else -9), where
        resumed = f"resumed from {output_dir}/checkpoints/{commits.tag_of(done)}"
        assert (resumed in log.read_text()) == (done > 0) and "WEIGHTS ONLY" not in log.read_text(), where
        assert newest(run) == (4 if dies_at is None else dies_at - 1), where
        counts = re.findall(r" I   (\w+) +([\d,]+) +[\d,]+ +[\d,]+$", log.read_text(), re.MULTILINE)
        assert counts and "0" not in dict(counts).values(), counts
    records = read_metrics(run / "metrics.jsonl")
    losses = [value for record in records for key, value in record.items() if key.startswith("loss/")]
    assert losses and all(map(math.isfinite, losses))
    return run


def speak(run, workspace, run_command):
    """The export of the newest commit is the result, number by number; both load and answer a question on an image."""
    log, export, result = (
        run.with_name(f"{run.name}_export.log"),
        run.with_name(f"{run.name}_export"),
        run / "result",
    )

    def vlgpt(*words):
        code = run_command(["-m", "vlgpt", *map(str, words)], log=log)
        assert code == 0, f"{words}: {code}\n{tail(log)}"

    vlgpt("export", run.relative_to(workspace), "--output", export, "--picture-decoder", DECODER)
    exported, finished = (load_file(folder / "model.safetensors") for folder in (export, result))
    assert exported.keys() == finished.keys()
    assert [name for name in exported if not torch.equal(exported[name], finished[name])] == []
    for folder in (export, result):
        state = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, exported[name]) for name, tensor in state.items())
    ask = ("--prompt", "<image> What is this?", "--image", "photo.jpg", "--max-new-tokens", "8")
    for folder, images, num_drawn in ((export, "force", 1), (result, "never", 0)):
        said = run.with_name(f"{run.name}_said_{images}")
        vlgpt("generate", "--model", folder, *ask, "--images", images, "--output", said)
        assert len(json.loads((said / "reply.json").read_text())["images"]) == num_drawn


@pytest.fixture(scope="module")
def lived(workspace, forks):
    """A life as forks, once: `lived(name, zero, *changes)` -> the run. ZeRO-2 has the folder that the YAML names."""
    runs = {}

    def lived_once(name, zero="zero2", *changes):
        key = (name, zero, changes)
        if key not in runs:
            where = () if zero == "zero2" or changes else (f"output_dir=runs/{zero}/{name}",)
            live_before(name, lived_once)
            runs[key] = live(name, zero, workspace, forked(forks, workspace), *changes, *where)
        return runs[key]

    return lived_once


def live_before(name, lived_once):
    """First the lives of the runs that this one reads, as its YAML says."""
    stage = load_run(CONFIG_OF[name]).stage
    for path in (getattr(stage, "image_tokenizer", None), getattr(stage, "init_from", None)):
        for other, config in CONFIG_OF.items():
            if path and path.startswith(load_run(config).output_dir):
                lived_once(other)


def is_language(name):
    return isinstance(load_run(CONFIG_OF[name]).stage, s.LanguageStageSettings)


@pytest.mark.parametrize("name, zero", LIVES)
def test_a_shipped_configuration_lives_its_whole_life(name, zero, workspace, forks, lived):
    run = lived(name, zero)
    if is_language(name):
        speak(run, workspace, forked(forks, workspace))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_that_the_documentation_offers_live_too(variant, workspace, forks, lived):
    name, changes = VARIANTS[variant]
    run = lived(name, "zero2", *changes, f"output_dir=runs/{variant}/run")
    if is_language(name):
        speak(run, workspace, forked(forks, workspace))


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("name, zero", LIVES)
def test_the_deepspeed_command_takes_a_shipped_configuration_through_its_life(name, zero, workspace, lived):
    live_before(name, lived)
    run = live(name, zero, workspace, launched(workspace), f"output_dir=runs/launched/{name}_{zero}")
    if is_language(name):
        speak(run, workspace, launched(workspace))


# --------------------------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize(
    "name, zero",
    [("pretrain/vlgpt_7b", "zero2"), ("pretrain/vlgpt_7b", "zero3"), ("pretrain/vlgpt_13b", "zero2")],
)
def test_deepspeeds_start_accepts_every_parameter_at_full_size(name, zero, tmp_path, forks):
    json_path = ROOT / "ds_configs" / f"{zero}.json"
    command = [str(HELPERS / "full_size.py"), str(CONFIG_OF[name]), str(json_path), str(tmp_path / "save")]
    assert forks.run(command, folder=ROOT, log=tmp_path / "log") == [0], tail(tmp_path / "log")
