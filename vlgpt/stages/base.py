"""A stage: a module from a batch to sums of losses. The loop knows nothing else about what is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vlgpt.batch import LossTerm
from vlgpt.commits import TrainedWeights
from vlgpt.errors import UserError
from vlgpt.models.encoders import ClipEncoder, hash_weights, load_clip
from vlgpt.settings import EncoderSettings, RunSettings, StageSettings
from vlgpt.tokens import DocumentTokenizer

AllSum = Callable[[Tensor], Tensor]


class Stage(nn.Module, ABC):
    """Base of all stages. One of another package is named `package.module:Class` in `stage.kind`.

    `settings_class` is what a run's YAML holds under `stage`. `batch_kind` says which batches the loader must give;
    `terms` names the losses in their fixed order. Packed batches need the `document_tokenizer`. Frozen modules never
    train; their hashes travel with every checkpoint, their weights do not.
    """

    settings_class: ClassVar[type[StageSettings]]
    batch_kind: Literal["packed", "conditions"]
    terms: tuple[str, ...]
    document_tokenizer: DocumentTokenizer | None = None

    @classmethod
    @abstractmethod
    def from_settings(cls, run: RunSettings, *, num_sources: int) -> Stage:
        """Make a stage of this class from a run's settings, with its weights loaded.

        `num_sources`: the data sources that losses are summed by. Raises UserError when a component or checkpoint is
        missing or does not fit.
        """

    @abstractmethod
    def count_targets(self, batch: Any) -> dict[str, float]:
        """How many targets each term sums over in this batch, from the masks alone."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, LossTerm]:
        """Sums of losses over this batch, one per term, also when it holds no target of that term."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what the next stage starts from (components, or an export) into an empty folder."""

    def prepare(self, batches: Iterable[Any], all_sum: AllSum) -> None:
        """Take statistics from data before step 1 (every rank calls it; `all_sum` adds over ranks)."""

    def finish(self, batches: Iterable[Any], all_sum: AllSum) -> None:
        """Take statistics after the last step, for the next stage."""

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose what can run on this device in this precision; called once the stage is there, before step 1."""

    def check(self) -> None:
        """Raise UserError when the model does not do what training relies on; called before step 1."""

    def frozen_modules(self) -> dict[str, nn.Module]:
        """Modules that must not change, by name."""
        return {}

    def train(self, mode: bool = True) -> Stage:
        """Frozen parts stay in eval mode: their dropout, if any, must not run."""
        super().train(mode)
        for module in self.frozen_modules().values():
            module.eval()
        return self

    def frozen_hashes(self) -> dict[str, str]:
        """Hash of the weights of each frozen module, by name; training must not change them."""
        return {name: hash_weights(module) for name, module in self.frozen_modules().items()}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer changes, in the module's order."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def dtype_of(run: RunSettings) -> torch.dtype:
    """The type in which a run computes, and holds its language model."""
    return torch.bfloat16 if run.precision == "bf16" else torch.float32


def load_encoder(settings: EncoderSettings | None) -> ClipEncoder | None:
    """The frozen CLIP that settings name; None when they name none. Raises UserError when it cannot be loaded."""
    if settings is None:
        return None
    return load_clip(**settings.model_dump())


def is_trained(module: nn.Module) -> bool:
    """Whether any of its parameters is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def parameter_groups(stage: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices only; norms, biases, embeddings, queries and token rows get none.

    Raises ValueError when nothing is trainable.
    """
    embeddings = {id(m.weight) for m in stage.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = id(parameter) in embeddings or name.endswith(("queries", "positions", "_absent"))
        is_token_row = "trainable_tokens" in name
        (plain if parameter.ndim < 2 or is_table or is_token_row else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the stage has no trainable parameter")
    return groups


def check_frozen(found: Mapping[str, str], wanted: Mapping[str, str], *, tag: str) -> None:
    """Raises UserError naming the first frozen part that is not the one which checkpoint `tag` was trained with."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"frozen part {name!r} has hash {found.get(name)}, checkpoint {tag} was trained with {value}"
            )


def load_trainable(stage: Stage, trained: TrainedWeights) -> None:
    """Copy trained parameters and buffers into a stage built from the same settings.

    Raises UserError when a frozen part has other weights, or names and shapes differ.
    """
    check_frozen(stage.frozen_hashes() if trained.frozen else {}, trained.frozen, tag=trained.tag)
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
