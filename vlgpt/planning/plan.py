"""`vlgpt plan`: shapes in, one dictionary out: parameters, memory, FLOPs, hours, disk, and which ZeRO stage fits."""

from __future__ import annotations

import re

from vlgpt import settings as s
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.planning.costs import Work, blocks_of
from vlgpt.planning.memory import FRAGMENTATION, RESERVE_BYTES, ZEROS, Zero, logits_bytes, state_bytes
from vlgpt.planning.meta import PlannedStage, planned_stage
from vlgpt.stages.language import LanguageStage

GIB = 1 << 30
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
# Of a packed row's positions: about 0.55 in caption pairs, 0.3 in pages of five images.
VISUAL_SHARE = 0.45


def parse_bytes(text: str) -> int:
    """`40GB`, `80G`, `0.5TB` -> bytes, in powers of 1024 as GPUs are named. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--gpu-memory {text!r} is no size: write it like 40GB")
    unit = _UNITS[match[2]]
    return int(float(match[1]) * (1 << unit if unit else 1))


def make_plan(
    run: s.RunSettings,
    *,
    gpus: int,
    gpu_memory: int,
    nodes: int = 1,
    peak_tflops: float | None = None,
    mfu: float = 0.4,
) -> JsonObject:
    """The plan of a run on `nodes` x `gpus` devices. Raises UserError for unknown shapes and senseless numbers."""
    if gpus < 1 or nodes < 1 or not 0 < mfu <= 1:
        raise UserError(f"--gpus {gpus}, --nodes {nodes}: at least 1 each; --mfu {mfu}: above 0, at most 1")
    planned = planned_stage(run)
    world = gpus * nodes
    peak = peak_tflops or run.peak_tflops or 312.0
    counts = planned.parameters
    trained = sum(n for _, n in counts.values())
    step = planned.costs.of(work_of(run, planned, run.global_batch))
    has_checkpointing = bool(getattr(run.stage, "has_checkpointing", False))
    recomputed = step.recomputed if has_checkpointing else 0
    seconds = (step.model + recomputed) / (world * peak * 1e12 * mfu)
    layouts = [layout(run, planned, zero, world, gpu_memory, c) for c in (False, True) for zero in ZEROS]
    own = _ranked([x for x in layouts if x["has_checkpointing"] == has_checkpointing])
    return {
        "run": run.name,
        "hardware": {
            "nodes": nodes,
            "gpus_per_node": gpus,
            "gpu_memory_bytes": gpu_memory,
            "peak_tflops": peak,
        },
        "parameters": {
            "total": sum(n for n, _ in counts.values()),
            "trainable": trained,
            "lora": counts.get("lora_adapters", (0, 0))[0],
            "regression_head": counts.get("regression_head", (0, 0))[0],
            "components": {name: {"count": n, "trainable": t} for name, (n, t) in counts.items()},
        },
        "memory": memory_of(run, planned, world),
        "layouts": layouts,
        "recommended": next(iter(own or _ranked(layouts)), None),
        "flops": {
            "per_step": step.model,
            "per_sample": step.model // run.global_batch,
            "recomputed_per_step": recomputed,
        },
        "schedule": {
            "steps": run.steps,
            "samples": run.steps * run.global_batch,
            "positions": run.steps * run.global_batch * (planned.length or 1),
            "mfu": mfu,
            "seconds_per_step": round(seconds, 3),
            "hours": round(seconds * run.steps / 3600, 1),
        },
        "disk": disk_bytes(run, planned, trained),
        "assumptions": [
            *planned.origins,
            f"{peak:g} TFLOP/s peak per device, of which {mfu:.0%} is reached (recomputation included)",
            f"packed rows are full; {VISUAL_SHARE:.0%} of their positions are visual, all others text targets",
            f"{RESERVE_BYTES / GIB:g} GiB for CUDA itself and {FRAGMENTATION - 1:.0%} for fragmentation are kept free",
            "the encoder's text tower is not counted: it is no part of the model (a CLIP-L folder loads 0.25 GB of it)",
            "towers whose features are read from disk are held, but not run",
            "attention without stored scores (flash-attn or SDPA), each row counted as one document",
            "the plan was never compared with a GPU",
        ],
    }


def work_of(run: s.RunSettings, planned: PlannedStage, rows: int) -> Work:
    """A typical micro-batch of full rows; in stage 1, of images."""
    if not isinstance(planned.stage, LanguageStage):
        return Work(rows, rows)
    positions, num_visual = rows * planned.length, planned.stage.model.lm.num_visual
    num_images = max(1, int(positions * VISUAL_SHARE) // num_visual)
    visual = num_images * num_visual
    return Work(rows, num_images, positions - visual, visual, "visual" not in run.data.features)


def _logits(planned: PlannedStage, work: Work) -> int:
    if not isinstance(planned.stage, LanguageStage):
        return 0
    vocabulary = planned.stage.model.lm.backbone.config.vocab_size
    return logits_bytes(work.num_text_targets, vocabulary=vocabulary, number_bytes=planned.number_bytes)


def memory_of(run: s.RunSettings, planned: PlannedStage, world: int) -> dict[str, int]:
    """Bytes per GPU by kind for the run's own micro-batch under ZeRO-2."""
    work = work_of(run, planned, run.micro_batch)
    states = state_bytes(planned.parameters, ZEROS[1], num_gpus=world, number_bytes=planned.number_bytes)
    cost = planned.costs.of(work)
    return {f"{name}_bytes": value for name, value in states.items()} | {
        "activations_bytes": cost.saved,
        "activations_checkpointed_bytes": cost.checkpointed,
        "logits_bytes": _logits(planned, work),
    }


def layout(
    run: s.RunSettings,
    planned: PlannedStage,
    zero: Zero,
    world: int,
    gpu_memory: int,
    has_checkpointing: bool,
) -> JsonObject:
    """The largest micro-batch that fits under one ZeRO setting and divides the global batch; 0 when none does."""
    number = planned.number_bytes
    states = sum(state_bytes(planned.parameters, zero, num_gpus=world, number_bytes=number).values())
    if zero.stage == 3 and planned.length:
        # ZeRO-3 holds two blocks whole: the one at work and the one that is fetched ahead.
        sizes = (sum(p.numel() for p in block.parameters()) for block in blocks_of(planned.stage))
        states += 2 * number * max(sizes, default=0)
    best = {"micro_batch": 0, "needed_bytes": 0}
    micro = 1
    while run.global_batch % (micro * world) == 0:
        work = work_of(run, planned, micro)
        cost = planned.costs.of(work)
        kept = (cost.checkpointed if has_checkpointing else cost.saved) + _logits(planned, work)
        needed = int((states + kept) * FRAGMENTATION) + RESERVE_BYTES
        if needed > gpu_memory:
            best = best if best["micro_batch"] else {"micro_batch": 0, "needed_bytes": needed}
            break
        best = {"micro_batch": micro, "needed_bytes": needed}
        micro *= 2
    accumulation = run.global_batch // (best["micro_batch"] * world) if best["micro_batch"] else 0
    facts = {"ds_config": f"ds_configs/{zero.name}.json", "has_checkpointing": has_checkpointing}
    return {**facts, **best, "accumulation": accumulation, "fits": best["micro_batch"] > 0}


def _ranked(layouts: list[JsonObject]) -> list[JsonObject]:
    """Those that fit, best first: a micro-batch up to 8, then no gathering or offload, then no recomputation."""
    order = ["zero2", "zero1", "zero3", "zero2_offload"]

    def rank(found: JsonObject) -> tuple[int, int, bool]:
        place = order.index(found["ds_config"].removeprefix("ds_configs/").removesuffix(".json"))
        return -min(found["micro_batch"], 8), place, found["has_checkpointing"]

    return sorted((x for x in layouts if x["fits"]), key=rank)


def feature_sizes(planned: PlannedStage) -> dict[str, int]:
    """Numbers that every feature has per image or text."""
    tokenizer, detokenizer = planned.stage.image_parts
    sizes = detokenizer.arguments
    return {
        "patches": tokenizer.transformer.context_positions.numel(),
        "visual": tokenizer.num_visual * tokenizer.visual_width,
        "image_condition": sizes["image_tokens"] * sizes["image_width"],
        "text_condition": sizes["text_tokens"] * sizes["text_width"],
    }


def disk_bytes(run: s.RunSettings, planned: PlannedStage, trained: int) -> dict[str, int]:
    """Features per million images (half precision) and the commits that a run keeps."""
    sizes = feature_sizes(planned)
    disk = {f"{name}_bytes_per_million": 2 * sizes[name] * 1_000_000 for name in run.data.features}
    # Master weights and two moments, one fp32 file of trained weights, DeepSpeed's module file.
    commit = trained * (12 + 4 + planned.number_bytes)
    return {**disk, "commit_bytes": commit, "kept_commits_bytes": commit * (run.checkpoint.keep + 1)}
