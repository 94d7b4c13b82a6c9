"""Model FLOPs utilisation of a stage-2 step on this CPU: `python benchmarks/mfu.py [--trained lora|all]`.

Four numbers side by side, all in one process: the fastest matrix product that torch reaches here (GEMM peak), a
hand-written loop over transformers' LlamaForCausalLM on plain text, our bare stage (forward, backward, AdamW), and the
same stage through the DeepSpeed engine (ZeRO-2, clipping, fp32 masters). The three loops take turns step by step, so
that a busy machine slows all of them alike; the median step counts.

Counted are operations that the model needs: products of linear layers (two for a frozen weight that gradients pass
through, three for a trained one), the LM head at its targets only, attention inside documents and causally (half).
Whatever else a loop computes is waste and lowers its number. Last comes where the rest of the time goes.

Seen on 2 cores of an AMD EPYC (AVX-512, bf16), torch 2.15, `--rows 1`, LoRA (the paper's stage 2):
fp32  peak 199 GFLOP/s, loop 64.6 % of it, bare stage 67.7 % (1.05 x), through DeepSpeed 63.1 % (0.98 x)
bf16  peak 435 GFLOP/s, loop 57.0 % of it, bare stage 58.5 % (1.03 x), through DeepSpeed 55.0 % (0.96 x)
With all 168 M parameters trained, two rows, in two runs: bare 1.00 to 1.36 x; through DeepSpeed 0.60 and 0.74 x (fp32),
0.76 and 0.49 x (bf16): its gradient buckets, norms and fp32 masters cost a fixed time, and here a step has 1,024 tokens
only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlgpt import seeds
from vlgpt.batch import Batch
from vlgpt.config import validate
from vlgpt.doctor.sample import Setting, new_batch, new_stage, plan_of
from vlgpt.models.language_models import build_language_model
from vlgpt.planning.costs import Work
from vlgpt.planning.flops import squared_lengths
from vlgpt.settings import RunSettings
from vlgpt.stages.language import LanguageStage
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK = 32


@dataclass(frozen=True)
class Loop:
    """One training loop: what it computes per step, and its step."""

    name: str
    flops: float
    tokens: int
    step: Callable[[], float]


def gemm_peak(dtype: torch.dtype, *, tokens: int, width: int, repeats: int = 6) -> float:
    """FLOPs per second of the fastest product among those of the model and some square ones."""
    best = 0.0
    shapes = [(tokens, width, 4 * width), (tokens, 4 * width, width), (tokens, width, width)]
    for m, k, n in [*shapes, (2048, 2048, 2048), (4096, 1024, 4096)]:
        a, b = (
            torch.randn(m, k).to(dtype),
            torch.randn(n, k).to(dtype),
        )  # weights lie as linear layers hold them
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * m * k * n / min(times))
    return best


def needed_flops(setting: Setting, work: Work, segments: torch.Tensor, *, trained: str) -> float:
    """What a step needs: the operations of the plan, with attention inside the documents of this batch."""
    costs, _ = plan_of(setting, trained=trained)
    whole = work.rows * setting.length**2
    per_square = 3 * 2 * setting.depth * setting.width
    return costs.of(work).model + per_square * (squared_lengths(segments) - whole)


def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters."""
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)


def hand_written(setting: Setting, dtype: torch.dtype, trained: str, accumulation: int = 1) -> Loop:
    """What anyone would write: labels in, loss out; LoRA through peft on the same layers."""
    seeds.seed_everything(0, "mfu")
    model: Any = build_language_model(dict(setting.config), "sdpa")
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model = model.to(dtype).train()
    optimizer = adamw(model)
    ids = torch.randint(0, setting.vocabulary - 2, (setting.rows, setting.length))

    def step() -> float:
        for _ in range(accumulation):
            loss = model(input_ids=ids, labels=ids).loss / accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    work = Work(setting.rows, 0, setting.rows * (setting.length - 1), 0, has_tokenizing=False)
    flops = needed_flops(setting, work, torch.ones_like(ids), trained=trained)
    name = "hand-written LlamaForCausalLM loop"
    return Loop(name, flops * accumulation, ids.numel() * accumulation, step)


def our_stage(setting: Setting, trained: str) -> tuple[LanguageStage, Batch, float]:
    """Our stage with random weights, a batch for it, and the FLOPs that one step needs."""
    stage = new_stage(setting, trained=trained).train()
    batch = new_batch(setting)
    _, work = plan_of(setting)
    return stage, batch, needed_flops(setting, work, batch.segment_ids, trained=trained)


def bare(setting: Setting, dtype: torch.dtype, trained: str, accumulation: int = 1) -> Loop:
    """Our stage in a plain PyTorch loop, without DeepSpeed."""
    stage, batch, flops = our_stage(replace(setting, dtype=dtype), trained)
    optimizer = adamw(stage)
    counts = stage.count_targets(batch)

    def step() -> float:
        for _ in range(accumulation):
            terms = stage(batch)
            loss = sum(terms[name].total / counts[name] for name in stage.terms) / accumulation
            assert isinstance(loss, torch.Tensor)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return Loop("vlgpt stage, bare", flops * accumulation, batch.token_ids.numel() * accumulation, step)


def through_engine(setting: Setting, precision: str, trained: str, accumulation: int = 1) -> Loop:
    """Our stage in the training engine (DeepSpeed ZeRO-2), as `vlgpt train` runs it."""
    stage, batch, flops = our_stage(replace(setting, dtype=torch.float32), trained)
    values = {
        "name": "mfu",
        "output_dir": "none",
        "stage": {"kind": "language", "language_model": "random"},
        "data": {"sources": [{"name": "random", "path": "none"}]},
        "steps": 1,
        "global_batch": setting.rows * accumulation,
        "micro_batch": setting.rows,
        "precision": precision,
    }
    settings = validate(RunSettings, values, where="benchmark")
    zero = {"zero_optimization": {"stage": 2}}
    engine = Engine(stage, settings, merge_config(settings, zero, world_size=1, source="benchmark"))
    engine.train()
    counts = stage.count_targets(batch)

    def step() -> float:
        for _ in range(accumulation):
            terms = engine.forward(engine.place(batch))
            loss = sum(terms[name].total / counts[name] for name in stage.terms)
            assert isinstance(loss, torch.Tensor)
            engine.backward(loss)
            engine.end_micro_batch()
        return float(loss.detach())

    tokens = batch.token_ids.numel()
    return Loop("vlgpt stage through DeepSpeed", flops * accumulation, tokens * accumulation, step)


KINDS = (
    ("matrix products", ("mm", "addmm", "bmm", "linear", "matmul")),
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("loss and softmax", ("log_softmax", "nll_loss", "cross_entropy")),
    ("optimizer", ("adam", "foreach", "addcdiv", "addcmul", "lerp")),
    (
        "copies and casts",
        ("copy_", "_to_copy", "clone", "contiguous", "cat", "index", "gather", "scatter", "fill"),
    ),
)


def where_time_goes(step: Callable[[], float]) -> dict[str, float]:
    """Shares of one step's CPU time by kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    shares: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::").lower()
        kind = next(
            (kind for kind, words in KINDS if any(word in name for word in words)), "norms, activations, sums"
        )
        shares[kind] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


def measure(precision: str, arguments: argparse.Namespace) -> None:
    """Print FLOP/s of every loop in one precision, beside the peak of a matrix product; their steps alternate."""
    dtype = DTYPES[precision]
    setting = Setting(
        device="cpu", dtype=dtype, attention="sdpa", width=arguments.width, depth=arguments.depth,
        mlp=arguments.mlp, num_heads=arguments.width // 64, vocabulary=arguments.vocabulary,
        length=512, rows=arguments.rows,
    )  # fmt: skip
    how = (arguments.trained, arguments.accumulation)
    loops = [
        hand_written(setting, dtype, *how),
        bare(setting, dtype, *how),
        through_engine(setting, precision, *how),
    ]
    tokens = setting.rows * setting.length
    peak = gemm_peak(dtype, tokens=tokens, width=setting.width)
    times: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for number in range(arguments.steps + 1):
        for loop in loops:
            start = time.perf_counter()
            loop.step()
            if number:  # the first step warms up
                times[loop.name].append(time.perf_counter() - start)
    peak = max(peak, gemm_peak(dtype, tokens=tokens, width=setting.width))
    print(f"\n{precision}: hidden {setting.width}, {setting.depth} layers, {setting.rows} rows of 512 x "
          f"{arguments.accumulation}, trained: {arguments.trained}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':36}{'s/step':>8}{'tokens/s':>10}{'GFLOP/s':>9}{'MFU':>7}{'x loop':>8}")
    print(f"{'fastest matrix product (GEMM peak)':36}{'':>8}{'':>10}{peak / 1e9:>9.0f}{1:>7.1%}")
    reference = 0.0
    for loop in loops:
        seconds = statistics.median(times[loop.name])
        rate = loop.flops / seconds
        reference = reference or rate
        print(f"{loop.name:36}{seconds:>8.2f}{loop.tokens / seconds:>10.0f}{rate / 1e9:>9.0f}"
              f"{rate / peak:>7.1%}{rate / reference:>8.2f}")  # fmt: skip
    for loop in loops:
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in where_time_goes(loop.step).items())
        print(f"time of the {loop.name}: {shares}")


def main() -> None:
    """Command line: measures every precision in a process group of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--trained", choices=("lora", "all"), default="lora")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start_process_group(timeout_s=60.0)
    for precision in arguments.precision:
        measure(precision, arguments)
    stop_process_group()


if __name__ == "__main__":
    main()
