"""DeepSpeed's configuration: the run's facts and the JSON's ZeRO settings, merged and checked. No deepspeed here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.settings import RunSettings

# What a JSON may hold beside what the run's YAML decides. DeepSpeed itself silently ignores misspelt keys.
KEYS = frozenset(
    (
        *("zero_optimization", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
        *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"),
        *("disable_allgather", "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown"),
        *("dump_state", "aio", "train_batch_size", "train_micro_batch_size_per_gpu"),
        *("gradient_accumulation_steps", "gradient_clipping", "bf16", "data_types", "steps_per_print"),
    )
)
ELSEWHERE = {
    **dict.fromkeys(
        ("optimizer", "scheduler", "fp16", "amp"), "optimisation and precision live in the run's YAML"
    ),
    "activation_checkpointing": "stage.has_checkpointing in the run's YAML decides it",
    "checkpoint": "commits and elastic resume are the trainer's own",
    "elasticity": "any number of GPUs resumes by itself",
    "tensorboard": "the trainer writes its own",
    "wandb": "wandb_project in the run's YAML decides it",
    "csv_monitor": "metrics.jsonl is the record",
}


def merge_config(
    settings: RunSettings, ds_config: Mapping[str, Any], *, world_size: int, source: str
) -> JsonObject:
    """DeepSpeed's configuration: the run's facts and the JSON's ZeRO settings.

    Raises UserError when the JSON sets a fact of the run to another value, naming both.
    """
    try:
        accumulation = settings.accumulation(world_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    facts: JsonObject = {
        "train_batch_size": settings.global_batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.optimizer.gradient_clipping,
        "bf16": {"enabled": settings.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 1_000_000_000,
    }
    if settings.precision == "bf16":
        facts["bf16"]["check_grad_overflow"] = True
    for key, why in ELSEWHERE.items():
        if key in ds_config:
            raise UserError(f"{source} sets {key!r}: {why}; remove it there")
    merged = dict(ds_config)
    for key, value in facts.items():
        found = ds_config.get(key)
        if found is not None and found not in ("auto", value):
            raise UserError(
                f"{source} sets {key} = {found!r}, the run's YAML means {value!r}: remove it from the JSON"
            )
        merged[key] = value
    return merged


def read_config(path: str | Path) -> JsonObject:
    """Read a DeepSpeed JSON. Raises UserError for bad JSON, FileNotFoundError when it is missing."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"DeepSpeed configuration {path} does not exist (see ds_configs/)")
    try:
        config: JsonObject = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return config


def lint(merged: Mapping[str, Any], *, source: str) -> list[str]:
    """Warnings: what in a merged configuration has no effect, or a price. Raises UserError for what cannot work."""
    _refuse_unknown(merged, KEYS, source)
    zero = merged.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage == 0 and merged["bf16"]["enabled"]:
        raise UserError(
            f"{source} has ZeRO stage 0: with bf16 it keeps no fp32 masters as 1 to 3 do; set stage 1"
        )
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and merged.get("zero_force_ds_cpu_optimizer", True):
        raise UserError(
            f"{source} offloads the optimizer: set zero_force_ds_cpu_optimizer to false, torch's AdamW is used"
        )
    warnings = []
    if stage < 3:
        unused = [key for key in zero if key.startswith("stage3_") or key == "offload_param"]
        warnings += [f"{source}: {key} has no effect with ZeRO stage {stage}" for key in unused]
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if zero.get(key):
            warnings.append(
                f"{source}: {key} rounds what ranks exchange; losses will differ from those without"
            )
    for key in ("wall_clock_breakdown", "memory_breakdown"):
        if merged.get(key):
            warnings.append(f"{source}: {key} waits for the device in every step; for measurements only")
    return warnings


def lint_zero(merged: Mapping[str, Any], known: Iterable[str], *, source: str) -> None:
    """Refuse misspelt ZeRO keys, given those that the installed deepspeed knows. Raises UserError."""
    _refuse_unknown(merged.get("zero_optimization", {}), known, f"{source}: zero_optimization")


def _refuse_unknown(found: Mapping[str, object], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(known)}"
            raise UserError(f"{where} has the unknown key {key!r}, which deepspeed would ignore: {hint}")
