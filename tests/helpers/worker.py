"""One process of a training test: `worker.py TASK FOLDER OPTIONS`; RANK and WORLD_SIZE come from the environment."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

torch.set_num_threads(1)

from safetensors.torch import save_file  # noqa: E402

from tests.helpers.batches import pack, random_document  # noqa: E402
from tests.helpers.runs import run_settings  # noqa: E402
from tests.helpers.tiny_unified import (  # noqa: E402
    NUM_PATCHES,
    PATCH_WIDTH,
    new_document_tokenizer,
    new_model,
)
from vlgpt import commits, seeds  # noqa: E402
from vlgpt.batch import ConditionBatch  # noqa: E402
from vlgpt.settings import LoraSettings  # noqa: E402
from vlgpt.stages.language import LanguageStage  # noqa: E402
from vlgpt.stages.tokenizer import ImageTokenizerStage  # noqa: E402
from vlgpt.train import checkpoint  # noqa: E402
from vlgpt.train.ds_config import merge_config  # noqa: E402
from vlgpt.train.engine import Engine, start_process_group, stop_process_group  # noqa: E402
from vlgpt.train.loop import Run, RunState, TrainingStopped, after_skip, save, train_step  # noqa: E402

TOKENIZER = new_document_tokenizer()
LENGTH = 96


def settings_of(folder, *, steps, global_batch, micro_batch, eps=1e-6, clipping=1.0, **more):
    optimizer = {"lr": 1e-2, "warmup_steps": 0, "eps": eps, "gradient_clipping": clipping}
    data = {"sources": [{"name": "a", "path": "b"}, {"name": "c", "path": "d"}]}
    sizes = {"steps": steps, "global_batch": global_batch, "micro_batch": micro_batch}
    return run_settings(output_dir=str(folder), **{"data": data, "optimizer": optimizer, **sizes, **more})


def new_stage(kind, *, drop=0.0):
    """A stage of each sort: the whole LM, LoRA on it (for pages or chats), or the image tokenizer."""
    if kind == "tokenizer":
        model = new_model(TOKENIZER)
        stage = ImageTokenizerStage(
            tokenizer=model.image_tokenizer, detokenizer=model.image_detokenizer, num_sources=2
        )
        return stage.requires_grad_(True)
    model = new_model(TOKENIZER)
    if kind in ("lora", "chat"):
        lora = LoraSettings(rank=4, alpha=4.0, dropout=0.0)
        model.lm.add_lora(lora, [TOKENIZER.begin_image_id, TOKENIZER.end_image_id])
    return LanguageStage(model=model, num_sources=2, visual_input_drop=drop)


def engine_of(settings, world_size, *, drop=0.0, zero=2, kind="full", **more):
    stage = new_stage(kind, drop=drop)
    buckets = {"reduce_bucket_size": 1_000_000}
    if zero == 3:
        buckets |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 100}
    config = {"zero_optimization": {"stage": zero, **buckets, **more}, "zero_force_ds_cpu_optimizer": False}
    return Engine(stage, settings, merge_config(settings, config, world_size=world_size, source="test"))


def rows_of(step, count, *, is_chat=False):
    """Rows with very uneven targets: none to two images, one or two documents; rows 1 and 3 are text only."""
    rows = []
    for row in range(count):
        is_text = row in (1, 3)
        documents = [
            random_document(
                100 * step + 10 * row + k, num_images=0 if is_text else (row + k) % 3, is_chat=is_chat
            )
            for k in range(1 + row % 2)
        ]
        rows.append(documents)
    return rows


class Loader:
    """Counts the steps that were consumed; its position is all that a commit has to remember."""

    source_names = ("a", "c")

    def __init__(self):
        self.position = 0

    def advance(self, count):
        self.position += count

    def state_dict(self):
        return {"position": self.position}

    def statistics(self):
        return {}


def layouts(folder, rank, world_size, options):
    """The same eight rows divided in every way; gradients of the first step and weights after the third."""
    for accumulation, micro in ((8, 1), (2, 4)) if world_size == 1 else ((4, 1), (2, 2)):
        # eps 1 makes AdamW's update proportional to the gradient, so rounding noise is not blown up to full steps
        settings = settings_of(folder, steps=3, global_batch=8, micro_batch=micro, eps=1.0, clipping=1e9)
        engine = engine_of(settings, world_size)
        name, gradients = f"{world_size}x{accumulation}x{micro}", keep_gradients(engine)
        for step in range(1, 4):
            rows = rows_of(step, 8)[rank::world_size]
            batches = [
                pack(rows[k * micro : (k + 1) * micro], TOKENIZER, length=LENGTH) for k in range(accumulation)
            ]
            train_step(engine, batches, 1.0)
        write(gradients, folder / f"gradient_{name}.safetensors", rank)
        write(engine.trainable_state(), folder / f"weights_{name}.safetensors", rank)
    return {}


LAYERS_OF_DEEPSPEED = {
    "bf16 zero 1": ("bf16", {"zero": 1}),
    "bf16 zero 2": ("bf16", {"zero": 2}),
    "bf16 zero 3": ("bf16", {"zero": 3}),
    "bf16 offload": (
        "bf16",
        {"zero": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
    ),
}


def accumulated(folder, rank, world_size, options):
    """One step on the same eight rows, in 8 / world_size micro-batches and in one, under deepspeed's optimizers."""
    for name, (precision, zero) in LAYERS_OF_DEEPSPEED.items():
        for micro in (1, 8 // world_size):
            settings = settings_of(
                folder, steps=1, global_batch=8, micro_batch=micro, eps=1.0, clipping=1e9, precision=precision
            )
            engine = engine_of(settings, world_size, **zero)
            before = engine.trainable_state()
            rows = rows_of(1, 8)[rank::world_size]
            batches = [
                pack(rows[k : k + micro], TOKENIZER, length=LENGTH) for k in range(0, len(rows), micro)
            ]
            train_step(engine, batches, 1.0)
            assert world_size * sum(part.numel() for part in engine.masters()) >= engine.num_trainable
            after = engine.trainable_state()
            updates = {key: after[key] - before[key] for key in after}
            write(updates, folder / f"{name}, {'one' if micro > 1 else 'many'}.safetensors", rank)
    return {}


def keep_gradients(engine):
    """A dictionary that gets the gradients of the next step, just before the optimizer sees them."""
    from deepspeed.utils import safe_get_full_grad

    kept, end = {}, engine.end_micro_batch

    def watched():
        if not kept and engine._engine.is_gradient_accumulation_boundary():
            kept.update({name: safe_get_full_grad(p).float().clone() for name, p in engine.stage.trainable()})
        end()

    engine.end_micro_batch = watched
    return kept


def write(tensors, path, rank):
    if rank == 0:
        save_file(tensors, path)


def batches_of(step, kind, rank, world_size):
    """This rank's micro-batches of a step: four rows (or samples) in all, whatever the number of ranks."""
    if kind == "tokenizer":
        samples = [condition_sample(step, k) for k in range(rank, 4, world_size)]
        return [conditions([sample]) for sample in samples]
    rows = rows_of(step, 4, is_chat=kind == "chat")
    return [pack([row], TOKENIZER, length=LENGTH) for row in rows[rank::world_size]]


def condition_sample(step, number):
    generator = torch.Generator().manual_seed(1000 * step + number)
    return [
        torch.randn(shape, generator=generator) for shape in ((NUM_PATCHES, PATCH_WIDTH), (3, 16), (5, 12))
    ]


def conditions(samples):
    patches, image, text = (torch.stack(values) for values in zip(*samples))
    ones = torch.ones(len(samples), dtype=torch.bool)
    return ConditionBatch(
        documents=tuple(str(float(p.sum())) for p in patches),
        source_ids=torch.zeros(len(samples), dtype=torch.int16),
        is_valid=ones,
        has_text=ones,
        patches=patches,
        image_condition=image,
        text_condition=text,
    )


def train(folder, rank, world_size, options):
    """Train from the newest commit to `stop_after`, then commit; everything that a comparison needs is returned."""
    kind, zero = options.get("kind", "full"), options.get("zero", 2)
    settings = settings_of(folder, steps=options["steps"], global_batch=4, micro_batch=1)
    frozen = new_stage(kind).frozen_hashes()
    engine = engine_of(settings, world_size, drop=options.get("drop", 0.0), zero=zero, kind=kind)
    loader, state = Loader(), RunState()
    facts = {"frozen": frozen}
    resumed = checkpoint.resume(engine, folder / "checkpoints", facts=facts)
    if resumed:
        state.step = resumed.step
        loader.position = resumed.data["position"]
    else:
        seeds.seed_everything(0, "training", rank)
    run = Run(settings=settings, engine=engine, loader=loader, facts=facts)
    engine.train()
    losses, documents = [], []
    for step in range(state.step + 1, options.get("stop_after", options["steps"]) + 1):
        batches = batches_of(loader.position, kind, rank, world_size)
        _, sums = train_step(engine, batches, 1e-2)
        loader.advance(1)
        state.step = step
        totals = torch.stack([value.sum(1) for _, value in sorted(sums.items())])
        losses.append(engine.all_sum(totals.double())[:, 0].tolist())
        documents.append(sorted(str(d) for batch in batches for d in batch.documents))
        if step in options.get("commits", ()):
            save(run, state)
        if step == options.get("die_after") and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    committed = save(run, state)
    weights = engine.trainable_state()
    if rank == 0:
        save_file(weights, folder / f"final_{options.get('stop_after', options['steps'])}.safetensors")
    return {
        "losses": losses,
        "documents": documents,
        "resumed_at": resumed.step if resumed else 0,
        "is_elastic": bool(resumed and resumed.is_elastic),
        "frozen_before": frozen,
        "frozen_after": frozen if zero == 3 else engine.stage.frozen_hashes(),
        "num_bytes": commits.size_of(committed) if committed else 0,
        "num_trainable": engine.num_trainable,
    }


def modalities(folder, rank, world_size, options):
    """One rank has text only, the other pictures only, then one of them nothing at all; under ZeRO 1, 2 and 3."""
    losses = {}
    for zero in (1, 2, 3):
        settings = settings_of(folder, steps=3, global_batch=2, micro_batch=1)
        engine = engine_of(settings, world_size, zero=zero, kind=options["kind"])
        losses[zero] = []
        for step in range(1, 4):
            batch = one_sided(step, rank)
            _, sums = train_step(engine, [batch], 1e-2)
            totals = torch.stack([value.sum(1) for _, value in sorted(sums.items())])
            losses[zero].append(engine.all_sum(totals.double())[:, 0].tolist())
    return {"losses": losses}


def one_sided(step, rank):
    """Rank 0: text without pictures. Rank 1: pictures without text targets; in step 3 a row without targets."""
    document = random_document(step, num_images=0 if rank == 0 else 2)
    batch = pack([[document]], TOKENIZER, length=LENGTH)
    if rank == 0:
        return batch
    is_target = batch.is_target & batch.is_visual if step < 3 else torch.zeros_like(batch.is_target)
    return replace(batch, is_target=is_target)


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
    run = Run(settings=settings, engine=engine, loader=Loader(), facts={})
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


def several(folder, rank, world_size, options):
    """Runs of `train` one after the other in one process: {folder: its options} -> {folder: its result}."""
    results = {}
    for name, own in options["runs"].items():
        (folder / name).mkdir(exist_ok=True)
        results[name] = train(folder / name, rank, world_size, own)
    return results


TASKS = (layouts, accumulated, train, several, modalities, poison, poisoned_for_good)


def main():
    """Run the tasks (names with commas between) one after the other; the last one's exit code is the process's."""
    from tests.helpers import loop_tasks

    names, folder, options = sys.argv[1].split(","), Path(sys.argv[2]), json.loads(sys.argv[3])
    start_process_group(timeout_s=300)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tasks = {f.__name__: f for f in (*TASKS, *loop_tasks.TASKS)}
    results = {}
    for name in names:
        place = folder / name if len(names) > 1 else folder
        place.mkdir(exist_ok=True)
        started_s = time.monotonic()
        results[name] = tasks[name](place, rank, world_size, options)
        print(f"{name}: {time.monotonic() - started_s:.1f} s", flush=True)
    result = results if len(names) > 1 else results[names[0]]
    (folder / f"result_{rank}.json").write_text(json.dumps(result))
    stop_process_group()
    sys.exit(results[names[-1]].get("exit_code", 0))


if __name__ == "__main__":
    main()
