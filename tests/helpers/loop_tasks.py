"""More tasks of worker.py: the real loop under faults, the moving average, and real shards dealt unevenly."""

import json
import os
import resource
import signal
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.helpers.batches import pack
from tests.helpers.tiny_clip import save_fitting_clip
from tests.helpers.tiny_unified import CONDITION_SHAPES
from tests.helpers.worker import (
    LENGTH,
    TOKENIZER,
    condition_sample,
    conditions,
    engine_of,
    new_stage,
    rows_of,
    settings_of,
)
from vlgpt import commits, seeds
from vlgpt.batch import LossTerm
from vlgpt.config import parse_yaml, validate
from vlgpt.document import Document, TextPart
from vlgpt.log import MetricsLog, MetricsSink, read_metrics
from vlgpt.models.losses import count_targets
from vlgpt.settings import DataSettings
from vlgpt.stages.base import Stage
from vlgpt.train import checkpoint, faults
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine
from vlgpt.train.loop import Run, RunState, TrainingStopped, save, train, train_step
from vlgpt.train.observers import MovingAverage

ANSWERS = {"checkpoint": {"interval_steps": 3, "keep": 2, "on_disk_full": "stop"}, "log_interval_steps": 1}


class Stream:
    """An endless loader of packed rows, addressed by position; `on_batch(position)` may do harm first."""

    source_names = ("a", "c")

    def __init__(self, rank, world_size, on_batch=lambda position: None):
        self.rank, self.world_size, self.on_batch = rank, world_size, on_batch
        self.position, self.read = 0, []

    def __iter__(self):
        position = self.position
        while True:
            self.on_batch(position)
            self.read.append(position)
            yield self.batch(position)
            position += 1

    def batch(self, position):
        return pack(rows_of(position, self.world_size)[self.rank :][:1], TOKENIZER, length=LENGTH)

    def targets(self, num_batches):
        return [count_targets(self.batch(self.position + k)) for k in range(num_batches)]

    def advance(self, count):
        self.position += count

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def statistics(self):
        return {}


def new_run(folder, rank, world_size, loader, *, steps=8, **settings):
    """A run with the loop's own parts, and its fresh or resumed state."""
    values = {**ANSWERS, **settings}
    chosen = settings_of(folder, steps=steps, global_batch=world_size, micro_batch=1, **values)
    facts = {"frozen": new_stage("lora").frozen_hashes()}
    engine = engine_of(chosen, world_size, kind="lora")
    log = MetricsLog(folder, use_tensorboard=False) if rank == 0 else MetricsSink()
    return Run(settings=chosen, engine=engine, loader=loader, log=log, facts=facts), RunState()


def stopped_with(run, state):
    try:
        train(run, state)
    except TrainingStopped as stopped:
        return stopped.exit_code
    return 0


def events(folder, rank):
    if rank > 0:
        return []
    return [record for record in read_metrics(folder / "metrics.jsonl") if "event" in record]


def switches(folder, rank, world_size, options):
    """The kill switch and the supervisor's request: commit after the step, then their exit codes."""
    found = {}
    for name, make in (
        ("kill", lambda: (folder / "kill" / faults.KILL_SWITCH).touch()),
        ("stop", lambda: faults.request_stop(folder / "stop")),
    ):
        (folder / name).mkdir(exist_ok=True)

        def press(position, make=make):
            if position == 4 and rank == 0:
                make()

        run, state = new_run(folder / name, rank, world_size, Stream(rank, world_size, press))
        code = stopped_with(run, state)
        found[name] = {"code": code, "step": state.step, "tags": commits.tags(folder / name / "checkpoints")}
        found[name]["is_request_gone"] = not faults.is_stop_requested(folder / name)
    return found


def spike(folder, rank, world_size, options):
    """A loss x 100 at step 62: back to the commit of step 60, and the data since then are left out."""
    now = {"factor": 1.0}
    loader = Stream(rank, world_size, lambda position: now.update(factor=100.0 if position == 61 else 1.0))
    rollback = {"spike_sigma": 6.0, "spike_rollback": True, "replica_check_steps": 0}
    quiet = {"lr": 1e-6, "warmup_steps": 0}
    run, state = new_run(folder, rank, world_size, loader, steps=66, faults=rollback, optimizer=quiet)
    run.engine.stage.model.lm.lm_head.register_forward_hook(
        lambda module, inputs, output: output * now["factor"]
    )
    code = stopped_with(run, state)
    return {"code": code, "step": state.step, "read": loader.read, "events": events(folder, rank)}


def drift(folder, rank, world_size, options):
    """One bit flips on rank 1 after step 3; the check of step 4 stops every rank."""
    run, state = new_run(
        folder,
        rank,
        world_size,
        Stream(rank, world_size),
        faults={"replica_check_steps": 4, "spike_sigma": 0.0},
    )
    frozen = run.engine.stage.model.image_detokenizer
    run.loader.on_batch = lambda position: _flip(frozen) if (rank, position) == (1, 3) else None
    return {"code": stopped_with(run, state), "step": state.step}


def _flip(module):
    weights = next(module.parameters())
    weights.data.view(-1).view(torch.int32)[5] ^= 1


def full_disk(folder, rank, world_size, options):
    """Rank 1 may write only 20 kB per file: no rank commits, the older commit stays, all stop with one code."""
    run, state = new_run(folder, rank, world_size, Stream(rank, world_size), steps=9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(position):
        if rank == 1 and position == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    run.loader.on_batch = fill
    code = stopped_with(run, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {"code": code, "step": state.step, "left": left, "events": events(folder, rank)}


def averaged(folder, rank, world_size, options):
    """A moving average under ZeRO-1, 2 and 3 against one computed by hand, and through a commit."""
    found = {}
    for zero in (1, 2, 3):
        place = folder / str(zero)
        place.mkdir(exist_ok=True)
        settings = settings_of(place, steps=4, global_batch=world_size, micro_batch=1)
        engine = engine_of(settings, world_size, zero=zero, kind="lora")
        average = MovingAverage(engine, decay=0.4)
        by_hand = engine.trainable_state()
        for step in range(1, 5):
            batch = pack(rows_of(step, world_size)[rank:][:1], TOKENIZER, length=LENGTH)
            train_step(engine, [batch], 1e-2)
            average.after_update(step)
            rate = min(0.4, (1 + step) / (10 + step))
            for name, value in engine.trainable_state().items():
                by_hand[name] = rate * by_hand[name] + (1 - rate) * value
        before, weights = average.state(), engine.trainable_state()
        run = Run(
            settings=settings,
            engine=engine,
            loader=Stream(rank, world_size),
            facts={},
            observers=average,
        )
        save(run, RunState(step=4))
        again = engine_of(settings, world_size, zero=zero, kind="lora")
        other = MovingAverage(again, decay=0.4)
        checkpoint.resume(again, place / "checkpoints", facts={}, observers=other)
        found[zero] = {
            "error": max(float((before[name] - value).abs().max()) for name, value in by_hand.items()),
            "size": max(float(value.abs().max()) for value in by_hand.values()),
            "is_kept": all(torch.equal(value, other.state()[name]) for name, value in before.items()),
            "are_weights_kept": all(torch.equal(v, again.trainable_state()[n]) for n, v in weights.items()),
        }
    return found


def data_settings(folder, **more):
    """The data sets of a folder, packed."""
    sources = [{"name": path.name, "path": str(path)} for path in sorted(Path(folder).iterdir())]
    values = {
        "sources": sources,
        "sequence_length": LENGTH,
        "features": ["patches"],
        "num_workers": 0,
        **more,
    }
    return validate(DataSettings, parse_yaml(json.dumps(values)), where="test")


def packed(data, rank, world_size, *, micro_batch=1, **more):
    from vlgpt.data.loader import Loader

    place = {"rank": rank, "world_size": world_size}
    return Loader(data, kind="packed", micro_batch=micro_batch, tokenizer=TOKENIZER, **place, **more)


def uneven(folder, rank, world_size, options):
    """A source of seven shards and one of a single shard, through the real loader, under ZeRO-2 and ZeRO-3."""

    data = data_settings(options["data"])
    found = {}
    for zero in (2, 3):
        seeds.seed_everything(0)
        settings = settings_of(folder, steps=6, global_batch=world_size, micro_batch=1)
        engine = engine_of(settings, world_size, zero=zero, kind="lora")
        loader = packed(data, rank, world_size)
        losses, documents = [], []
        batches = iter(loader)
        for _ in range(6):
            batch = next(batches)
            _, sums = train_step(engine, [batch], 1e-2)
            losses.append(
                engine.all_sum(torch.stack([v.sum(1) for v in sums.values()]).double())[:, 0].tolist()
            )
            documents += [name for row in batch.documents for name in row]
            loader.advance(1)
        loader.close()
        once = packed(data, rank, world_size, is_one_pass=True)
        num_passes = len(list(once))
        once.close()
        found[zero] = {"losses": losses, "documents": documents, "num_passes": num_passes}
    return found


def measured(folder, rank, world_size, options):
    """Validation: packed rows against one document a row, and a probe that generates, under ZeRO-2 and ZeRO-3."""
    from vlgpt.decoding.api import DecodeSettings, Prompt
    from vlgpt.decoding.generator import Generator
    from vlgpt.settings import ValidationSettings
    from vlgpt.train.validation import validation_losses, validator

    def probe(stage, step):
        generator = Generator(model=stage.model, tokenizer=TOKENIZER, encoder=None, decoder=None)
        prompt = Prompt(Document("p", "test", (TextPart("What is in the picture?", "user"),)), ())
        (reply,) = generator.generate([prompt], DecodeSettings(max_new_tokens=8, images="never"))
        yield {}
        yield {"length": len(reply.text)}
        yield {"sum": sum(reply.text.encode())}

    found = {}
    for zero in (2, 3):
        settings = settings_of(folder, steps=6, global_batch=world_size, micro_batch=1)
        engine = engine_of(settings, world_size, zero=zero, kind="lora")
        with engine.evaluation():
            data, beats = data_settings(options["data"]), []
            chosen = ValidationSettings(sources=data.sources, max_batches=3)
            validating = settings.model_copy(update={"data": data, "validation": chosen})
            measure = validator(
                validating,
                engine,
                lambda data, **more: packed(data, rank, world_size, **more),
                log=MetricsSink(),
                probe=probe,
            )
            found[zero] = {"whole": measure(1, partial(beats.append, 1)), "beats": len(beats)}
            for packing in ("best_fit", "none"):
                data = data_settings(options["data"], packing=packing)
                loader = packed(data, rank, world_size, micro_batch=2, is_one_pass=True)
                found[zero][packing] = validation_losses(
                    engine, iter(loader), 1000, source_names=loader.source_names
                )
                loader.close()
    return found


def pictured(folder, rank, world_size, options):
    """Stage 1 seen: similarity over both ranks' pictures, and the same sheet for the same weights."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from demo.decoder import ConvDecoder
    from vlgpt.settings import EncoderSettings, PictureCheckSettings
    from vlgpt.train.pictures import ReconstructionCheck

    torch.manual_seed(1)
    if rank == 0:
        ConvDecoder(**CONDITION_SHAPES, size_px=24, width=24, num_heads=2, channels=32).save(
            folder / "decoder"
        )
        save_fitting_clip(folder / "clip")
    settings = settings_of(folder, steps=6, global_batch=world_size, micro_batch=1)
    engine = engine_of(settings, world_size, kind="tokenizer")
    engine.train(False)
    engine.barrier()  # rank 0 has written its files
    chosen = PictureCheckSettings(
        picture_decoder=str(folder / "decoder"),
        judge=EncoderSettings(path=str(folder / "clip")),
        num_pictures=6,
        num_on_sheet=4,
    )
    check = ReconstructionCheck(chosen, engine=engine)
    log = MetricsLog(folder) if rank == 0 else MetricsSink()
    batches = [
        replace(
            conditions([condition_sample(9, 2 * k + j + 6 * rank) for j in range(2)]),
            pixels=pixels_of(k, rank),
        )
        for k in range(3)
    ]
    values = [check(iter(batches), step=step, log=log)["validation/clip_similarity"] for step in (1, 2)]
    by_hand = []
    for batch in batches[:2]:  # six pictures over two ranks: two batches of two are at least three
        original, drawn = check.judge.embed_images(batch.pixels), check.judge.embed_images(check.draw(batch))
        by_hand += (100 * torch.nn.functional.cosine_similarity(original.double(), drawn.double())).tolist()
    everyone = [value for part in engine.gather_objects(by_hand) for value in part]
    found = {"values": values, "by_hand": sum(everyone) / len(everyone), "count": len(everyone)}
    if log is not None:
        log.close()
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        sheets = events.Images("reconstructions")
        found["sheets"] = [(sheet.step, sheet.width, sheet.height) for sheet in sheets]
        found["are_equal"] = sheets[0].encoded_image_string == sheets[1].encoded_image_string
    return found


def pixels_of(number, rank):
    generator = torch.Generator().manual_seed(10 * rank + number)
    return torch.rand(2, 3, 24, 24, generator=generator) * 2 - 1


class Gauge(Stage):
    """The smallest stage that trains on pixels; notes what its process holds during every forward pass."""

    batch_kind = "conditions"
    terms = ("brightness",)

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Linear(3, 1)
        self.held = Counter()

    @classmethod
    def from_settings(cls, run, *, num_sources):
        return cls()

    def count_targets(self, batch):
        return {"brightness": float(batch.is_valid.sum())}

    def forward(self, batch):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        mapped = sum("/dev/shm" in line for line in Path("/proc/self/maps").read_text().splitlines())
        found = {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "files_in_shm": mapped,
            "resident": resident,
        }
        self.held |= Counter(found)
        means = batch.require("pixels").mean((2, 3))
        return {"brightness": LossTerm(self.gain(means).sum())}

    def save(self, folder):
        pass


def accumulating(folder, rank, world_size, options):
    """One step of the real loop over 1, 64 and 1,024 micro-batches of images from the real loader."""
    from vlgpt.data.loader import Loader

    data = data_settings(options["data"], features=[], pixels=True, image_size_px=96, num_workers=2)
    found = {}
    for accumulation in (1, 64, 1024):
        place = folder / str(accumulation)
        sizes = {"global_batch": 4 * accumulation * world_size, "micro_batch": 4}
        settings = settings_of(place, steps=1, **sizes)
        merged = merge_config(
            settings, {"zero_optimization": {"stage": 1}}, world_size=world_size, source="test"
        )
        stage = Gauge()
        engine = Engine(stage, settings, merged)
        loader = Loader(
            data,
            kind="conditions",
            micro_batch=4,
            rank=rank,
            world_size=world_size,
            count_targets=stage.count_targets,
        )
        train(Run(settings=settings, engine=engine, loader=loader, facts={}), RunState())
        loader.close()
        found[accumulation] = dict(stage.held)
    return found


TASKS = (switches, spike, drift, full_disk, averaged, uneven, measured, pictured, accumulating)
