"""The only file that imports deepspeed: distributed set-up, the merged configuration, steps, saves and loads."""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlgpt.batch import LossTerm, tensors_of, to_device
from vlgpt.errors import UserError
from vlgpt.files import free_port
from vlgpt.log import get_logger
from vlgpt.settings import RunSettings
from vlgpt.stages.base import Stage, dtype_of, parameter_groups
from vlgpt.train.agreement import join_ranks
from vlgpt.train.ds_config import lint_zero

T = TypeVar("T")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: the gradient norm before clipping, and whether it was skipped as non-finite."""

    gradient_norm: float
    is_skipped: bool


def start_process_group(*, timeout_s: float, facts: Mapping[str, object] | None = None) -> None:
    """Join the processes of the launcher (environment variables), or start a group of one.

    `facts` must be equal on all ranks. Raises UserError at once when they differ, or a rank is wrong or taken twice.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    # An empty LOCAL_SIZE breaks deepspeed's CPU accelerator.
    if not os.environ.get("LOCAL_SIZE", "").isdigit():
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    store, rank, world_size = join_ranks(facts or {}, timeout_s=timeout_s)  # refuses before the slow import
    # deepspeed decorates an optimizer with torch.compile, which alone starts a pool of compiler processes in every rank
    # (0.4 GB, up to torch 2.6 at least). Nothing here is compiled.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import deepspeed

    if not torch.cuda.is_available():
        _skip_shared_memory_extension()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def _skip_shared_memory_extension() -> None:
    """On CPU deepspeed compiles a C++ extension at start-up (a minute or two) that gloo does not need."""
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A stage under DeepSpeed. All methods but the properties are collective: every rank calls them."""

    def __init__(self, stage: Stage, settings: RunSettings, ds_config: Mapping[str, object]):
        import deepspeed
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        fields = DeepSpeedZeroConfig.model_fields.items()
        known = {name for key, field in fields for name in (key, field.alias) if name}
        lint_zero(ds_config, known, source="the DeepSpeed JSON")
        self.stage = stage
        self.settings = settings
        groups = parameter_groups(stage, settings.optimizer.weight_decay)
        self.num_trainable = sum(parameter.numel() for _, parameter in stage.trainable())
        optimizer = torch.optim.AdamW(
            groups, lr=settings.optimizer.lr, betas=settings.optimizer.betas, eps=settings.optimizer.eps
        )
        # torch's AdamW on our own parameter groups, not DeepSpeed's optimizers: one set of numbers on CPU and GPU.
        with frozen_parts_out(stage):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=stage, optimizer=optimizer, config=dict(ds_config), dist_init_required=False
            )
        for module in stage.frozen_modules().values():
            module.to(device=self.device, dtype=self.dtype)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.settings)

    def place(self, batch: T) -> T:
        """Move a batch to this rank's device and the training precision."""
        return to_device(batch, self.device, self.dtype)

    def feed(self, batches: Iterable[T]) -> Iterator[tuple[T, T]]:
        """(batch, the same batch placed), one after the other."""
        if self.device.type != "cuda":
            for batch in batches:
                yield batch, self.place(batch)
            return
        # While one batch is trained on, the next is copied and its pixels are normalised on a stream of its own, beside
        # the kernels of the step. Only copies from pinned memory overlap, so the loader pins.
        stream = torch.cuda.Stream(self.device)
        coming: deque[tuple[T, T, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(stream):
                coming.append((batch, self.place(batch), stream.record_event()))
            if len(coming) > 1:
                yield _arrived(*coming.popleft())
        while coming:
            yield _arrived(*coming.popleft())

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks in the dtype of `values`, on the engine's device (collective).

        `values` itself is overwritten when it is already there.
        """
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def all_max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all ranks, on the engine's device (collective).

        `values` itself is overwritten when it is already there.
        """
        values = values.to(self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def forward(self, batch: object) -> dict[str, LossTerm]:
        """Losses of one micro-batch, as sums."""
        terms: dict[str, LossTerm] = self._engine(batch)
        return terms

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. DeepSpeed divides by the accumulation and averages over ranks."""
        self._engine.backward(loss)

    def end_micro_batch(self) -> None:
        """Tell DeepSpeed that a micro-batch is over; at the last one of a step this is the optimizer step."""
        with frozen_parts_out(self.stage):  # it releases every parameter that it finds
            self._engine.step()

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all parameter groups for the next update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def step_result(self) -> StepResult:
        """Outcome of the optimizer step just taken; a non-finite gradient skips it on all ranks alike."""
        is_skipped = bool(getattr(self._engine.optimizer, "overflow", False))
        norm = self._engine.get_global_grad_norm()
        return StepResult(float("nan") if norm is None else float(norm), is_skipped)

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode; frozen parts stay in evaluation mode."""
        self._engine.train(mode)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Eval mode without gradients, in which the stage may be called directly, also under ZeRO-3."""
        # There a parameter that a module reads from elsewhere (peft's token rows) is gathered only during deepspeed's
        # own forward, or while its marks say so.
        tables = [module._parameters for module in self.stage.modules()]
        marked: list[Any] = [table for table in tables if hasattr(table, "_in_forward")]
        self.train(False)
        for table in marked:
            table._in_forward = True
        try:
            with torch.no_grad():
                yield
        finally:
            for table in marked:
                table._in_forward = False
            self.train(True)

    def save(self, root: Path, tag: str) -> None:
        """DeepSpeed's own files under root/tag: optimizer partitions and trainable weights; `latest` is not touched.

        Raises OSError when this rank could not write; it took part in everything collective before that.
        """
        with frozen_parts_out(self.stage), failures_kept(self._engine) as failures:
            self._engine.save_checkpoint(
                str(root), tag=tag, save_latest=False, exclude_frozen_parameters=True
            )
        if failures:
            raise OSError("; ".join(failures))

    def load(self, root: Path, tag: str) -> None:
        """Load what `save` wrote, at the same world size. Raises UserError when DeepSpeed finds nothing."""
        with frozen_parts_out(self.stage):
            # Not strict: `save` leaves the frozen parameters out.
            path, _ = self._engine.load_checkpoint(str(root), tag=tag, load_module_strict=False)
        if path is None:
            raise UserError(f"DeepSpeed found no checkpoint {tag} under {root}")

    def load_universal(self, folder: Path) -> None:
        """Load a folder that `convert_to_universal` wrote, whatever the world size it came from."""
        # Read by deepspeed at load time, and set for this load only.
        config = self._engine._config
        config.load_universal_checkpoint = True
        try:
            self.load(folder.parent, folder.name)
        finally:
            config.load_universal_checkpoint = False

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set trained parameters and their fp32 masters; optimizer moments stay as they are. Raises UserError."""
        self.load_masters(state)
        for name, parameter in self.stage.trainable():
            with torch.no_grad(), self.whole(parameter):
                if self.zero_stage < 3 or self.rank == 0:  # ZeRO-3 takes rank 0's values
                    parameter.copy_(state[name])

    def load_masters(self, state: Mapping[str, Tensor]) -> None:
        """Set the fp32 masters of everything trained (collective). Raises UserError for a missing one."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.stage.trainable():
            if name not in state:
                raise UserError(f"trained parameter {name} is missing in the checkpoint")
            safe_set_full_fp32_param(parameter, state[name].to(self.device))

    def masters(self) -> list[Tensor]:
        """This rank's partitions of the fp32 masters, flat."""
        kinds = (
            "fp32_partitioned_groups_flat",  # ZeRO-3
            "single_partition_of_fp32_groups",  # ZeRO-1 and 2
            "fp32_groups_flat_partition",  # ZeRO-1 in bf16 is an optimizer of its own
        )
        optimizer = self._engine.optimizer
        return list(next(getattr(optimizer, kind) for kind in kinds if hasattr(optimizer, kind)))

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def gathered_weights(self) -> AbstractContextManager[object]:
        """Context in which every parameter is whole on every rank (ZeRO-3 keeps them in pieces)."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            list(self.stage.parameters()), modifier_rank=None
        )
        return gathered

    def whole(self, parameter: Tensor) -> AbstractContextManager[object]:
        """Context in which one parameter is whole and may be changed on rank 0 (ZeRO-3 keeps it in pieces)."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0
        )
        return gathered

    def trainable_state(self, *, is_kept: bool = True) -> dict[str, Tensor]:
        """fp32 master weights of everything trained, gathered to the CPU of the ranks that say `is_kept`."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        # Under ZeRO the fp32 masters are partitioned, and gathering one is collective: every rank takes part, and those
        # that keep nothing free each tensor at once.
        for name, parameter in self.stage.trainable():
            full = safe_get_full_fp32_param(parameter)
            value = parameter if full is None else full
            if is_kept:
                state[name] = value.detach().float().cpu().reshape(_shape_of(parameter)).clone()
        return state

    def barrier(self) -> None:
        """Wait until every rank is here (collective)."""
        dist.barrier()

    def gather_objects(self, value: T) -> list[T]:
        """One JSON-like value per rank, on every rank (control messages, never data from files)."""
        gathered: list[T] = [value] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered


def _arrived(batch: T, placed: T, event: torch.cuda.Event) -> tuple[T, T]:
    """Let the current stream wait for a copy, and tell the allocator that it uses memory of the copy's stream."""
    current = torch.cuda.current_stream()
    current.wait_event(event)
    for tensor in tensors_of(placed):
        tensor.record_stream(current)
    return batch, placed


def _shape_of(parameter: Tensor) -> torch.Size:
    """The whole shape, also of a parameter that ZeRO-3 took apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextlib.contextmanager
def failures_kept(engine: Any) -> Iterator[list[str]]:
    """Collect what fails when deepspeed writes, instead of raising. Its recovery script is not copied."""
    # Raised inside deepspeed, a full disk on one rank would leave the others waiting at a barrier. The script would
    # make what `trainable.safetensors` already is.
    failures: list[str] = []
    writer, write = engine.checkpoint_engine, engine.checkpoint_engine.save

    def save(state_dict: object, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            failures.append(f"{Path(path).name}: {str(error).splitlines()[0]}")

    writer.save = save
    engine._copy_recovery_script = lambda path: None
    try:
        yield failures
    finally:
        writer.save = write


@contextlib.contextmanager
def frozen_parts_out(stage: Stage) -> Iterator[None]:
    """Hide frozen towers from deepspeed while it walks over parameters: they stay whole on every rank."""
    # DeepSpeed has nothing to do with them, and cannot broadcast what real ones hold (CLIP's `logit_scale` has no
    # dimension). Under ZeRO-3 a partitioned tower is gathered by all ranks together when it runs. A rank whose batch
    # holds no image does not run it, so the others would wait forever.
    frozen = {id(module) for module in stage.frozen_modules().values()}
    places = [
        (parent, name, child)
        for parent in stage.modules()
        for name, child in parent.named_children()
        if id(child) in frozen
    ]
    for parent, name, _ in places:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def convert_to_universal(source: Path, target: Path) -> None:
    """Rewrite DeepSpeed's partitions as whole tensors, which any world size can load. One process does it.

    Raises RuntimeError when deepspeed cannot convert them.
    """
    from types import SimpleNamespace

    from deepspeed.checkpoint import ds_to_universal

    options = SimpleNamespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: forking under a process group is not safe
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        nowhere = io.StringIO()
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(options)
    except (AssertionError, KeyError, IndexError, ValueError, OSError, NotImplementedError) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        # DeepSpeed's note of the newest one. Here the marker of a commit says so, and nothing else may.
        (target.parent / "latest_universal").unlink(missing_ok=True)


def stop_process_group() -> None:
    """Wait for every rank, then destroy the process group (collective); does nothing without a group.

    Without it the launcher may report a crash after success.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        get_logger().debug("process group closed")
