"""What a finished run leaves: statistics for the next stage, and the result folder, complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlgpt import log
from vlgpt.data.loader import Loader
from vlgpt.files import write_atomic
from vlgpt.settings import RunSettings
from vlgpt.train.engine import Engine
from vlgpt.train.facts import RESULT
from vlgpt.train.loop import Run


def placed(engine: Engine, batches: Iterable[Any]) -> Iterator[Any]:
    """A loader's batches on the engine's device."""
    for batch in batches:
        yield engine.place(batch)


def finish(run: Run) -> None:
    """After the last step: the moving average takes over, then statistics for the next stage, then the result."""
    settings, engine = run.settings, run.engine
    if run.watchdog is not None:
        run.watchdog.close()
    if run.average is not None:
        engine.load_weights(run.average.state())
    loader = Loader(
        settings.data.model_copy(update={"num_workers": 0}),
        kind=engine.stage.batch_kind,
        micro_batch=settings.micro_batch,
        rank=engine.rank,
        world_size=engine.world_size,
        tokenizer=getattr(run.loader, "tokenizer", None),
        run_positions=settings.steps * settings.global_batch,
    )
    with engine.evaluation():
        engine.stage.finish(placed(engine, loader), engine.all_sum)
    engine.train(False)
    loader.close()
    with engine.gathered_weights():
        if engine.rank == 0:
            write_result(settings, engine)
    engine.barrier()


def write_result(settings: RunSettings, engine: Engine) -> None:
    """The result folder, written beside its place and moved there when it is whole."""
    partial, result = settings.run_dir / f".{RESULT}.partial", settings.run_dir / RESULT
    shutil.rmtree(partial, ignore_errors=True)
    engine.stage.save(partial)
    done = {"settings": settings.model_dump(mode="json")}
    write_atomic(partial / "done.json", json.dumps(done, indent=1).encode())
    replace_folder(partial, result)
    log.get_logger().info("result written to %s", result)


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of an older one. After a kill in between, the next call goes on."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    new.replace(target)
    shutil.rmtree(old, ignore_errors=True)
