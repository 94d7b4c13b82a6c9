"""Faults of a configuration that its types cannot show, each with its fix. Nothing is loaded but small JSON files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from vlgpt import settings as s
from vlgpt.config import load_run
from vlgpt.errors import UserError
from vlgpt.models.unified import is_export
from vlgpt.planning.meta import image_arguments, image_tower
from vlgpt.shards.tars import tars_of
from vlgpt.train.facts import RESULT, is_finished, missing_inputs
from vlgpt.turns import OWN, TEMPLATES


@dataclass(frozen=True)
class Finding:
    """`error`: the run will fail or train something else than meant; `warning`: probably not what was wanted."""

    level: Literal["error", "warning", "ok"]
    text: str
    fix: str = ""


Rule = Callable[[s.RunSettings, int], Iterator[Finding]]


def lint(path: str | Path, overrides: tuple[str, ...] = (), *, num_processes: int = 1) -> list[Finding]:
    """All faults of a configuration file, errors first."""
    try:
        run = load_run(path, overrides)
    except (UserError, FileNotFoundError) as error:
        return [
            Finding(
                "error", str(error), "correct this key in the YAML, or the override, and run doctor again"
            )
        ]
    rules: tuple[Rule, ...] = (
        _batch,
        _schedule,
        _sources,
        _folders,
        _inputs,
        _language,
        _image_stage,
        _faults,
    )
    found = [finding for rule in rules for finding in rule(run, num_processes)]
    return sorted(found, key=lambda finding: finding.level)


def _error(text: str, fix: str) -> Finding:
    return Finding("error", text, fix)


def _warning(text: str, fix: str) -> Finding:
    return Finding("warning", text, fix)


def _batch(run: s.RunSettings, num_processes: int) -> Iterator[Finding]:
    try:
        run.accumulation(num_processes)
    except ValueError as error:
        divisor = run.micro_batch * num_processes
        nearest = max(divisor, round(run.global_batch / divisor) * divisor)
        yield _error(str(error), f"set global_batch={nearest}, or a micro_batch that divides it")


def _schedule(run: s.RunSettings, _: int) -> Iterator[Finding]:
    optimizer = run.optimizer
    if optimizer.warmup_steps >= run.steps:
        yield _error(
            f"optimizer.warmup_steps {optimizer.warmup_steps} reaches the end of the run ({run.steps} steps)",
            f"set optimizer.warmup_steps={max(1, run.steps * 3 // 100)} (3 %)",
        )
    if optimizer.betas[0] > optimizer.betas[1]:
        yield _error(f"optimizer.betas {optimizer.betas} are in the wrong order", "write [0.9, 0.98]")
    if optimizer.lr > 1e-2:
        yield _warning(
            f"optimizer.lr {optimizer.lr:g} is very high for AdamW", "the paper takes 2e-4 and 5e-5"
        )
    if run.checkpoint.interval_steps > run.steps:
        yield _warning(
            f"checkpoint.interval_steps {run.checkpoint.interval_steps} is beyond the last step ({run.steps}): a crash "
            "loses everything",
            f"set checkpoint.interval_steps={max(1, run.steps // 10)}",
        )


def _sources(run: s.RunSettings, _: int) -> Iterator[Finding]:
    data = run.data
    names = [source.name for source in data.sources]
    if doubled := {name for name in names if names.count(name) > 1}:
        yield _error(
            f"data.sources: the name {sorted(doubled)[0]!r} stands twice", "give every source its own name"
        )
    weights = [source.weight for source in data.sources]
    if all(weight == 0.0 for weight in weights):
        yield _error("data.sources: all weights are 0", "give at least one source a weight, or 'size'")
    if "size" in weights and any(isinstance(weight, float) for weight in weights):
        yield _warning(
            "data.sources mix weight: size with numbers: a size counts as its number of samples",
            "give all sources numbers, or all 'size'",
        )
    if data.mixing == "weights" and data.temperature != 1.0:
        yield _warning(f"data.temperature {data.temperature:g} has no effect", "set data.mixing=temperature")
    for source in data.sources:
        if source.ramp[0] > source.ramp[1]:
            yield _error(
                f"source {source.name!r}: ramp {list(source.ramp)} ends before it begins",
                f"write ramp: [{source.ramp[1]:g}, {source.ramp[0]:g}]",
            )
    trained = {Path(source.path).resolve() for source in data.sources}
    for source in run.validation.sources:
        if Path(source.path).resolve() in trained:
            yield _error(
                f"validation source {source.name!r} is trained on too ({source.path})",
                "build a held-out split: data_prep.build with --split, or another folder",
            )


def _folders(run: s.RunSettings, _: int) -> Iterator[Finding]:
    for source in (*run.data.sources, *run.validation.sources):
        folder = Path(source.path)
        if "://" in source.path:
            continue
        if tars_of(folder):
            root = folder if folder.is_dir() else folder.parent
            for name in run.data.features:
                if not any(root.rglob(f"*{name}*")):
                    encoder = "diffusion.json --library ip_adapter" if name.endswith("condition") else "CLIP"
                    command = f"python -m data_prep.features {folder} --features {name} --encoder {encoder}"
                    yield _error(
                        f"source {source.name!r}: feature {name!r} is not computed", f"run {command}"
                    )
        elif folder.exists():
            yield _error(
                f"source {source.name!r}: {folder} holds no shards (*.tar)",
                f"write them: python -m data_prep.build ... --output {folder}",
            )
        else:
            yield _error(f"source {source.name!r}: {folder} does not exist", "build it: see docs/datasets.md")
    if (run.run_dir / RESULT / "done.json").is_file() and not is_finished(run):
        yield _warning(
            f"output_dir {run.output_dir} holds the result of another configuration",
            "choose another output_dir",
        )


def _inputs(run: s.RunSettings, _: int) -> Iterator[Finding]:
    features, stage = run.data.features, run.stage
    if "patches" in features and run.data.pixels:
        yield _warning("data.pixels decodes images whose patches are read from disk", "set data.pixels=false")
    if not isinstance(stage, (s.LanguageStageSettings, s.TokenizerStageSettings)):
        return
    if stage.encoder is not None and stage.encoder.library == "ip_adapter":
        yield _error(
            "stage.encoder.library is ip_adapter, which makes targets and no patches",
            "set library: transformers or open_clip (ip_adapter is for stage.conditioner)",
        )
        return
    if not {"patches", "visual"} & set(features) and not run.data.pixels:
        yield _error(
            "nothing says how images are read: data.features holds neither patches nor visual, and data.pixels is off",
            "set data.features=[patches], or data.pixels=true with stage.encoder",
        )
    elif run.data.pixels and not {"patches", "visual"} & set(features) and stage.encoder is None:
        yield _error(
            "data.pixels needs an encoder, stage.encoder is not set",
            "set stage.encoder={path: openai/clip-vit-large-patch14, library: transformers}",
        )


def _language(run: s.RunSettings, _: int) -> Iterator[Finding]:
    stage = run.stage
    if not isinstance(stage, s.LanguageStageSettings):
        return
    if stage.template not in (*TEMPLATES, OWN):
        yield _error(
            f"stage.template {stage.template!r} is unknown", f"choose one of: {', '.join(TEMPLATES)}, {OWN}"
        )
    for key, path in missing_inputs(stage, prefix="stage."):
        fix = "run the stage before, or correct the path (hub names have one slash)"
        yield _error(f"{key}: {path} does not exist", fix)
    if stage.image_tokenizer is None and not is_export(stage.language_model):
        yield _error(
            f"stage.image_tokenizer is not set, and {stage.language_model} is a plain language model",
            "set stage.image_tokenizer to the result folder of stage 1",
        )
    if (
        stage.init_from
        and Path(stage.init_from).is_dir()
        and not any(Path(stage.init_from).rglob("*.safetensors"))
    ):
        yield _error(
            f"stage.init_from {stage.init_from} holds no committed weights", "name the run folder of stage 2"
        )
    if stage.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        yield _error(
            "stage.attention is flash_attention_2, but flash-attn is not installed",
            "pip install flash-attn, or set auto",
        )
    if stage.text_weight == stage.visual_weight == 0:
        yield _error(
            "stage.text_weight and stage.visual_weight are both 0: nothing is trained", "set one to 1.0"
        )
    found = image_arguments(stage)
    num_visual = (
        found[0]["num_visual"] if found else s.TokenizerStageSettings(kind="image_tokenizer").num_visual
    )
    if run.data.sequence_length < num_visual + 4:
        yield _error(
            f"data.sequence_length {run.data.sequence_length} cannot hold one image ({num_visual} embeddings)",
            "set data.sequence_length=512",
        )


def _image_stage(run: s.RunSettings, _: int) -> Iterator[Finding]:
    stage = run.stage
    if not isinstance(stage, s.TokenizerStageSettings):
        return
    for name, part in (("tokenizer", stage.tokenizer), ("detokenizer", stage.detokenizer)):
        if part.width % part.num_heads:
            yield _error(
                f"stage.{name}: width {part.width} is not divisible by num_heads {part.num_heads}",
                f"set stage.{name}.num_heads to a divisor, such as {max(1, part.width // 64)}",
            )
    yield from _conditioner(run, stage)
    for name, weight in (("image_condition", stage.image_weight), ("text_condition", stage.text_weight)):
        if weight > 0 and name not in run.data.features and stage.conditioner is None:
            yield _error(
                f"stage 1 has no {name} to learn from",
                f"add {name} to data.features, or set stage.conditioner",
            )
    if stage.encoder is None:
        return
    try:
        tower = image_tower(stage.encoder)
    except UserError as error:
        yield _warning(str(error), "the encoder's shape is checked when it is loaded")
        return
    if (tower.num_tokens, tower.width) != (stage.shapes.num_patches, stage.shapes.patch_width):
        yield _error(
            f"stage.shapes says {stage.shapes.num_patches} patches of {stage.shapes.patch_width}, the encoder "
            f"{stage.encoder.path} gives {tower.num_tokens} of {tower.width}",
            f"set stage.shapes.num_patches={tower.num_tokens} and stage.shapes.patch_width={tower.width}",
        )


def _conditioner(run: s.RunSettings, stage: s.TokenizerStageSettings) -> Iterator[Finding]:
    parts = {"tokenizer": stage.tokenizer_from, "detokenizer": stage.detokenizer_from}
    for name, folder in parts.items():
        if folder and not (Path(folder) / f"image_{name}" / "model.safetensors").is_file():
            yield _error(
                f"stage.{name}_from: {folder} holds no image_{name}", "name a result folder of stage 1"
            )
    if stage.conditioner is None:
        return
    if "image_condition" not in run.data.features and not run.data.pixels:
        yield _error("stage.conditioner needs pixels, data.pixels is off", "set data.pixels=true")
    if stage.conditioner.library == "ip_adapter" and not Path(stage.conditioner.path).is_file():
        yield _error(
            f"stage.conditioner.path {stage.conditioner.path} is no file",
            "write the JSON that names the decoder's parts: see docs/decoders.md",
        )


def _faults(run: s.RunSettings, _: int) -> Iterator[Finding]:
    if run.faults.spike_rollback and run.faults.spike_sigma == 0:
        yield _error(
            "faults.spike_rollback needs spikes to be found, spike_sigma is 0", "set faults.spike_sigma=6.0"
        )
