"""What runs: configuration, versions, data. Recorded before step 1 and compared between processes at the start."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vlgpt import log
from vlgpt.config import dump
from vlgpt.errors import UserError
from vlgpt.files import write_atomic
from vlgpt.settings import Input, RunSettings
from vlgpt.shards import FeatureSpec
from vlgpt.shards.tars import find_tars
from vlgpt.stages.base import Stage

RESULT = "result"
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors")


def is_finished(settings: RunSettings) -> bool:
    """Whether this very configuration has been trained to its end: then a launcher has nothing to do."""
    done = settings.run_dir / RESULT / "done.json"
    if not done.is_file():
        return False
    # Validated and not compared as text, so that a setting that was added since then counts with its default.
    try:
        trained = json.dumps(json.loads(done.read_text())["settings"])
        return RunSettings.model_validate_json(trained) == settings
    except (ValidationError, KeyError, json.JSONDecodeError):
        return False


def missing_inputs(settings: BaseModel, *, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of what settings name as their `Input` and what is not there, before anything slow starts."""
    for name, field in type(settings).model_fields.items():
        key, value = f"{prefix}{name}", getattr(settings, name)
        if isinstance(value, tuple):
            parts = {f"{key}.{number}": part for number, part in enumerate(value)}
        else:
            parts = {key: value}
        for place, part in parts.items():
            if isinstance(part, BaseModel):
                yield from missing_inputs(part, prefix=f"{place}.")
            elif part and (mark := _input_mark(field)) is not None and mark.is_missing(part):
                yield place, part


def _input_mark(field: FieldInfo) -> Input | None:
    """The mark of a `DataPath` or `ModelPath`, or of one that may be None."""
    options = [getattr(option, "__metadata__", ()) for option in get_args(field.annotation)]
    return next((mark for mark in chain(field.metadata, *options) if isinstance(mark, Input)), None)


def data_facts(settings: RunSettings) -> dict[str, str]:
    """A cheap fingerprint of every local source: its manifest, or the names of its shards."""
    # The loader compares more once it is open. This refuses other data on a node before any model is loaded.
    found = {}
    for source in (*settings.data.sources, *settings.validation.sources):
        folder = Path(source.path)
        if not folder.is_dir():
            continue
        manifest = folder / "manifest.json"
        if manifest.is_file():
            content = manifest.read_bytes()
        else:
            content = "\n".join(str(tar.relative_to(folder)) for tar in find_tars(folder)).encode()
        found[source.path] = hashlib.sha256(content).hexdigest()[:16]
    return found


def check_features(specs: Mapping[str, FeatureSpec], stage: Stage, frozen: Mapping[str, str]) -> None:
    """Raises UserError for cached features that other weights made than those which this run holds and exports.

    `frozen`: hashes of the frozen parts before any cast. What the run does not hold cannot be compared.
    """
    for name in ("patches", "visual"):
        if (spec := specs.get(name)) is None:
            continue
        encoder, _, tokenizer = spec.weights_hash.partition("+")
        own = frozen.get("encoder"), frozen.get("image_tokenizer") if name == "visual" else None
        for part, found, expected in zip(("encoder", "image tokenizer"), (encoder, tokenizer), own):
            if expected is not None and found != expected:
                raise UserError(
                    f"the cached features {name!r} come from another {part} ({spec.encoder}, weights {found}) than "
                    f"this run has (weights {expected}): compute them again with python -m data_prep.features"
                )
        layer = getattr(getattr(stage, "encoder", None), "layer_name", spec.layer)
        if layer != spec.layer:
            raise UserError(
                f"the cached features {name!r} are layer {spec.layer!r} of the encoder, stage.encoder means {layer!r}: "
                "change one of them"
            )


def describe(stage: torch.nn.Module) -> None:
    """Log a table of what is trained and what is frozen."""
    rows: dict[str, list[int]] = {}
    for name, parameter in stage.named_parameters():
        row = rows.setdefault(part_of(name), [0, 0])
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 has partitioned it
        row[0] += count
        row[1] += count if parameter.requires_grad else 0
    rows["together"] = [sum(column) for column in zip(*rows.values())]
    logger = log.get_logger()
    logger.info("  %-20s %15s %15s %15s", "part", "parameters", "trained", "frozen")
    for part, (count, trained) in rows.items():
        logger.info("  %-20s %15s %15s %15s", part, f"{count:,}", f"{trained:,}", f"{count - trained:,}")


def part_of(name: str) -> str:
    """The part of the model that a parameter of a stage belongs to, in the words of `vlgpt plan`."""
    if "lora_" in name:
        return "lora_adapters"
    if "trainable_tokens" in name:
        return "token_rows"
    return name.removeprefix("model.").removeprefix("lm.").split(".")[0]


def record_run(settings: RunSettings, merged: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Save the resolved configuration, the merged DeepSpeed one and versions before step 1; say what changed since."""
    folder = settings.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    text = dump(settings)
    path = folder / "config.yaml"
    if path.is_file() and path.read_text() != text:
        before, now = path.read_text().splitlines(), text.splitlines()
        changed = [line.strip() for line in now if line not in before]
        log.get_logger().warning("the configuration changed since this run began: %s", "; ".join(changed[:8]))
    facts = {**facts, "git": git_commit()}
    _note_changes(folder / "facts.json", facts)
    write_atomic(path, text.encode())
    log.get_logger().info("DeepSpeed gets %s", json.dumps(merged))
    write_atomic(folder / "deepspeed.json", json.dumps(merged, indent=1))
    write_atomic(folder / "facts.json", json.dumps(facts, indent=1))


def _note_changes(path: Path, facts: Mapping[str, Any]) -> None:
    """Say which versions differ from those that this run began with."""
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError:
        return
    old, new = {**before.get("versions", {})}, {**facts["versions"]}
    if before:
        old["git"], new["git"] = before.get("git"), facts["git"]
        changed = [
            f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)
        ]
        if changed:
            log.get_logger().warning("versions changed since this run began: %s", "; ".join(changed))


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
