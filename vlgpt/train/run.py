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

from vlgpt import log, seeds
from vlgpt.config import dump
from vlgpt.data.loader import Loader
from vlgpt.models.unified import UnifiedModel
from vlgpt.settings import DataSettings, EncoderSettings, LanguageStage, RunSettings
from vlgpt.stages import language
from vlgpt.stages.build import build_stage
from vlgpt.tokens import DocumentTokenizer
from vlgpt.train import checkpoint, commit
from vlgpt.train.engine import Engine, merge_config, start_process_group, stop_process_group
from vlgpt.train.loop import Run, RunState, TrainingStopped, train, validation_losses

RESULT = "result"
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors")


def is_finished(settings: RunSettings) -> bool:
    """Whether this very configuration has been trained to its end: then a launcher has nothing to do."""
    done = settings.run_dir / RESULT / "done.json"
    return done.is_file() and json.loads(done.read_text()).get("settings") == settings.model_dump(mode="json")


def run_training(settings: RunSettings, ds_config: Mapping[str, Any], *, ds_source: str) -> int:
    """Train one stage; returns the process's exit code. Collective over the launcher's processes.

    Raises UserError for anything the user has to mend.
    """
    torch.set_num_threads(settings.threads)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log.configure(rank=rank)
    merged = merge_config(settings, ds_config, world_size=world_size, source=ds_source)
    start_process_group(timeout_s=settings.step_timeout_s)
    logger = log.get_logger()
    try:
        run, state = build_run(settings, merged)
        try:
            train(run, state)
        except TrainingStopped as stopped:
            logger.error("%s", stopped)
            return stopped.exit_code
        finish(run)
        return 0
    finally:
        stop_process_group()


def build_run(settings: RunSettings, merged: Mapping[str, Any]) -> tuple[Run, RunState]:
    """Everything before step 1: loader, stage, engine, resume or statistics, and the record of what runs."""
    num_sources = len(settings.data.sources)
    stage, tokenizer = build_stage(settings, num_sources=num_sources)
    if isinstance(stage, language.LanguageStage) and tokenizer is not None:
        stage.exporter = exporter(settings, tokenizer)
    engine = Engine(stage, settings, merged)
    facts = {"frozen": stage.frozen_hashes(), "versions": versions()}
    metrics = None
    if engine.rank == 0:
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
        validate=validator(settings, engine, open_loader),
        should_stop=listen_for_stop(),
    )
    return run, state


def placed(engine: Engine, loader: Loader) -> Iterator[Any]:
    """A loader's batches on the engine's device."""
    for batch in loader:
        yield engine.place(batch)


def validator(
    settings: RunSettings, engine: Engine, open_loader: Callable[..., Loader]
) -> Callable[[int], dict[str, float]] | None:
    """Losses on held-out sources, or None when the settings name none."""
    validation = settings.validation
    if not validation.sources:
        return None
    data = settings.data.model_copy(update={"sources": validation.sources})

    def validate(step: int) -> dict[str, float]:
        loader = open_loader(data, workers=0)
        try:
            return validation_losses(engine, loader.one_pass(), validation.max_batches)
        finally:
            loader.close()

    return validate


def finish(run: Run) -> None:
    """After the last step: statistics for the next stage, then the result folder, complete or not there at all."""
    settings, engine = run.settings, run.engine
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
    run.loader.close()  # type: ignore[attr-defined]
    if run.log is not None:
        partial, result = settings.run_dir / f".{RESULT}.partial", settings.run_dir / RESULT
        engine.stage.save(partial)
        commit.write_atomically(
            partial / "done.json", json.dumps({"settings": settings.model_dump(mode="json")}, indent=1)
        )
        replace_folder(partial, result)
        log.get_logger().info("result written to %s", result)
        run.log.close()


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
