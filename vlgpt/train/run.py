"""One training run from settings to result: build, resume, prepare, train, save. What every launcher calls."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError

from vlgpt import log, seeds
from vlgpt.config import dump
from vlgpt.data.loader import Loader
from vlgpt.log import UserError
from vlgpt.models.unified import UnifiedModel
from vlgpt.settings import DataSettings, EncoderSettings, LanguageStage, RunSettings
from vlgpt.stages import language
from vlgpt.stages.build import build_stage
from vlgpt.tokens import DocumentTokenizer
from vlgpt.train import checkpoint, commit, faults
from vlgpt.train.agreement import disagreement
from vlgpt.train.engine import Engine, merge_config, start_process_group, stop_process_group
from vlgpt.train.loop import Run, RunState, TrainingStopped, train, validation_losses
from vlgpt.train.profile import ProfileWindow
from vlgpt.train.upload import Uploader
from vlgpt.train.watchdog import Watchdog

RESULT = "result"
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors")


def is_finished(settings: RunSettings) -> bool:
    """Whether this very configuration has been trained to its end: then a launcher has nothing to do."""
    done = settings.run_dir / RESULT / "done.json"
    if not done.is_file():
        return False
    try:  # validated anew, so that a setting added since then counts with its default
        return (
            RunSettings.model_validate_json(json.dumps(json.loads(done.read_text())["settings"])) == settings
        )
    except (ValidationError, KeyError, json.JSONDecodeError):
        return False


Probe = Callable[[torch.nn.Module, int], Mapping[str, float]]


def run_training(
    settings: RunSettings, ds_config: Mapping[str, Any], *, ds_source: str, probe: Probe | None = None
) -> int:
    """Train one stage; returns the process's exit code. Collective over the launcher's processes.

    `probe(stage, step)` is called on rank 0 after every validation, with whole weights in eval mode; its numbers are
    logged under `probe/`. Raises UserError for anything the user has to mend.
    """
    torch.set_num_threads(settings.threads)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.configure(rank=rank)
    merged = merge_config(settings, ds_config, world_size=world_size, source=ds_source)
    refuse_kill_switch(settings)
    agreed = {"settings": settings.model_dump(mode="json"), "deepspeed": merged, "versions": versions()}
    start_process_group(timeout_s=settings.step_timeout_s, facts=agreed)
    run, state = build_run(settings, merged, probe=probe)
    try:
        train(run, state)
        finish(run)
        exit_code = 0
    except TrainingStopped as stopped:
        log.get_logger().error("%s", stopped)
        exit_code = stopped.exit_code
    close(run)
    stop_process_group()  # not after an unexpected error: the other ranks would not come to its barrier
    return exit_code


def refuse_kill_switch(settings: RunSettings) -> None:
    """Raises UserError while the file that stopped a run is still there."""
    if faults.is_kill_switch_on(settings.run_dir):
        raise UserError(f"{settings.run_dir / faults.KILL_SWITCH} is there: remove it to train")


def close(run: Run) -> None:
    """End threads and workers."""
    if run.uploader is not None:
        run.uploader.wait()
    if run.watchdog is not None:
        run.watchdog.close()
    run.loader.close()  # type: ignore[attr-defined]
    if run.log is not None:
        run.log.close()


def build_run(
    settings: RunSettings, merged: Mapping[str, Any], *, probe: Probe | None = None
) -> tuple[Run, RunState]:
    """Everything before step 1: loader, stage, engine, resume or statistics, and the record of what runs."""
    num_sources = max(len(settings.data.sources), len(settings.validation.sources))
    stage, tokenizer = build_stage(settings, num_sources=num_sources)
    if isinstance(stage, language.LanguageStage) and tokenizer is not None:
        stage.exporter = exporter(settings, tokenizer)
    facts = {"frozen": stage.frozen_hashes(), "versions": versions()}  # before ZeRO-3 takes parameters apart
    engine = Engine(stage, settings, merged)
    metrics = None
    is_first = engine.rank == 0
    if is_first:
        record_run(settings, merged, facts)
        describe(stage)
        metrics = log.MetricsLog(settings.run_dir)

    def open_loader(data: DataSettings, *, workers: int | None = None) -> Loader:
        chosen = data if workers is None else data.model_copy(update={"num_workers": workers})
        return Loader(
            chosen,
            kind=stage.batch_kind,
            micro_batch=settings.micro_batch,
            rank=engine.rank,
            world_size=engine.world_size,
            tokenizer=tokenizer,
            run_positions=settings.steps * settings.global_batch,
            quarantine=settings.run_dir / f"quarantine_rank_{engine.rank}.jsonl",
        )

    loader = open_loader(settings.data)
    if odd := disagreement(engine.gather_objects(loader.state_dict())):
        raise UserError(
            f"processes read different data: {odd}; do all nodes see the same shards and indexes?"
        )
    state = RunState()
    resumed = None
    if settings.checkpoint.resume == "auto":
        resumed = checkpoint.resume(engine, settings.run_dir / "checkpoints", facts=facts)
    if resumed is not None:
        state.step = resumed.step
        loader.load_state_dict(resumed.data)
    else:
        fresh = open_loader(settings.data, workers=0)
        stage.prepare(placed(engine, fresh), engine.all_sum)
        fresh.close()
        seeds.seed_everything(settings.seed, "training", engine.rank)
    run = Run(
        settings=settings,
        engine=engine,
        loader=loader,
        log=metrics,
        facts=facts,
        validate=validator(settings, engine, open_loader, probe=probe),
        should_stop=listen_for_stop(),
        watchdog=Watchdog(settings.run_dir / "watch", rank=engine.rank, timeout_s=settings.step_timeout_s),
        profile=ProfileWindow(settings.profile, settings.run_dir / "profile", rank=engine.rank),
        uploader=Uploader(settings.checkpoint.upload) if settings.checkpoint.upload and is_first else None,
    )
    return run, state


def placed(engine: Engine, loader: Loader) -> Iterator[Any]:
    """A loader's batches on the engine's device."""
    for batch in loader:
        yield engine.place(batch)


def validator(
    settings: RunSettings, engine: Engine, open_loader: Callable[..., Loader], *, probe: Probe | None = None
) -> Callable[[int], dict[str, float]] | None:
    """Losses on held-out sources and the launcher's probe, or None when the settings name no sources."""
    validation = settings.validation
    if not validation.sources:
        return None
    data = settings.data.model_copy(update={"sources": validation.sources})

    def validate(step: int) -> dict[str, float]:
        loader = open_loader(data, workers=0)
        try:
            values = validation_losses(
                engine, loader.one_pass(), validation.max_batches, source_names=loader.source_names
            )
        finally:
            loader.close()
        if probe is not None:
            with engine.gathered_weights():
                found = probe(engine.stage, step) if engine.rank == 0 else {}
            values.update({f"probe/{name}": float(value) for name, value in found.items()})
            engine.barrier()
        return values

    return validate


def finish(run: Run) -> None:
    """After the last step: statistics for the next stage, then the result folder, complete or not there at all."""
    settings, engine = run.settings, run.engine
    if run.watchdog is not None:
        run.watchdog.close()
    loader = Loader(
        settings.data.model_copy(update={"num_workers": 0}),
        kind=engine.stage.batch_kind,
        micro_batch=settings.micro_batch,
        rank=engine.rank,
        world_size=engine.world_size,
        tokenizer=getattr(run.loader, "tokenizer", None),
        run_positions=settings.steps * settings.global_batch,
    )
    engine.train(False)
    engine.stage.finish(placed(engine, loader), engine.all_sum)
    loader.close()
    with engine.gathered_weights():
        if engine.rank == 0:
            write_result(settings, engine)
    engine.barrier()


def write_result(settings: RunSettings, engine: Engine) -> None:
    """The result folder, written beside its place and moved there when it is whole."""
    partial, result = settings.run_dir / f".{RESULT}.partial", settings.run_dir / RESULT
    engine.stage.save(partial)
    commit.write_atomically(
        partial / "done.json", json.dumps({"settings": settings.model_dump(mode="json")}, indent=1)
    )
    replace_folder(partial, result)
    log.get_logger().info("result written to %s", result)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        target.replace(old)
        new.replace(target)
        for path in sorted(old.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        old.rmdir()
    else:
        new.replace(target)


def exporter(settings: RunSettings, tokenizer: DocumentTokenizer) -> Callable[[UnifiedModel, Path], None]:
    """How a language stage writes its result: an export with merged weights."""
    stage = settings.stage
    assert isinstance(stage, LanguageStage)
    encoder: EncoderSettings | None = stage.encoder

    def write(model: UnifiedModel, folder: Path) -> None:
        from vlgpt.export import card_of, export_model

        export_model(
            model,
            folder,
            tokenizer=tokenizer,
            encoder=None if encoder is None else encoder.model_dump(),
            picture_decoder=stage.picture_decoder,
            card=card_of(settings, tag=commit.tag_of(settings.steps)),
        )

    return write


def describe(stage: torch.nn.Module) -> None:
    """Log what is trained and what is frozen, by top-level part."""
    rows: dict[str, list[int]] = {}
    for name, parameter in stage.named_parameters():
        part = ".".join(name.split(".")[:2])
        row = rows.setdefault(part, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    logger = log.get_logger()
    for part, (total, trained) in rows.items():
        logger.info("  %-36s %13s parameters, %13s trained", part, f"{total:,}", f"{trained:,}")


def record_run(settings: RunSettings, merged: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Save the resolved configuration, the merged DeepSpeed one and versions before step 1; say what changed since."""
    folder = settings.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = dump(settings)
    path = folder / "config.yaml"
    if path.is_file() and path.read_text() != text:
        before, now = path.read_text().splitlines(), text.splitlines()
        changed = [line.strip() for line in now if line not in before]
        log.get_logger().warning("the configuration changed since this run began: %s", "; ".join(changed[:8]))
    commit.write_atomically(path, text)
    commit.write_atomically(folder / "deepspeed.json", json.dumps(merged, indent=1))
    commit.write_atomically(folder / "facts.json", json.dumps({**facts, "git": git_commit()}, indent=1))


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of the checkout that runs, or an empty string outside of one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def listen_for_stop() -> Callable[[], bool]:
    """SIGTERM and SIGUSR1 ask for a commit after the current step; returns whether one came."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return lambda: bool(asked)


def missing_inputs(settings: RunSettings) -> list[tuple[str, str]]:
    """Keys of local folders that a run reads and that are not there, before anything slow starts.

    A name without a slash or with a hub's `owner/name` form may live elsewhere and is not judged here.
    """
    paths = [(f"data.sources.{n}.path", source.path) for n, source in enumerate(settings.data.sources)]
    paths += [(f"validation.sources.{n}.path", s.path) for n, s in enumerate(settings.validation.sources)]
    stage = settings.stage.model_dump()
    for key in (
        "language_model",
        "image_tokenizer",
        "text_tokenizer",
        "picture_decoder",
        "init_from",
        "coarse",
    ):
        paths.append((f"stage.{key}", stage.get(key) or ""))
    for key in ("encoder", "conditioner"):
        paths.append((f"stage.{key}.path", (stage.get(key) or {}).get("path", "")))
    is_local = [(key, path) for key, path in paths if path.count("/") > 1 and "://" not in path]
    return [(key, path) for key, path in is_local if not Path(path).exists()]
