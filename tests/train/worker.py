"""One process of a training test: `worker.py TASK FOLDER OPTIONS`; RANK and WORLD_SIZE come from the environment."""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from batches import pack, random_document  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_unified import new_document_tokenizer, new_model  # noqa: E402

from vlgpt import seeds  # noqa: E402
from vlgpt.config import parse_yaml, validate  # noqa: E402
from vlgpt.settings import RunSettings  # noqa: E402
from vlgpt.stages.language import LanguageStage  # noqa: E402
from vlgpt.train import checkpoint  # noqa: E402
from vlgpt.train.engine import Engine, merge_config, start_process_group, stop_process_group  # noqa: E402
from vlgpt.train.loop import Run, RunState, TrainingStopped, after_skip, save, train_step  # noqa: E402

TOKENIZER = new_document_tokenizer()
LENGTH = 96


def settings_of(folder, *, steps, global_batch, micro_batch, eps=1e-6):
    values = {
        "name": "test",
        "output_dir": str(folder),
        "stage": {"kind": "language", "language_model": "tiny"},
        "data": {"sources": [{"name": "a", "path": "b"}, {"name": "c", "path": "d"}]},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0, "eps": eps},
        "steps": steps,
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "precision": "fp32",
    }
    return validate(RunSettings, parse_yaml(json.dumps(values)), where="test")


def engine_of(settings, world_size, *, drop=0.0):
    stage = LanguageStage(model=new_model(TOKENIZER), num_sources=2, visual_input_drop=drop)
    zero = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
    }
    return Engine(stage, settings, merge_config(settings, zero, world_size=world_size, source="test"))


def rows_of(step, count):
    """Rows with very uneven targets: none, one or two images, one text-only row, one long and one short."""
    rows = []
    for row in range(count):
        documents = [
            random_document(100 * step + 10 * row + k, num_images=(row + k) % 3) for k in range(1 + row % 2)
        ]
        rows.append(documents if row != 1 else [random_document(7, num_images=0)])
    return rows


class Loader:
    """Deterministic batches by step, with the loader's interface."""

    source_names = ("a", "c")

    def __init__(self, micro_batch, accumulation):
        self.position = 0
        self.micro_batch, self.accumulation = micro_batch, accumulation

    def __iter__(self):
        at = self.position
        while True:
            yield pack(rows_of(at, self.micro_batch), TOKENIZER, length=LENGTH)
            at += 1

    def advance(self, count):
        self.position += count

    def state_dict(self):
        return {"position": self.position}

    def statistics(self):
        return {}


def layouts(folder, rank, world_size, options):
    for accumulation, micro in ((8, 1), (2, 4)) if world_size == 1 else ((2, 2),):
        # eps 1 makes AdamW's update proportional to the gradient, so rounding noise is not blown up to full steps
        settings = settings_of(folder, steps=3, global_batch=8, micro_batch=micro, eps=1.0)
        engine = engine_of(settings, world_size)
        for step in range(1, 4):
            rows = rows_of(step, 8)[rank::world_size]
            batches = [
                pack(rows[k * micro : (k + 1) * micro], TOKENIZER, length=LENGTH) for k in range(accumulation)
            ]
            train_step(engine, batches, 1.0)
        weights = engine.trainable_state()
        if rank == 0:
            save_file(weights, folder / f"{world_size}x{accumulation}x{micro}.safetensors")
    return {}


def train(folder, rank, world_size, options):
    settings = settings_of(folder, steps=options["steps"], global_batch=4 * world_size, micro_batch=2)
    engine = engine_of(settings, world_size, drop=0.3)
    loader, state = Loader(2, 2), RunState()
    facts = {"frozen": engine.stage.frozen_hashes()}
    resumed = checkpoint.resume(engine, folder / "checkpoints", facts=facts)
    if resumed:
        state.step = resumed.step
        loader.position = resumed.data["position"]
    else:
        seeds.seed_everything(0, "training", rank)
    run = Run(settings=settings, engine=engine, loader=loader, log=None, facts=facts)
    engine.train()
    losses, batches = [], iter(loader)
    for step in range(state.step + 1, options.get("stop_after", options["steps"]) + 1):
        _, sums = train_step(engine, [next(batches), next(batches)], 1e-2)
        loader.advance(2)
        state.step = step
        losses.append([float(value[0].sum()) for value in sums.values()])
    save(run, state)
    if rank == 0:
        save_file(engine.trainable_state(), folder / "final.safetensors")
    return {
        "losses": losses,
        "resumed_at": resumed.step if resumed else 0,
        "frozen_before": facts["frozen"],
        "frozen_after": engine.stage.frozen_hashes(),
    }


def poison_gradient(engine, rank, is_on):
    """From now on, rank 1's backward passes give NaN (or no longer)."""
    engine.stage.model.lm.lm_head.register_forward_hook(
        lambda module, inputs, output: output * float("nan") if is_on() and rank == 1 else output
    )


def poison(folder, rank, world_size, options):
    settings = settings_of(folder, steps=5, global_batch=2, micro_batch=1)
    engine = engine_of(settings, world_size)
    now = {"step": 0}
    poison_gradient(engine, rank, lambda: now["step"] == 3)
    skipped, states = [], []
    for step in range(1, 6):
        now["step"] = step
        result, _ = train_step(engine, [pack(rows_of(step, 2)[:1], TOKENIZER, length=LENGTH)], 1e-2)
        skipped += [step] if result.is_skipped else []
        states.append(engine.trainable_state())

    def equal(first, second):
        return all(torch.equal(states[first][name], states[second][name]) for name in states[first])

    return {"skipped_at": skipped, "unchanged": equal(1, 2), "moved_on": not equal(2, 3)}


def poisoned_for_good(folder, rank, world_size, options):
    settings = settings_of(folder, steps=9, global_batch=2, micro_batch=1)
    engine = engine_of(settings, world_size)
    poison_gradient(engine, rank, lambda: True)
    run = Run(settings=settings, engine=engine, loader=Loader(1, 1), log=None, facts={})
    state = RunState()
    try:
        for step in range(1, 10):
            batches = [pack(rows_of(step, 2)[:1], TOKENIZER, length=LENGTH)]
            result, _ = train_step(engine, batches, 1e-2)
            state.step = step
            after_skip(run, state, result, batches)
    except TrainingStopped as stopped:
        return {"exit_code": stopped.exit_code, "step": state.step}
    return {"exit_code": 0, "step": state.step}


def main():
    task, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    start_process_group(timeout_s=60)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tasks = {f.__name__: f for f in (layouts, train, poison, poisoned_for_good)}
    result = tasks[task](folder, rank, world_size, options)
    (folder / f"result_{rank}.json").write_text(json.dumps(result))
    stop_process_group()


if __name__ == "__main__":
    main()
