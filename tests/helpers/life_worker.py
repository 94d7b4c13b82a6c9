"""One process of the life of many language models: `life_worker.py FOLDER STOP_AFTER`; ranks from the environment.

Each run of FOLDER/runs.json is built, resumed and trained as a launcher does it, until STOP_AFTER or its end.
"""

import json
import sys
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)

from vlgpt.commits import newest_trainable  # noqa: E402
from vlgpt.config import parse_yaml, validate  # noqa: E402
from vlgpt.errors import UserError  # noqa: E402
from vlgpt.log import read_metrics  # noqa: E402
from vlgpt.settings import RunSettings  # noqa: E402
from vlgpt.train.ds_config import merge_config  # noqa: E402
from vlgpt.train.engine import start_process_group, stop_process_group  # noqa: E402
from vlgpt.train.loop import TrainingStopped, train  # noqa: E402
from vlgpt.train.run import build_run, close, finish  # noqa: E402

DEEPSPEED = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000},
    "zero_force_ds_cpu_optimizer": False,
}


def live(values, world_size, stop_after):
    """From the newest commit on; -> the step reached and the losses of rank 0, or the refusal."""
    settings = validate(RunSettings, parse_yaml(json.dumps(values)), where="test")
    run, state = build_run(settings, merge_config(settings, DEEPSPEED, world_size=world_size, source="test"))
    resumed_at, start = state.step, run.engine.trainable_state()
    source = settings.stage.init_from
    is_start = source and equal(start, newest_trainable(Path(source)).tensors)
    object.__setattr__(run, "should_stop", lambda: state.step >= stop_after)
    try:
        train(run, state)
        finish(run)
    except TrainingStopped:
        pass
    weights = run.engine.trainable_state()
    if run.engine.rank == 0 and state.step == settings.steps:
        torch.save(weights, settings.run_dir / "final.pt")
    close(run)
    losses = [r["loss/text"] for r in read_metrics(settings.run_dir / "metrics.jsonl") if "loss/text" in r]
    return {"resumed_at": resumed_at, "step": state.step, "losses": losses, "is_start": bool(is_start)}


def equal(found, wanted):
    return all(torch.equal(value, wanted[name]) for name, value in found.items())


def main():
    folder, stop_after = Path(sys.argv[1]), int(sys.argv[2])
    start_process_group(timeout_s=120)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for name, values in json.loads((folder / "runs.json").read_text()).items():
        try:
            results[name] = live(values, world_size, stop_after)
        except UserError as error:
            results[name] = {"refused": str(error)}
        except Exception:
            results[name] = {"crashed": traceback.format_exc()}
    (folder / f"result_{world_size}_{stop_after}_{rank}.json").write_text(json.dumps(results))
    stop_process_group()


if __name__ == "__main__":
    main()
