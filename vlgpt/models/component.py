"""A `Component` is a module that saves itself as a folder: config.json (its arguments) and model.safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import JsonObject, replacing
from vlgpt.models.weights import WEIGHTS_FILE, shape_problems, weight_files
from vlgpt.registry import dotted_name

C = TypeVar("C", bound="Component")
CONFIG_FILE = "config.json"


class Component(nn.Module):
    """Base of modules that are saved by themselves. Constructors take keyword arguments only, all of them JSON.

    `arguments` are those of this object, defaults included, without the names in `runtime_arguments`: these change
    how it computes (attention backend, checkpointing), not what is saved.
    `is_mapped`: built on the meta device and its weights mapped from the file. Only for classes whose constructor makes
    parameters and stored buffers and computes nothing with tensors.
    """

    is_mapped = False
    runtime_arguments: tuple[str, ...] = ()
    arguments: JsonObject

    def __new__(cls, **given: Any) -> Self:
        # `__new__` sees what the constructor gets, so that no subclass has to repeat its parameters for `save`.
        self = super().__new__(cls)
        named = {
            parameter.name: parameter.default
            for parameter in inspect.signature(cls.__init__).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in cls.runtime_arguments
        }
        arguments = {name: given.get(name, default) for name, default in named.items()}
        others = {name: value for name, value in given.items() if name not in cls.runtime_arguments}
        self.arguments = {**arguments, **others}
        return self

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors; the weights are written last, by rename."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": class_name(type(self)), "arguments": self.arguments}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(folder / WEIGHTS_FILE) as temporary:
            save_file(state, temporary)

    @classmethod
    def from_folder(cls: type[C], folder: str | Path) -> C:
        """Load what `save` wrote. Raises UserError naming a missing file, another class, or differing tensors."""
        folder = Path(folder)
        arguments = read_arguments(folder, class_name(cls))
        with torch.device("meta" if cls.is_mapped else "cpu"):
            module = cls(**arguments)
        load_weights(module, folder / WEIGHTS_FILE)
        return module


def class_name(component: type[Component]) -> str:
    """How config.json names a class: its bare name for our own, `package.module:Class` for others."""
    return component.__name__ if component.__module__.startswith("vlgpt.") else dotted_name(component)


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Modules made inside get parameters on the meta device, to be mapped from files; buffers are computed as usual.

    transformers computes what no checkpoint stores (rotary frequencies, Gemma's embedding scale) in constructors.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one comes twice, and stays one
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]  # undone below
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]  # its own again


def read_arguments(folder: Path, wanted: str) -> JsonObject:
    """The constructor arguments of a saved component, from its config.json.

    Raises UserError when the file is missing or names another class than `wanted` (as `class_name()` gives it).
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}: expected a saved {wanted}")
    config = json.loads(path.read_text())
    if config.get("class") != wanted:
        raise UserError(f"{folder} holds a {config.get('class')!r}, wanted a {wanted}")
    arguments: JsonObject = config["arguments"]
    return arguments


def load_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Stream tensors of a safetensors file, or of the shards of its index, into `module`, one at a time.

    Tensors of a module on the meta device become views of the mapped file, so processes on one machine share one copy
    (a write makes a private copy of its page only); another type than the module's is converted on the way. With
    `prefix`, only tensors of that name prefix are read. A tensor that the module shares (tied embeddings) may be
    stored once. Raises UserError that lists missing, unexpected and differently shaped tensors.
    """
    try:
        paths = weight_files(path)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    own = module.state_dict(keep_vars=True)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in paths]
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
        stored = {
            name[len(prefix) :]: file.get_slice(name)
            for file in files
            for name in file.keys()  # noqa: SIM118 - not a dict
            if name.startswith(prefix)
        }
        if problems := _misfits(own, stored):
            shown = "; ".join(sorted(problems)[:6])
            raise UserError(f"{path} does not fit {type(module).__name__}: {len(problems)} problems: {shown}")
        for name in own.keys() & stored.keys():
            value: Tensor = stored[name][...]
            if own[name].is_meta:
                sharing = [other for other in own if own[other] is own[name]]
                _assign(module, sharing, value.to(own[name].dtype))
            else:
                with torch.no_grad():
                    own[name].copy_(value)


def _misfits(own: Mapping[str, Tensor], stored: Mapping[str, Any]) -> list[str]:
    """What is wrong with the stored tensors, in words. A shared tensor may be stored under one of its names."""
    shared = {id(own[name]) for name in own.keys() & stored.keys()}
    wanted = {name: tuple(x.shape) for name, x in own.items() if name in stored or id(x) not in shared}
    return shape_problems({name: tuple(x.get_shape()) for name, x in stored.items()}, wanted)


def _assign(module: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """Put one tensor in all the places of a module that share it."""
    places = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    owner, leaf = places[0]
    if leaf in owner._parameters:
        value = nn.Parameter(value, requires_grad=cast(nn.Parameter, owner._parameters[leaf]).requires_grad)
    for owner, leaf in places:
        # mypy cannot see that `value` is a Parameter in the first case
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = value  # type: ignore[assignment]


def freeze(module: nn.Module) -> nn.Module:
    """Set a module to eval and its parameters to require no gradient; returns it."""
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module
