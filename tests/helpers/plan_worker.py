"""`plan_worker.py SIZE TRAINED PRECISION`: one step under DeepSpeed ZeRO-2; prints the bytes that it really keeps."""

import json
import sys

from torch import Tensor

from tests.helpers.plan_case import Case, to_dtype
from tests.helpers.runs import run_settings
from vlgpt.train.ds_config import merge_config
from vlgpt.train.engine import Engine, start_process_group, stop_process_group


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def main(size: str, trained: str, precision: str) -> None:
    case = Case(size, trained)
    settings = run_settings(global_batch=4, micro_batch=4, precision=precision)
    start_process_group(timeout_s=300.0)
    zero = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}}
    engine = Engine(case.stage, settings, merge_config(settings, zero, world_size=1, source="test"))
    case.batch = to_dtype(case.batch, engine.dtype)
    inner = engine._optimizer
    terms = engine.forward(case.batch)
    engine.backward(terms["text"].total + terms["visual"].total)
    gradients = num_bytes(g for group in inner.averaged_gradients.values() if group for g in group)
    engine.end_micro_batch()
    states = [
        t for s in inner.optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.ndim
    ]
    result = {
        "frozen": num_bytes(p for p in case.stage.parameters() if not p.requires_grad),
        "trainable": num_bytes(p for p in case.stage.parameters() if p.requires_grad),
        "gradients": gradients,
        "optimizer": num_bytes(inner.single_partition_of_fp32_groups) + num_bytes(states),
    }
    stop_process_group()
    sys.stdout.write("\nRESULT " + json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
