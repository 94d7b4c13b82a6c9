"""Saving and resuming a run: DeepSpeed's partitions, the trainable weights in fp32, RNG and data position."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlgpt import seeds
from vlgpt.commits import TRAINABLE_FILE
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.log import get_logger
from vlgpt.stages.base import check_frozen
from vlgpt.train import together
from vlgpt.train.engine import Engine, convert_to_universal
from vlgpt.train.observers import NO_OBSERVER, Observer

# DeepSpeed's optimizer partitions and our own files of one rank
_OWNER = re.compile(r"(?:^|zero_pp_)rank_(\d+)_")
# per trained parameter: fp32 master, two moments, and the fp32 weights file
OPTIMIZER_BYTES = 16


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after `step`, with the loader's state."""

    step: int
    data: JsonObject
    facts: JsonObject
    tag: str
    is_elastic: bool = False  # written by another number of processes


# -------------------------------------------------------------------------------------------------------------- saving


def save(
    engine: Engine,
    root: Path,
    *,
    step: int,
    data: Mapping[str, object],
    facts: Mapping[str, object],
    keep: int,
    observers: Observer = NO_OBSERVER,
) -> Path:
    """Commit a checkpoint (collective) and prune old ones. Returns its folder.

    Raises commit.CommitFailed, on all ranks alike; nothing of the folder is left then.
    """
    is_first = engine.rank == 0
    # Collective, so before anything that can fail on one rank and leave the others waiting.
    weights = {TRAINABLE_FILE: engine.trainable_state(is_kept=is_first)}
    weights |= observers.tensors(is_kept=is_first)
    buffers = own_buffers(engine) if is_first else {}

    def write(folder: Path) -> None:
        engine.save(root, folder.name)
        _save_tensors(seeds.rng_state(), folder / f"rank_{engine.rank}_rng.safetensors")
        if is_first:
            for name, tensors in weights.items():
                _save_tensors({**tensors, **buffers}, folder / name, step=step)
            state = {"step": step, "data": data, "zero_stage": engine.zero_stage, **facts}
            (folder / "state.json").write_text(json.dumps(state, indent=1))

    return together.save(
        engine,
        root,
        step=step,
        write=write,
        owned=lambda folder: files_of(folder, engine.rank),
        keep=keep,
        first_estimate=(OPTIMIZER_BYTES + engine.dtype.itemsize) * engine.num_trainable,
    )


def _save_tensors(tensors: dict[str, Tensor], path: Path, *, step: int | None = None) -> None:
    """safetensors, whose error on a full disk becomes an OSError."""
    try:
        save_file(tensors, path, metadata=None if step is None else {"step": str(step)})
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def own_buffers(engine: Engine) -> dict[str, Tensor]:
    """Persistent buffers outside frozen modules: statistics and scales that belong to the result."""
    frozen_ids = {id(module) for module in engine.stage.frozen_modules().values()}
    frozen = tuple(f"{name}." for name, module in engine.stage.named_modules() if id(module) in frozen_ids)
    # Told from parameters by their type: a tied table has two names, of which `named_parameters` gives only one.
    state = engine.stage.state_dict(keep_vars=True)
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in state.items()
        if not isinstance(tensor, nn.Parameter) and not name.startswith(frozen)
    }


def files_of(folder: Path, rank: int) -> list[Path]:
    """The files that a rank vouches for: its own partitions; rank 0 also those that belong to no rank."""
    files = []
    for path in folder.rglob("*"):
        owner = _OWNER.search(path.name)
        if path.is_file() and not path.name.startswith(".") and (int(owner[1]) if owner else 0) == rank:
            files.append(path)
    return files


# ------------------------------------------------------------------------------------------------------------ resuming


def resume(
    engine: Engine, root: Path, *, facts: Mapping[str, Any], observers: Observer = NO_OBSERVER
) -> Resumed | None:
    """Load the newest good checkpoint on all ranks alike (collective); None when there is none.

    A checkpoint of another world size or ZeRO stage is converted on the way. Raises UserError when the frozen weights
    differ from those that the checkpoint was trained with, or when no checkpoint is whole.
    """
    found = together.newest(root, engine)
    if found is None:
        return None
    folder = root / found.tag
    state = json.loads((folder / "state.json").read_text())
    check_frozen(facts.get("frozen", {}), state.get("frozen", {}), tag=found.tag)
    trained = load_file(folder / TRAINABLE_FILE)
    is_elastic = found.marker["world_size"] != engine.world_size
    if state.get("zero_stage", engine.zero_stage) != engine.zero_stage:
        load_weights_only(engine, trained, f"it was written under ZeRO-{state['zero_stage']}")
    elif is_elastic:
        load_elastic(engine, folder, trained, found.marker["world_size"])
    else:
        engine.load(root, found.tag)
    load_buffers(engine, trained)
    observers.resume(folder, trained)
    if is_elastic:  # the random streams belong to other ranks: new ones, addressed by the step
        seeds.seed_everything(engine.settings.seed, "training", state["step"], engine.rank)
    else:
        seeds.set_rng_state(load_file(folder / f"rank_{engine.rank}_rng.safetensors"))
    get_logger().info("resumed from %s", folder)
    return Resumed(state["step"], state["data"], state, found.tag, is_elastic)


def load_elastic(engine: Engine, folder: Path, trained: dict[str, Tensor], world_size: int) -> None:
    """Load partitions of another world size through DeepSpeed's universal format, kept only for the load.

    Frozen weights are not in it: they were loaded and checked by hash before. When the conversion fails, training goes
    on from the fp32 weights with fresh optimizer moments, and a warning says so.
    """
    message = "checkpoint %s was written by %d processes, this run has %d: converting it"
    get_logger().warning(message, folder.name, world_size, engine.world_size)
    target = folder.with_name(f".{folder.name}_universal")
    failure = together.on_rank_0(engine, lambda: _convert(folder, target))
    if failure:
        load_weights_only(engine, trained, f"its optimizer state cannot be converted ({failure})")
    else:
        engine.load_universal(target)
    engine.barrier()
    if engine.rank == 0:
        shutil.rmtree(target, ignore_errors=True)


def _convert(folder: Path, target: Path) -> str:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        convert_to_universal(folder, target)
    except RuntimeError as error:
        return str(error)
    return ""


def load_weights_only(engine: Engine, trained: dict[str, Tensor], why: str) -> None:
    """The fallback, with a warning: fp32 weights as they were, fresh optimizer moments."""
    get_logger().warning("WEIGHTS ONLY, optimizer moments start from zero: %s", why)
    engine.load_weights(trained)


def load_buffers(engine: Engine, stored: dict[str, Tensor]) -> None:
    """Copy persistent buffers of a checkpoint back; DeepSpeed restores parameters only."""
    for name in own_buffers(engine):
        if name not in stored:
            raise UserError(f"buffer {name} is missing in the checkpoint")
        engine.stage.get_buffer(name).copy_(stored[name])
