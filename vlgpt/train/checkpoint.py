"""Saving and resuming a run: DeepSpeed's partitions, the trainable weights in fp32, RNG and data position."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vlgpt import seeds
from vlgpt.log import UserError, get_logger
from vlgpt.stages.weights import TRAINABLE_FILE
from vlgpt.train import commit
from vlgpt.train.engine import Engine

_OWNER = re.compile(
    r"(?:^|zero_pp_)rank_(\d+)_"
)  # DeepSpeed's optimizer partitions and our own per-rank files


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after `step`, with the loader's state."""

    step: int
    data: dict[str, Any]
    facts: dict[str, Any]


def own_buffers(engine: Engine) -> dict[str, Tensor]:
    """Persistent buffers outside frozen modules: statistics and scales that belong to the result."""
    stage = engine.stage
    frozen = tuple(f"{name}." for name in _frozen_names(engine))
    state = stage.state_dict()
    names = {name for name, _ in stage.named_parameters()}
    return {
        n: t.detach().cpu().clone() for n, t in state.items() if n not in names and not n.startswith(frozen)
    }


def _frozen_names(engine: Engine) -> list[str]:
    frozen = {id(module) for module in engine.stage.frozen_modules().values()}
    return [name for name, module in engine.stage.named_modules() if id(module) in frozen]


def save(
    engine: Engine, root: Path, *, step: int, data: dict[str, Any], facts: dict[str, Any], keep: int
) -> Path:
    """Commit a checkpoint (collective) and prune old ones. Returns its folder."""
    tag = commit.tag_of(step)
    folder = root / tag
    if engine.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # a torn one of the same step
        folder.mkdir(parents=True)
    engine.barrier()
    engine.save(root, tag)
    trainable = {**engine.trainable_state(), **own_buffers(engine)}
    rank_state = folder / f"rank_{engine.rank}_rng.safetensors"
    save_file(seeds.rng_state(), rank_state)
    if engine.rank == 0:
        save_file(trainable, folder / TRAINABLE_FILE, metadata={"step": str(step)})
        (folder / "state.json").write_text(json.dumps({"step": step, "data": data, **facts}, indent=1))
    engine.barrier()
    commit.write_manifest(folder, engine.rank, files_of(folder, engine.rank))
    engine.barrier()
    if engine.rank == 0:
        commit.commit(folder, world_size=engine.world_size, facts={"step": step})
        commit.prune(root, keep=keep)
    engine.barrier()
    return folder


def files_of(folder: Path, rank: int) -> list[Path]:
    """The files that a rank vouches for: its own partitions; rank 0 also those that belong to no rank."""
    files = []
    for path in folder.rglob("*"):
        owner = _OWNER.search(path.name)
        if path.is_file() and not path.name.startswith(".") and (int(owner[1]) if owner else 0) == rank:
            files.append(path)
    return files


def resume(engine: Engine, root: Path, *, facts: dict[str, Any]) -> Resumed | None:
    """Load the newest good checkpoint on all ranks alike (collective); None when there is none.

    Raises UserError when the frozen weights differ from those the checkpoint was trained with.
    """
    found: Any = None
    if engine.rank == 0:
        try:
            newest = commit.newest(root)
            found = {"tag": newest.tag, "world_size": newest.marker["world_size"]} if newest else {}
        except UserError as error:
            found = {"error": str(error)}
    found = engine.gather_objects(found)[0]
    if "error" in found:
        raise UserError(found["error"])
    if not found:
        return None
    folder = root / found["tag"]
    state = json.loads((folder / "state.json").read_text())
    for name, wanted in state.get("frozen", {}).items():
        if (have := facts.get("frozen", {}).get(name)) != wanted:
            raise UserError(
                f"frozen part {name!r} has hash {have}, checkpoint {found['tag']} was trained with {wanted}"
            )
    if found["world_size"] != engine.world_size:
        raise UserError(
            f"checkpoint {found['tag']} was written by {found['world_size']} processes, "
            f"this run has {engine.world_size}"
        )
    engine.load(root, found["tag"])
    load_buffers(engine, load_file(folder / TRAINABLE_FILE))
    rng = load_file(folder / f"rank_{engine.rank}_rng.safetensors")
    seeds.set_rng_state(rng)
    get_logger().info("resumed from %s", folder)
    return Resumed(state["step"], state["data"], state)


def load_buffers(engine: Engine, stored: dict[str, Tensor]) -> None:
    """Copy persistent buffers of a checkpoint back; DeepSpeed restores parameters only."""
    buffers = dict(engine.stage.named_buffers())
    for name in own_buffers(engine):
        if name not in stored:
            raise UserError(f"buffer {name} is missing in the checkpoint")
        buffers[name].copy_(stored[name])
