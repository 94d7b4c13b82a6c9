"""Commits beside DeepSpeed's own save of the same model, in one run: seconds, bytes, and what a resume costs.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--width 512] [--depth 8] [--repeats 3]

A random LLaMA with its frozen image tokenizer, once wholly trained and once under LoRA, one process, ZeRO-2. The saves
take turns and the best of `--repeats` counts. `bound` is (p + 16) bytes per trained parameter, p being the bytes of the
training precision: nothing that can be resumed exactly is smaller than fp32 masters, two moments, the weights in
training precision and the fp32 weights file. Then: the time to the first batch after a resume, by position.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.generation import build
from vlgpt import commits, log
from vlgpt.batch import Batch
from vlgpt.config import validate
from vlgpt.data.loader import Loader
from vlgpt.data.mixture import SLOTS
from vlgpt.data.state import LoaderState
from vlgpt.data.stream import Position
from vlgpt.document import Document, TextPart
from vlgpt.settings import DataSettings, LoraSettings, RunSettings
from vlgpt.shards import ShardWriter, write_manifest
from vlgpt.stages.language import LanguageStage
from vlgpt.tokens import DocumentTokenizer
from vlgpt.train import checkpoint
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group
from vlgpt.train.loop import train_step

ZERO = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
}


def new_engine(folder: Path, *, width: int, depth: int, is_lora: bool) -> tuple[Engine, dict[str, object]]:
    """A stage under DeepSpeed, after one step, so that the optimizer has its moments."""
    generator = build(width=width, depth=depth)
    model = generator.model.train()
    if is_lora:
        rows = [generator.tokenizer.begin_image_id, generator.tokenizer.end_image_id]
        model.lm.add_lora(LoraSettings(rank=32, alpha=32.0, dropout=0.0), rows)
    else:
        model.lm.requires_grad_(True)
    stage = LanguageStage(model=model)
    values = {
        "name": "benchmark",
        "output_dir": str(folder),
        "stage": {"kind": "language", "language_model": "tiny"},
        "data": {"sources": [{"name": "a", "path": "b"}]},
        "steps": 10,
        "global_batch": 1,
        "micro_batch": 1,
        "precision": "fp32",
    }
    settings = validate(RunSettings, values, where="benchmark")
    facts = {"frozen": stage.frozen_hashes()}
    engine = Engine(stage, settings, merge_config(settings, ZERO, world_size=1, source="benchmark"))
    train_step(engine, [text_batch()], 1e-4)
    return engine, facts


def text_batch(length: int = 32) -> Batch:
    """One row of text."""
    ids = torch.arange(5, 5 + length)[None]
    is_target = torch.ones(1, length, dtype=torch.bool)
    is_target[:, 0] = False
    return Batch(
        token_ids=ids,
        segment_ids=torch.ones(1, length, dtype=torch.int32),
        position_ids=torch.arange(length)[None],
        is_visual=torch.zeros(1, length, dtype=torch.bool),
        is_target=is_target,
        source_ids=torch.zeros(1, length, dtype=torch.int16),
        images=None,
        documents=(("text",),),
        num_visual=32,
    )


def seconds_of(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def timed(target: object, name: str, label: str, spent: dict[str, float]) -> Callable[[], None]:
    """Count the seconds inside `target.name`; returns what puts the original back."""
    original = getattr(target, name)

    def measured(*arguments: object, **options: object) -> object:
        started_s = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            spent[label] += time.perf_counter() - started_s

    setattr(target, name, measured)
    return lambda: setattr(target, name, original)


def commit_once(engine: Engine, facts: dict[str, object], root: Path) -> tuple[float, int, dict[str, float]]:
    """Seconds, bytes, and where the seconds went."""
    spent: dict[str, float] = defaultdict(float)
    undo = [
        timed(engine, "trainable_state", "gather", spent),
        timed(engine, "save", "deepspeed's files", spent),
        timed(checkpoint, "save_file", "fp32 weights", spent),
        timed(commits, "sha256_file", "sha256", spent),
        timed(commits.os, "fsync", "fsync", spent),
    ]
    folder: list[Path] = []

    def run() -> None:
        folder.append(checkpoint.save(engine, root, step=1, data={}, facts=facts, keep=2))

    seconds = seconds_of(run)
    for put_back in undo:
        put_back()
    return seconds, commits.size_of(folder[0]), spent


def deepspeed_once(engine: Engine, root: Path, *, is_whole: bool) -> tuple[float, int]:
    """DeepSpeed's save_checkpoint as its documentation calls it; `is_whole`: with frozen parameters, its default."""
    own = engine._engine
    seconds = seconds_of(
        lambda: own.save_checkpoint(str(root), tag="t", exclude_frozen_parameters=not is_whole)
    )
    return seconds, commits.size_of(root / "t")


def compare(*, width: int, depth: int, is_lora: bool, repeats: int) -> None:
    """One table."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        engine, facts = new_engine(root, width=width, depth=depth, is_lora=is_lora)
        rows: dict[str, tuple[float, int]] = {}
        parts: dict[str, float] = {}
        for _ in range(repeats):
            seconds, size, spent = commit_once(engine, facts, root / "ours")
            if seconds <= rows.get("commit (ours)", (1e9, 0))[0]:
                rows["commit (ours)"], parts = (seconds, size), spent
            for label, is_whole in (("deepspeed, default", True), ("deepspeed, trained only", False)):
                found = deepspeed_once(engine, root / label.replace(" ", "_"), is_whole=is_whole)
                rows[label] = min(rows.get(label, (1e9, 0)), found)
        bound = (4 + 16) * engine.num_trainable
        total = sum(parameter.numel() for parameter in engine.stage.parameters())
        kind = "LoRA" if is_lora else "all trained"
        print(f"\n{kind}: {engine.num_trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters trained")
        print(f"| {'save':24} | seconds | {'bytes':>13} | x bound |\n|---|---:|---:|---:|")
        for label, (seconds, size) in rows.items():
            print(f"| {label:24} | {seconds:7.2f} | {size:13,} | {size / bound:7.2f} |")
        print("where a commit's seconds go: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items()))
        resume_s = seconds_of(lambda: checkpoint.resume(engine, root / "ours", facts=facts))
        load_s = seconds_of(lambda: engine._engine.load_checkpoint(str(root / "deepspeed,_default"), tag="t"))
        print(
            f"resume: ours {resume_s:.2f} s (every byte verified), deepspeed {load_s:.2f} s (nothing verified)"
        )


def positions(tokenizer: DocumentTokenizer) -> None:
    """Time from a saved position to the first batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        num_shards, size = 8, 250
        for shard in range(num_shards):
            writer = ShardWriter(folder, shard, tokenizer=tokenizer)
            for number in range(size):
                text = " ".join(["red", "square"] * (1 + (7 * number) % 12))
                writer.add(Document(f"{shard}-{number}", "a", (TextPart(text),)), [])
            writer.close()
        write_manifest(folder, name="a", licence="none", versions={}, build={}, num_shards=num_shards)
        values = {"sources": [{"name": "a", "path": str(folder)}], "num_workers": 0, "sequence_length": 128}
        settings = validate(DataSettings, values, where="benchmark")
        print("\n| resume at sample | seconds to the first batch |\n|---:|---:|")
        for position in (0, 10**3, 10**5, 10**7, 10**9):
            loader = Loader(settings, kind="packed", micro_batch=4, tokenizer=tokenizer)
            loader.position = Position(position // SLOTS, 0)
            state = loader.state_dict()
            fresh = Loader(settings, kind="packed", micro_batch=4, tokenizer=tokenizer)

            def go(fresh: Loader = fresh, state: LoaderState = state) -> None:
                fresh.load_state_dict(state)
                next(iter(fresh))

            print(f"| {position:,} | {seconds_of(go):.3f} |")


def main() -> None:
    """Command line: prints one table with LoRA, one without, and then what a resume costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log.get_logger().setLevel("ERROR")
    start_process_group(timeout_s=60)
    for is_lora in (False, True):
        compare(width=arguments.width, depth=arguments.depth, is_lora=is_lora, repeats=arguments.repeats)
    positions(build(width=64, depth=1).tokenizer)
    stop_process_group()


if __name__ == "__main__":
    main()
