"""What is installed, what the machine has, and whether a run's disk is large enough."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlgpt import settings as s
from vlgpt.doctor.lint import Finding
from vlgpt.errors import UserError
from vlgpt.planning.meta import planned_stage
from vlgpt.planning.plan import feature_sizes, make_plan
from vlgpt.shards.features import MAX_OPEN_ARRAYS
from vlgpt.shards.reader import MAX_OPEN_TARS

GIB = 1 << 30
OWN_FILES = 256  # of a process without its data: libraries, devices, sockets, logs, pipes of workers
# Name, oldest version (that of setup.py), what needs it, and how to get it.
PACKAGES = (
    ("torch", "2.9", "everything", "pip install 'torch>=2.9'"),
    ("transformers", "5.21", "language models", "pip install 'transformers>=5.21,<5.40'"),
    ("pydantic", "2.9", "settings", "pip install 'pydantic>=2.9'"),
    ("safetensors", "0.8", "weights", "pip install 'safetensors>=0.8'"),
    ("deepspeed", "0.19.8", "training", "pip install 'vlgpt[train]'"),
    ("peft", "0.18", "LoRA", "pip install 'vlgpt[models]'"),
    ("diffusers", "0.38", "diffusion decoders", "pip install 'vlgpt[models]'"),
    ("open_clip_torch", "3.2", "CLIP through open_clip", "pip install 'vlgpt[models]'"),
)


def check_environment(run: s.RunSettings | None = None, *, num_processes: int = 1) -> list[Finding]:
    """Versions, accelerator, communication, memory and disk; what the loaders of a run's processes need of them."""
    loader = () if run is None else (*_loader_memory(run, num_processes), *_open_files(run))
    return [*_packages(), *_accelerator(), *_machine(), *loader, *_disk(run)]


def numbers(text: str) -> tuple[int, ...]:
    """`2.15.0+cpu` -> (2, 15, 0)."""
    parts = text.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _packages() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()}")
    for name, oldest, purpose, how in PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding("warning", f"{name} is not installed (needed for {purpose})", how)
            continue
        if numbers(found) < numbers(oldest):
            yield Finding("error", f"{name} {found} is older than {oldest}", how)
        else:
            yield Finding("ok", f"{name} {found}")


def _accelerator() -> Iterator[Finding]:
    import torch

    from vlgpt.models.layers import flash_fault

    communication = torch.distributed
    if not communication.is_available():
        yield Finding("error", "torch was built without distributed", "install an official torch wheel")
    elif torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(n).total_memory / GIB
            yield Finding("ok", f"GPU {n}: {torch.cuda.get_device_name(n)}, {memory:.0f} GiB")
        if not communication.is_nccl_available():
            yield Finding(
                "error", "NCCL is missing from this torch", "install a CUDA wheel of torch for Linux"
            )
        if not torch.cuda.is_bf16_supported():
            yield Finding(
                "error", "this GPU has no bf16", "use an Ampere GPU or newer, or set precision=fp32"
            )
        if fault := flash_fault():
            yield Finding("warning", f"{fault}; SDPA is used, slower", "pip install 'vlgpt[gpu]'")
    else:
        yield Finding("ok", "no CUDA GPU: processes talk through gloo, attention is SDPA")
        if not communication.is_gloo_available():
            yield Finding("error", "gloo is missing from this torch", "install an official torch wheel")


def _machine() -> Iterator[Finding]:
    import torch

    yield Finding("ok", f"{os.cpu_count()} CPU cores, {_memory_bytes() / GIB:.0f} GiB of memory")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free, num_gpus = shutil.disk_usage(shared).free, torch.cuda.device_count()
    text = f"/dev/shm has {free / GIB:.2f} GiB free"
    if num_gpus > 1 and free < GIB:
        fix = "start the container with --shm-size=1g or --ipc=host"
        yield Finding("warning", f"{text}: NCCL may fail, through which {num_gpus} GPUs talk there", fix)
    else:
        yield Finding("ok", f"{text}; loaders need none of it")


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _loader_memory(run: s.RunSettings, num_processes: int) -> Iterator[Finding]:
    """Batches on their way: as many as there are buffers, at any accumulation."""
    import torch

    from vlgpt.data.buffers import num_buffers

    data = run.data
    if not data.num_workers or (batch := batch_bytes(run)) is None:
        return
    count = data.num_workers * num_buffers(data, batch_bytes=batch)
    here = min(num_processes, torch.cuda.device_count() or num_processes)
    needed = here * count * batch
    text = (
        f"loaders hold at most {here} x {count} batches of {batch / 1e6:.1f} MB, {needed / GIB:.2f} of "
        f"{_memory_bytes() / GIB:.0f} GiB of memory, at any accumulation"
    )
    if needed > _memory_bytes() / 2:
        yield Finding("warning", text, "lower data.prefetch_batches, data.prefetch_bytes or micro_batch")
    else:
        yield Finding("ok", text)


def batch_bytes(run: s.RunSettings) -> int | None:
    """The largest micro-batch that can come, with features in fp32; None where shapes are not known."""
    from vlgpt.data.samples import image_kind
    from vlgpt.data.stream import POSITION_BYTES, SAMPLE_BYTES

    data = run.data
    pixels = 3 * data.image_size_px**2
    try:
        planned = planned_stage(run)
    except UserError:
        return None
    sizes = {name: 4 * size for name, size in feature_sizes(planned).items()} | {"pixels": pixels}
    if not planned.length:
        names = [*data.features, *(["pixels"] if data.pixels else [])]
        return run.micro_batch * (SAMPLE_BYTES + sum(sizes[name] for name in names))
    num_images = data.sequence_length // (planned.stage.image_parts[0].num_visual + 2)
    kind = image_kind(data)
    images = 0 if kind is None else num_images * sizes[kind]
    return run.micro_batch * (POSITION_BYTES * data.sequence_length + images)


def _open_files(run: s.RunSettings) -> Iterator[Finding]:
    """Every process that reads keeps the tars and feature files that it met last open."""
    needed = OWN_FILES
    for source in (*run.data.sources, *run.validation.sources):
        num_shards = len(list(Path(source.path).glob("*.tar"))) or MAX_OPEN_ARRAYS  # unknown of remote shards
        features = len(run.data.features) * 2 * min(num_shards, MAX_OPEN_ARRAYS)  # int8 has a file of scales
        needed += min(num_shards, MAX_OPEN_TARS) + features
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may open {limit} files (ulimit -n), this run's keep at most {needed} open"
    if limit != resource.RLIM_INFINITY and needed > limit:
        enough = "" if hard == resource.RLIM_INFINITY or needed <= hard else f" (the hard limit is {hard})"
        yield Finding("error", text, f"run `ulimit -n {needed}` before the launcher{enough}")
    else:
        yield Finding("ok", text)


def _disk(run: s.RunSettings | None) -> Iterator[Finding]:
    folder = Path(run.output_dir if run is not None else ".").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        yield Finding("error", f"{folder} cannot be written", "choose another output_dir")
    if run is None:
        yield Finding("ok", f"{free / GIB:.0f} GiB free in {folder}")
        return
    try:
        needed = make_plan(run, gpus=1, gpu_memory=40 * GIB)["disk"]["kept_commits_bytes"]
    except UserError:
        needed = 0
    text = f"{free / GIB:.1f} GiB free in {folder}, checkpoints need {needed / GIB:.1f}"
    if free < needed:
        yield Finding("error", text, "free some space, choose another output_dir, or lower checkpoint.keep")
    else:
        yield Finding("ok", text)
