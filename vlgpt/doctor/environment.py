"""What is installed, what the machine has, and whether a run's disk is large enough."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlgpt import settings as s
from vlgpt.doctor.lint import Finding
from vlgpt.log import UserError
from vlgpt.planning.plan import make_plan

GIB = 1 << 30
# Name, oldest version, what needs it, and how to get it.
PACKAGES = (
    ("torch", "2.6", "everything", "pip install 'torch>=2.6'"),
    ("transformers", "5.0", "language models", "pip install 'transformers>=5'"),
    ("pydantic", "2.9", "settings", "pip install 'pydantic>=2.9'"),
    ("safetensors", "0.5", "weights", "pip install 'safetensors>=0.5'"),
    ("deepspeed", "0.19", "training", "pip install 'vlgpt[train]'"),
    ("peft", "0.18", "LoRA", "pip install 'vlgpt[models]'"),
    ("diffusers", "0.38", "diffusion decoders", "pip install 'vlgpt[models]'"),
    ("open_clip_torch", "3.2", "CLIP through open_clip", "pip install 'vlgpt[models]'"),
)


def check_environment(run: s.RunSettings | None = None) -> list[Finding]:
    """Versions, accelerator, communication, memory and disk."""
    return [*_packages(), *_accelerator(), *_machine(), *_disk(run)]


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
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    yield Finding("ok", f"{os.cpu_count()} CPU cores, {memory:.0f} GiB of memory")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < GIB:
        fix = "start the container with --shm-size=16g, or set data.num_workers=0"
        yield Finding("warning", f"/dev/shm has {free / GIB:.2f} GiB free: loader workers may crash", fix)


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
