"""Laws of the loop and the engine, in real DeepSpeed processes: counts, ranks, accumulation, resume, frozen parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


def run_workers(task, folder, *, world_size=1, timeout_s=150, **options):
    """Start `world_size` processes of worker.py side by side, without the launcher; returns their results."""
    folder.mkdir(parents=True, exist_ok=True)
    port = 20000 + os.getpid() % 20000 + world_size
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parents[1])]),
        }
        command = [sys.executable, str(WORKER), task, str(folder), json.dumps(options)]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s)[0])
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same eight packed rows as 1 rank x 8 micro-batches, 1 x 2 of four rows, and 2 ranks x 2 x 2 rows."""
    root = tmp_path_factory.mktemp("layouts")
    run_workers("layouts", root / "one", world_size=1)
    run_workers("layouts", root / "two", world_size=2)
    found = {}
    for path in sorted(root.rglob("*.safetensors")):
        found[path.stem] = load_file(path)
    return found


def test_an_update_depends_on_neither_ranks_nor_accumulation(layouts):
    assert len(layouts) == 3
    reference = layouts["1x8x1"]
    for name, weights in layouts.items():
        for key, value in reference.items():
            assert torch.allclose(value, weights[key], atol=2e-6), f"{name}: {key}"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    straight = run_workers("train", root / "straight", steps=6)[0]
    run_workers("train", root / "broken", steps=6, stop_after=3)
    broken = run_workers("train", root / "broken", steps=6)[0]
    return root, straight, broken


def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(resumed):
    root, straight, broken = resumed
    assert broken["resumed_at"] == 3
    assert straight["losses"][3:] == broken["losses"]
    first = load_file(root / "straight" / "final.safetensors")
    second = load_file(root / "broken" / "final.safetensors")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frozen_parts_stay_bit_equal_and_are_not_saved(resumed):
    root, straight, _ = resumed
    assert straight["frozen_before"] == straight["frozen_after"]
    folder = next((root / "straight" / "checkpoints").glob("step_*"))
    stored = load_file(folder / "trainable.safetensors")
    assert not [name for name in stored if name.startswith("model.image_tokenizer")]
    assert [name for name in stored if name.startswith("model.lm.")]


def test_a_non_finite_step_is_skipped_on_all_ranks_and_counted(tmp_path):
    results = run_workers("poison", tmp_path, world_size=2)
    for result in results:
        assert result["skipped_at"] == [3], "exactly the poisoned step is skipped"
        assert result["unchanged"], "a skipped step changed parameters"
        assert result["moved_on"], "training did not go on after the skipped step"


def test_five_non_finite_steps_in_a_row_stop_every_rank_alike(tmp_path):
    results = run_workers("poisoned_for_good", tmp_path, world_size=2)
    assert [result["exit_code"] for result in results] == [70, 70]
