"""Reading and writing weights: in shards, adapters merged one tensor at a time, no second copy of the model."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlgpt.errors import UserError
from vlgpt.files import replacing

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_ADAPTER_PARTS = ("lora_", "trainable_tokens_", "original_module.")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written: `like` has its shape and type, `make` computes its values when it is written."""

    like: Tensor
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return self.like.numel() * self.like.element_size()


def tensors_of(module: nn.Module, *, merge_lora: bool) -> dict[str, StoredTensor]:
    """The tensors of a module's state by name, each computed when it is written.

    Shared tensors come once, but under every name where LoRA is kept apart. With `merge_lora`, names and values are
    those after peft's merge and unload.
    The module is not changed: merged weights are made one at a time.
    """
    tensors: dict[str, StoredTensor] = {}
    # peft wraps tied embeddings one by one: a model with kept adapters is loaded from both.
    is_wrapped = not merge_lora and any("lora_" in name for name, _ in module.named_parameters())
    seen: set[tuple[int, int]] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        is_shared = identity in seen and tensor.numel() > 0 and not tensor.is_meta
        seen.add(identity)
        if is_shared and not is_wrapped:
            continue
        if not merge_lora:
            tensors[name] = StoredTensor(tensor, tensor.detach().clone if is_shared else tensor.detach)
        elif not any(part in name for part in _ADAPTER_PARTS):
            make = _merger(module, name, tensor)
            tensors[_plain_name(name)] = StoredTensor(tensor, make)
    return tensors


def _plain_name(name: str) -> str:
    """The name that a tensor has without peft around it."""
    for wrapper in (".base_model.model", ".token_adapter", ".base_layer", ".modules_to_save.default"):
        name = name.replace(wrapper, "", 1)
    return name


def _merger(module: nn.Module, name: str, tensor: Tensor) -> Callable[[], Tensor]:
    """How to compute the merged value of a tensor. Source: `merge` of peft's LoraLayer and TrainableTokensLayer."""
    path, _, leaf = name.rpartition(".")
    if not path.endswith(".base_layer") or leaf != "weight":
        return tensor.detach
    layer: Any = module.get_submodule(path.removesuffix(".base_layer"))

    @torch.no_grad()
    def merged() -> Tensor:
        if hasattr(layer, "get_delta_weight") and not hasattr(layer, "token_indices"):
            # In fp32, so that 16-bit weights are rounded once.
            deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
            return sum(deltas, tensor.detach().float()).to(tensor.dtype)
        weights: Tensor = layer.get_merged_weights(layer.active_adapters)
        return weights.detach()

    return merged


def write_weights(
    tensors: Mapping[str, StoredTensor], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """model.safetensors, or shards of at most `max_shard_bytes` with an index as transformers writes and reads them."""
    shards = list(_split(tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {name: tensors[name].make().cpu().contiguous() for name in names}
        with replacing(folder / file) as temporary:
            save_file(values, temporary, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")


def _split(tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> Iterator[list[str]]:
    """Names of each shard, in order; a tensor that is larger than a shard gets one of its own."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.num_bytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.num_bytes
    yield names


def weight_files(path: Path) -> list[Path]:
    """The file `path`, or the shards that its index lists. Raises FileNotFoundError naming what is missing."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file():
        return [path]
    if not index.is_file():
        raise FileNotFoundError(f"weights {path} are missing (and there is no {index.name})")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    files = [path.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{path.parent} lacks the shards {', '.join(missing)} that {index.name} lists"
        )
    return files


def shape_problems(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Missing, unexpected and differently shaped tensors, in words."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    return problems


def load_whole(kind: Any, path: str, **options: Any) -> Any:
    """`from_pretrained` that leaves no weight random. Raises ValueError naming the first tensors that are missing.

    transformers lists tensors of another shape only with `ignore_mismatched_sizes=True`, diffusers always.
    """
    options = {**stored_form(Path(path) / (options.get("subfolder") or "")), **options}
    try:
        model, report = kind.from_pretrained(path, output_loading_info=True, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(f"a .bin file holds more than weights: {str(error).splitlines()[0]}") from error
    wrong = [f"missing {name}" for name in sorted(report["missing_keys"])]
    wrong += [f"another shape: {found}" for found in report.get("mismatched_keys", ())]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit {type(model).__name__}: {'; '.join(wrong[:4])}")
    return model


def load_part(kind: Any, path: str | Path, *, subfolder: str = "", **options: Any) -> Any:
    """A part of a pipeline, local or on the hub, by `load_whole`. Raises UserError when it cannot be loaded."""
    if subfolder:
        options["subfolder"] = subfolder
    try:
        return load_whole(kind, str(path), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = f"{path}/{subfolder}" if subfolder else str(path)
        reason = str(error).splitlines()[0]
        raise UserError(f"no {kind.__name__} could be loaded from {where}: {reason}") from error


def stored_form(folder: Path) -> dict[str, Any]:
    """What `from_pretrained` must be told of a local folder: only `.bin` files (both libraries read them with torch's
    `weights_only`, so nothing in them is executed), or only files of the variant `fp16`.
    """
    names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
    is_safe = any(name.endswith(".safetensors") for name in names)
    kept = [name for name in names if name.endswith(".safetensors" if is_safe else ".bin")]
    form: dict[str, Any] = {"use_safetensors": is_safe} if kept else {}
    if kept and all(".fp16" in name for name in kept):
        form["variant"] = "fp16"
    return form


def fingerprint(tensors: Mapping[str, Tensor], *, num_samples: int = 1024) -> str:
    """A hash of names, shapes and evenly spread numbers (in bf16, so it is the same for a model held in fp32 or bf16).

    For weights too large to read whole at every start; another model differs in nearly every number.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        step = max(1, tensor.numel() // num_samples)
        values = tensor.detach().flatten()[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
