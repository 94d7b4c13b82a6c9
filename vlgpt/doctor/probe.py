"""One process of `check_training`: `python -m vlgpt.doctor.probe FOLDER whole|resumed SHAPE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vlgpt.config import validate
from vlgpt.doctor.sample import Setting, new_batch, new_stage
from vlgpt.settings import RunSettings
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group

NUM_STEPS, RESUME_AT = 6, 4


def main(folder: Path, mode: str, shape: dict[str, object]) -> None:
    """`whole` trains six steps and saves after four; `resumed` loads that and trains the last two."""
    start_process_group(timeout_s=120.0)
    world_size = torch.distributed.get_world_size()
    setting = Setting(**{**shape, "dtype": torch.float32})  # type: ignore[arg-type]
    if setting.device == "cpu":  # several processes with a thread per core each get in each other's way
        torch.set_num_threads(1)
    values = {
        "name": "doctor",
        "output_dir": str(folder),
        "stage": {"kind": "language", "language_model": "random"},
        "data": {"sources": [{"name": "random", "path": "none"}]},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
        "steps": NUM_STEPS,
        "global_batch": setting.rows * world_size,
        "micro_batch": setting.rows,
        "precision": "bf16",
    }
    settings = validate(RunSettings, values, where="doctor")
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}}
    merged = merge_config(settings, zero, world_size=world_size, source="doctor")
    engine = Engine(new_stage(setting), settings, merged)
    engine.train()
    if mode == "resumed":
        engine.load(folder / "checkpoint", "four")
    losses = []
    for step in range(RESUME_AT if mode == "resumed" else 0, NUM_STEPS):
        batch = engine.place(new_batch(setting, seed=engine.rank))
        terms = engine.forward(batch)
        loss = terms["text"].total + terms["visual"].total
        losses.append(round(float(engine.all_sum(loss.detach().float())), 4))
        engine.backward(loss / float(batch.is_target.sum()))
        engine.end_micro_batch()
        if mode == "whole" and step + 1 == RESUME_AT:
            engine.save(folder / "checkpoint", "four")
    if engine.rank == 0:
        (folder / f"{mode}.json").write_text(json.dumps(losses))
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
