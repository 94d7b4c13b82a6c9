"""A `Component` is a module that saves itself as a folder: config.json (its arguments) and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vlgpt.log import UserError

C = TypeVar("C", bound="Component")
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class Component(nn.Module):
    """Base of our own modules. `arguments` are the constructor's keyword arguments, JSON only."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self.arguments = arguments

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors; the weights are written last, by rename."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": type(self).__name__, "arguments": self.arguments}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / f".{WEIGHTS_FILE}.partial"
        save_file(state, partial)
        partial.replace(folder / WEIGHTS_FILE)

    @classmethod
    def from_folder(cls: type[C], folder: str | Path) -> C:
        """Load what `save` wrote. Raises UserError naming a missing file, another class, or differing tensors."""
        folder = Path(folder)
        arguments = read_arguments(folder, cls.__name__)
        module = cls(**arguments)
        load_weights(module, folder / WEIGHTS_FILE)
        return module


def read_arguments(folder: Path, class_name: str) -> dict[str, Any]:
    """Arguments of the saved component. Raises UserError when the folder does not hold a `class_name`."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}: expected a saved {class_name}")
    config = json.loads(path.read_text())
    if config.get("class") != class_name:
        raise UserError(f"{folder} holds a {config.get('class')!r}, wanted a {class_name}")
    return config["arguments"]


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Stream tensors of a safetensors file into `module`, one at a time.

    With `prefix`, only tensors of that name prefix are read. Raises UserError that lists missing, unexpected and
    differently shaped tensors.
    """
    if not path.is_file():
        raise UserError(f"weights {path} are missing")
    own = module.state_dict()
    with safe_open(path, framework="pt") as file:
        stored = {name[len(prefix) :]: name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        problems = [f"missing {name}" for name in own.keys() - stored.keys()]
        problems += [f"unexpected {name}" for name in stored.keys() - own.keys()]
        for name in own.keys() & stored.keys():
            found = tuple(file.get_slice(stored[name]).get_shape())
            if found != tuple(own[name].shape):
                problems.append(f"{name} has shape {found}, wanted {tuple(own[name].shape)}")
        if problems:
            shown = "; ".join(sorted(problems)[:6])
            raise UserError(f"{path} does not fit {type(module).__name__}: {len(problems)} problems: {shown}")
        with torch.no_grad():
            for name, target in own.items():
                target.copy_(file.get_tensor(stored[name]))


def freeze(module: nn.Module) -> nn.Module:
    """Set a module to eval and its parameters to require no gradient; returns it."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
