"""The trained weights of a run, from the one safetensors file of a commit: no deepspeed, no pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlgpt.errors import UserError
from vlgpt.files import sha256_file
from vlgpt.log import get_logger
from vlgpt.stages.base import Stage

TRAINABLE_FILE = "trainable.safetensors"
AVERAGE_FILE = "average.safetensors"  # the moving average, with optimizer.ema_decay: preferred where it is
MARKER = "COMMITTED.json"


@dataclass(frozen=True)
class TrainedWeights:
    """Parameters by name, and the hashes of the frozen parts that they were trained with."""

    tag: str
    tensors: dict[str, Tensor]
    frozen: dict[str, str]


def newest_trainable(run: Path) -> TrainedWeights:
    """The newest commit of a run whose weights are whole; older ones are tried in turn, with a warning.

    Raises UserError when there is none.
    """
    root = run / "checkpoints"
    for marker in sorted(root.glob(f"step_*/{MARKER}"), reverse=True):
        folder = marker.parent
        name = AVERAGE_FILE if (folder / AVERAGE_FILE).is_file() else TRAINABLE_FILE
        if not _is_whole(folder, name):
            get_logger("export").warning("checkpoint %s is passed over: %s is damaged", folder.name, name)
            continue
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        return TrainedWeights(folder.name, load_file(folder / name), state.get("frozen", {}))
    raise UserError(f"run {run} has no committed checkpoint: train it first")


def _is_whole(folder: Path, name: str) -> bool:
    """Whether the file has the hash that its manifest, and thereby the marker, vouches for."""
    path, manifest = folder / name, folder / "rank_0.json"
    if not path.is_file() or not manifest.is_file():
        return False
    recorded = {record["name"]: record["sha256"] for record in json.loads(manifest.read_text())["files"]}
    return recorded.get(name) == sha256_file(path)


def load_trainable(stage: Stage, trained: TrainedWeights) -> None:
    """Copy trained parameters and buffers into a stage built from the same settings.

    Raises UserError when a frozen part has other weights, or names and shapes differ.
    """
    found = stage.frozen_hashes() if trained.frozen else {}
    for name, wanted in trained.frozen.items():
        if found.get(name) != wanted:
            raise UserError(
                f"frozen part {name!r} has hash {found.get(name)}, {trained.tag} was trained with {wanted}"
            )
    own: dict[str, Tensor] = dict(stage.named_parameters(remove_duplicate=False))
    own |= dict(stage.named_buffers(remove_duplicate=False))
    missing = [
        name
        for name, parameter in stage.named_parameters()
        if parameter.requires_grad and name not in trained.tensors
    ]
    unknown = [name for name in trained.tensors if name not in own]
    misfits = [n for n, tensor in trained.tensors.items() if n in own and own[n].shape != tensor.shape]
    if missing or unknown or misfits:
        raise UserError(
            f"{trained.tag} does not fit this configuration: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(misfits)} of another shape: {', '.join([*missing, *unknown, *misfits][:4])}"
        )
    with torch.no_grad():
        for name, tensor in trained.tensors.items():
            own[name].copy_(tensor)
