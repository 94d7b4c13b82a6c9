"""Every shipped configuration lives its whole life: killed, resumed, finished, exported, reloaded, spoken to.

Only sizes change (`shipped_parts.sizes`); the command, paths, precision and everything else are those of the YAML.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forks
from safetensors.torch import load_file
from shipped_parts import CONFIGS, DECODER, ROOT, command_of, jpeg, sizes, write_workspace
from transformers import AutoModel

from vlgpt import hf  # noqa: F401 - registers our classes
from vlgpt import settings as s
from vlgpt.config import load_run
from vlgpt.log import read_metrics
from vlgpt.train import commit

KILLED_AT = str(Path(__file__).with_name("killed_at.py"))
ZERO = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in CONFIGS]
VARIANTS = {  # parts that the documentation offers instead of those that the YAMLs name
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


def config_of(name):
    return ROOT / "launchers" / "configs" / f"{name}.yaml"


class Workspace:
    """A folder of the shipped paths under one ZeRO configuration; lives in it are lived once, and build on another."""

    def __init__(self, folder, parts, zero):
        self.folder, self.zero, self.lived = folder, zero, {}
        folder.mkdir()
        for path in parts.iterdir():
            (folder / path.name).symlink_to(path)

    def command(self, name, *more):
        launcher, option, _, *rest = command_of(config_of(name))
        changed = [f"{key}={value}" for key, value in sizes(load_run(config_of(name))).items()]
        return [launcher, option, f"ds_configs/{self.zero}.json", *rest, *changed, *more]

    def before(self, name):
        """The configurations whose runs this one reads."""
        stage = load_run(config_of(name)).stage
        read = [getattr(stage, key, None) or "" for key in ("image_tokenizer", "init_from")]
        folders = {other: load_run(config_of(other)).output_dir for other in NAMES}
        return [other for other, folder in folders.items() if any(path.startswith(folder) for path in read)]


@pytest.fixture(scope="session")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def workspaces(tmp_path_factory):
    """The workspace of a ZeRO configuration, made when it is first asked for."""
    root, known = tmp_path_factory.mktemp("shipped"), {}
    (root / "parts").mkdir()
    write_workspace(root / "parts")

    def workspace(zero):
        if zero not in known:
            known[zero] = Workspace(root / zero, root / "parts", zero)
        return known[zero]

    return workspace


# ------------------------------------------------------------------------------------------------------ substitution


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}.{key}").items()}


@pytest.mark.parametrize("name", NAMES)
def test_only_sizes_and_counts_of_a_shipped_configuration_are_changed(name):
    shipped = load_run(config_of(name))
    changed = load_run(config_of(name), [f"{key}={value}" for key, value in sizes(shipped).items()])
    before, after = flat(shipped.model_dump()), flat(changed.model_dump())
    assert before.keys() == after.keys()
    different = {key.rpartition(".")[2] for key in before if before[key] != after[key]}
    assert different and different <= SIZES, different - SIZES


# ------------------------------------------------------------------------------------------------------------- lives


def tail(log):
    return log.read_text()[-6000:] if log.exists() else "no output"


def committed(run):
    root = run / "checkpoints"
    return [commit.step_of(tag) for tag in commit.tags(root) if (root / tag / commit.MARKER).is_file()]


def live(name, workspace, run_act, *more):
    """Start, 2 steps, kill -9, resume on as many ranks, kill -9, resume on one, finish: -> the run folder."""
    run = workspace.folder / load_run(config_of(name), more).output_dir
    run.parent.mkdir(parents=True, exist_ok=True)
    command = workspace.command(name, *more)
    for act, num_ranks, done, dies_at in (("start", 2, 0, 3), ("resume", 2, 2, 5), ("finish", 1, 4, None)):
        log = run.with_name(f"{run.name}_{act}.log")
        killer = [] if dies_at is None else [KILLED_AT, commit.tag_of(dies_at)]
        code = run_act([*killer, *command], log=log, num_ranks=num_ranks)
        where = f"{name} under {workspace.zero}: {act}: {code}\n{tail(log)}"
        assert code == (0 if dies_at is None else -9), where
        text = log.read_text()
        assert (f"resumed from {run.relative_to(workspace.folder)}/checkpoints/{commit.tag_of(done)}" in text) == (
            done > 0
        ), where
        assert "WEIGHTS ONLY" not in text, where
        if dies_at is not None:
            assert committed(run)[0] == dies_at - 1, where
    last = read_metrics(run / "metrics.jsonl")
    losses = {k: v for record in last for k, v in record.items() if k.startswith("loss/")}
    assert losses and all(value == value for value in losses.values()), losses
    assert (run / "result" / "done.json").is_file()
    return run


def lived(name, workspace, forks, *more):
    """`live`, once per workspace, after the lives that it builds on."""
    for other in workspace.before(name):
        lived(other, workspace, forks)

    def run_act(command, *, log, num_ranks):
        codes = forks.run(command, folder=workspace.folder, log=log, num_ranks=num_ranks)
        return codes[0] if len(set(codes)) == 1 else codes

    if (name, more) not in workspace.lived:
        workspace.lived[name, more] = live(name, workspace, run_act, *more)
    return workspace.lived[name, more]


def speak(run, workspace, forks):
    """Export the newest commit; it is the result, tensor by tensor; both load, and answer with a picture."""
    log = run.with_name(f"{run.name}_export.log")

    def command(*words):
        codes = forks.run(["-m", "vlgpt", *map(str, words)], folder=workspace.folder, log=log)
        assert codes == [0], f"{words}\n{tail(log)}"

    export, result = run.with_name(f"{run.name}_export"), run / "result"
    command("export", run.relative_to(workspace.folder), "--output", export, "--picture-decoder", DECODER)
    first, second = (load_file(folder / "model.safetensors") for folder in (export, result))
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == [], f"the export of the last commit is not the result: {different[:6]}"
    for folder in (export, result):
        state = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(tensor, first[name]) for name, tensor in state.items())
    (workspace.folder / "photo.jpg").write_bytes(jpeg(3)[1])
    ask = ["--prompt", "<image> What is this?", "--image", "photo.jpg", "--max-new-tokens", "8"]
    command("generate", "--model", export, *ask, "--images", "force", "--output", f"{run.name}_said")
    command("generate", "--model", result, *ask, "--images", "never", "--output", f"{run.name}_text")
    drawn, text = (
        json.loads((workspace.folder / f"{run.name}_{how}" / "reply.json").read_text()) for how in ("said", "text")
    )
    assert len(drawn["images"]) == 1 and text["images"] == []


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_configuration_lives_its_whole_life(name, zero, workspaces, forks):
    workspace = workspaces(zero)
    run = lived(name, workspace, forks)
    if isinstance(load_run(config_of(name)).stage, s.LanguageStage):
        speak(run, workspace, forks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_that_the_documentation_offers_live_too(variant, workspaces, forks):
    name, changes = VARIANTS[variant]
    workspace = workspaces("zero2")
    run = lived(name, workspace, forks, *changes, f"output_dir=runs/{variant}/run")
    if isinstance(load_run(config_of(name)).stage, s.LanguageStage):
        speak(run, workspace, forks)
