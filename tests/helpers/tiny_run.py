"""A run of stage 1 that takes seconds: its data, its command, and its result."""

import torch
from safetensors.torch import load_file

from tests.helpers.small_data import pair, write_dataset, write_feature

SHAPES = {
    "num_patches": 5,
    "patch_width": 8,
    "image_tokens": 4,
    "image_width": 8,
    "text_tokens": 3,
    "text_width": 8,
}
TINY = "{width: 32, depth: 1, num_heads: 2, mlp_ratio: 2.0, init_std: 1.0}"
RUN = ["launchers/train_tokenizer.py", "--deepspeed", "ds_configs/zero2.json"]


def write_shards(folder):
    """Forty pictures with stored features."""
    write_dataset(folder, [pair(number) for number in range(40)], shard_sizes=[20, 20])
    shapes = {"patches": (5, 8), "image_condition": (4, 8), "text_condition": (3, 8)}
    for name, shape in shapes.items():
        write_feature(folder, name, shape=shape)
    return folder


def arguments(data, folder, **overrides):
    shapes = ", ".join(f"{name}: {size}" for name, size in SHAPES.items())
    values = {
        "output_dir": folder,
        "data.sources": f"[{{name: a, path: '{data}'}}]",
        "data.num_workers": 0,
        "stage.shapes": f"{{{shapes}}}",
        "stage.tokenizer": TINY,
        "stage.detokenizer": TINY,
        "stage.num_visual": 3,
        "stage.visual_width": 16,
        "stage.statistics_samples": 40,
        "global_batch": 8,
        "micro_batch": 2,
        "steps": 600,
        "optimizer.warmup_steps": 5,
        "checkpoint.interval_steps": 5,
        "log_interval_steps": 50,
        "step_timeout_s": 60,
        **overrides,
    }
    return [
        *RUN,
        "--config",
        "demo/configs/tokenizer.yaml",
        *(f"{k}={v}" for k, v in values.items()),
    ]


def weights(folder):
    return load_file(folder / "result" / "image_tokenizer" / "model.safetensors")


def assert_equal(first, second):
    wanted, found = weights(first), weights(second)
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name
