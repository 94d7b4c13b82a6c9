"""`vlgpt doctor --gpu`: the parts of the project that only a GPU can prove, in a few minutes.

Nobody has run this file on CUDA yet. Its logic runs in CPU tests with device, attention and communication swapped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from vlgpt import seeds
from vlgpt.doctor.lint import Finding
from vlgpt.doctor.sample import Setting, new_batch, new_stage, plan_of
from vlgpt.files import free_port
from vlgpt.models.layers import flash_fault
from vlgpt.planning.flops import peak_flops
from vlgpt.planning.memory import logits_bytes

TIMEOUT_S = 240.0
UNET = {
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [48, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def check_gpu(setting: Setting | None = None) -> list[Finding]:
    """All checks; one that fails or raises does not stop the others."""
    if setting is None and not torch.cuda.is_available():
        return [
            Finding("error", "torch sees no CUDA GPU", "install a CUDA wheel of torch and look at nvidia-smi")
        ]
    findings = []
    if setting is None:
        setting = default_setting()
        if setting.attention == "sdpa":
            words = f"{flash_fault()}: the checks below run with SDPA, slower"
            findings.append(Finding("warning", words, "pip install 'vlgpt[gpu]'"))
    checks: list[Callable[[Setting], Finding]] = [
        check_attention, check_training, check_memory, check_speed, check_decoder
    ]  # fmt: skip
    for check in checks:
        try:
            findings.append(check(setting))
        except (RuntimeError, ImportError, ValueError, OSError, subprocess.SubprocessError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            fix = "see the README's GPU section; report this with the output of `vlgpt doctor`"
            findings.append(Finding("error", f"{check.__name__}: {type(error).__name__}: {reason}", fix))
    return findings


def default_setting() -> Setting:
    """A GPU's, with the attention that `auto` would choose there."""
    return Setting(attention="sdpa" if flash_fault() else "flash_attention_2")


def check_attention(setting: Setting, *, reference: str | None = None, tolerance: float = 0.05) -> Finding:
    """The attention of training equals a reference (flash-attn: SDPA, SDPA: eager) on a packed batch of three rows, and
    documents stay apart.
    """
    reference = reference or ("eager" if setting.attention == "sdpa" else "sdpa")
    setting = replace(setting, rows=3, depth=min(setting.depth, 2))
    lm = new_stage(setting).model.lm.eval()
    batch = new_batch(setting)
    visual = batch.images.values if batch.images is not None else None
    found = {}
    with torch.no_grad():
        for attention in (setting.attention, reference):
            lm.backbone.config._attn_implementation = attention
            found[attention] = lm.hidden_states(batch, visual).float()
        lm.backbone.config._attn_implementation = setting.attention
        changed = replace(batch, token_ids=torch.where(batch.segment_ids == 1, 7, batch.token_ids))
        others = lm.hidden_states(changed, visual).float()[batch.segment_ids != 1]
    size = found[reference].norm()  # of the difference too: single numbers in bf16 differ by several per cent
    difference = float((found[setting.attention] - found[reference]).norm() / size)
    leak = float((others - found[setting.attention][batch.segment_ids != 1]).norm() / size)
    text = f"{setting.attention} against {reference} on packed rows: {difference:.1e}, between documents {leak:.1e}"
    if difference > tolerance or leak > tolerance:
        return Finding(
            "error", text, f"train with stage.attention={reference}, and report your flash-attn version"
        )
    return Finding("ok", text)


def check_training(setting: Setting, *, num_processes: int | None = None) -> Finding:
    """ZeRO-2 trains on all GPUs (two at most), and a resumed run gives the losses of the uninterrupted one."""
    count_ = num_processes or min(2, max(1, torch.cuda.device_count()))
    with tempfile.TemporaryDirectory() as folder:
        whole = _probe(Path(folder), "whole", setting, count_)
        resumed = _probe(Path(folder), "resumed", setting, count_)
    text = f"ZeRO-2 on {count_} processes: losses {whole}, resumed {resumed}"
    if not all(loss == loss for loss in whole) or whole[-1] >= whole[0]:
        return Finding("error", f"{text}: the loss does not fall", "try precision=fp32, and report this")
    if max(abs(a - b) for a, b in zip(whole[-len(resumed) :], resumed, strict=True)) > 1e-3 * abs(whole[0]):
        return Finding(
            "error", f"{text}: resuming changes the run", "do not rely on checkpoints; report this"
        )
    return Finding("ok", text)


def _probe(folder: Path, mode: str, setting: Setting, num_processes: int) -> list[float]:
    """Run `vlgpt.doctor.sample` in every process; the losses of rank 0. Raises RuntimeError with its last line."""
    port = str(free_port())
    shape = {"device": setting.device, "width": 64, "depth": 2, "mlp": 128, "num_heads": 4, "vocabulary": 320}
    shape |= {"attention": setting.attention, "rows": 2, "length": 96, "num_visual": 4}
    if setting.device == "cuda":  # head width 32 and more, as flash-attn wants it
        shape |= {"width": 256, "mlp": 512}
    command = [sys.executable, "-m", "vlgpt.doctor.sample", str(folder), mode, json.dumps(shape)]
    processes = []
    for rank in range(num_processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        place |= {"LOCAL_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = (folder / f"{mode}-{rank}.log").open("w")
        processes.append(subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log))
    try:
        failure = _first_failure(processes, timeout_s=TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failure is not None:
        rank, how = failure
        lines = (folder / f"{mode}-{rank}.log").read_text().strip().splitlines()
        raise RuntimeError(f"rank {rank} {how}: {lines[-1] if lines else 'no output'}")
    return json.loads((folder / f"{mode}.json").read_text())


def _first_failure(processes: list[subprocess.Popen[bytes]], *, timeout_s: float) -> tuple[int, str] | None:
    """The rank that failed, or was still at work when time was up, and how; None when all ended well. The others are
    not waited for: they may wait for the failed one.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None:
            return failed, f"ended with {codes[failed]}"
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            return codes.index(None), f"did not end in {timeout_s:.0f} s"
        time.sleep(0.2)


def _cuda_peak(step: Callable[[], None]) -> int:
    """Bytes that a step allocates above what stood there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def check_memory(
    setting: Setting, *, measure: Callable[[Callable[[], None]], int] = _cuda_peak, tolerance: float = 0.3
) -> Finding:
    """Peak of one forward and backward pass against the plan."""
    stage, batch = new_stage(setting).train(), new_batch(setting)
    costs, work = plan_of(setting)
    number_bytes = setting.dtype.itemsize
    logits = logits_bytes(work.num_text_targets, vocabulary=setting.vocabulary, number_bytes=number_bytes)
    planned = costs.of(work).saved + logits

    def step() -> None:
        terms = stage(batch)
        (terms["text"].total + terms["visual"].total).backward()

    measured = measure(step)
    ratio = measured / planned
    text = f"memory of a step: {measured / 1e9:.3f} GB measured, {planned / 1e9:.3f} GB planned"
    if abs(ratio - 1) > tolerance:
        return Finding("warning", text, "leave more room than `vlgpt plan` says, and report this")
    return Finding("ok", text)


def check_speed(setting: Setting, *, num_steps: int = 5, peak_tflops: float | None = None) -> Finding:
    """Model FLOPs utilisation of stage-2 forward and backward passes, without the optimizer."""
    stage, batch = new_stage(setting).train(), new_batch(setting)
    peak = peak_flops(peak_tflops)
    costs, work = plan_of(setting)
    flops = costs.of(work).model
    start = 0.0
    for step in range(num_steps + 1):
        if step == 1:  # the first step warms up
            _synchronise(setting)
            start = time.perf_counter()
        terms = stage(batch)
        (terms["text"].total + terms["visual"].total).backward()
        stage.zero_grad()
    _synchronise(setting)
    seconds = (time.perf_counter() - start) / num_steps
    rate = flops / seconds
    text = f"stage 2, {setting.rows} rows: {seconds:.3f} s a step, {rate / 1e12:.3f} TFLOP/s"
    if peak is None:
        return Finding("ok", f"{text} (the peak of this device is unknown)")
    fix = (
        "look for another process on the GPU, a power limit, or missing flash-attn"
        if rate < 0.25 * peak
        else ""
    )
    return Finding("warning" if fix else "ok", f"{text}, MFU {rate / peak:.0%}", fix)


def _synchronise(setting: Setting) -> None:
    if setting.device == "cuda":
        torch.cuda.synchronize()


def check_decoder(setting: Setting, *, tolerance: float = 1e-3) -> Finding:
    """Four images of one batch equal four single ones: denoising by a random U-Net with image attention."""
    from vlgpt.models.denoise import Conditions, denoise
    from vlgpt.models.diffusion import new_unet, zero_snr_ddim

    seeds.seed_everything(0, "doctor")
    unet = new_unet(config=UNET, num_image_tokens=4).to(setting.device).eval()
    generator = seeds.torch_generator(0, "doctor", "conditions")
    image, text = (torch.randn(4, 4, 32, generator=generator).to(setting.device) for _ in range(2))

    def draw(which: list[int]) -> torch.Tensor:
        positive = Conditions(text[which], image[which])
        with torch.no_grad():
            return denoise(
                unet,
                zero_snr_ddim(),
                positive=positive,
                negative=Conditions(torch.zeros_like(positive.text), torch.zeros_like(positive.image)),
                guidance=2.0,
                image_scale=1.0,
                num_steps=4,
                generators=[seeds.torch_generator(0, "doctor", n) for n in which],
            )

    together = draw([0, 1, 2, 3])
    alone = torch.cat([draw([n]) for n in range(4)])
    difference = float((together - alone).abs().max())
    words = f"decoder, batch of 4 against 4 singles: {difference:.1e}"
    if difference > tolerance:
        return Finding("error", words, "draw with batch size 1, and report this")
    return Finding("ok", words)
