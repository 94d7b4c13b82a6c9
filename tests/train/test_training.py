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


def run_workers(task, folder, *, world_size=1, timeout_s=150, is_killed=False, **options):
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
    if is_killed:
        assert processes[-1].returncode == -9, outputs[-1][-3000:]
        return []
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
    straight = run_workers("train", root / "straight", steps=6, drop=0.3)[0]
    run_workers("train", root / "broken", steps=6, stop_after=3, drop=0.3)
    broken = run_workers("train", root / "broken", steps=6, drop=0.3)[0]
    return root, straight, broken


def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(resumed):
    root, straight, broken = resumed
    assert broken["resumed_at"] == 3
    assert straight["losses"][3:] == broken["losses"]
    first = load_file(root / "straight" / "final_6.safetensors")
    second = load_file(root / "broken" / "final_6.safetensors")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frozen_parts_stay_bit_equal_and_are_not_saved(resumed):
    root, straight, _ = resumed
    assert straight["frozen_before"] == straight["frozen_after"]
    folder = next((root / "straight" / "checkpoints").glob("step_*"))
    most = 1.1 * (4 + 16) * straight["num_trainable"]
    assert straight["num_bytes"] <= most + 60_000, "60 kB: what a pickle and the RNG cost at any size"
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


def test_another_number_of_ranks_goes_on_by_itself_with_the_same_samples(tmp_path):
    """2 -> 1 ranks, and against a run of one rank all along: losses within 1e-5, the same documents."""
    straight = run_workers("train", tmp_path / "straight", steps=4, kind="lora")[0]
    run_workers("train", tmp_path / "elastic", world_size=2, steps=4, stop_after=2, kind="lora")
    elastic = run_workers("train", tmp_path / "elastic", steps=4, kind="lora")[0]
    assert elastic["is_elastic"] and elastic["resumed_at"] == 2
    assert elastic["documents"] == straight["documents"][2:]
    assert elastic["losses"] == [pytest.approx(wanted, rel=1e-5) for wanted in straight["losses"][2:]]
    assert not list((tmp_path / "elastic" / "checkpoints").glob("*universal*")), (
        "conversion left files behind"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full", "tokenizer"])
def test_two_one_two_ranks_equal_one_rank(tmp_path, kind):
    straight = run_workers("train", tmp_path / "straight", steps=6, kind=kind)[0]
    found = []
    for world_size, stop_after in ((2, 2), (1, 4), (2, 6)):
        options = {"steps": 6, "stop_after": stop_after, "kind": kind}
        results = run_workers("train", tmp_path / "elastic", world_size=world_size, **options)
        found += results[0]["losses"]
        assert results[0]["resumed_at"] == stop_after - 2
    assert found == [pytest.approx(wanted, rel=1e-5) for wanted in straight["losses"]]


def test_ranks_with_text_only_and_pictures_only_do_not_hang_under_any_zero_stage(tmp_path):
    first, second = run_workers("modalities", tmp_path, world_size=2, kind="full", timeout_s=250)
    assert first["losses"] == second["losses"]
    for stage in ("2", "3"):
        for found, wanted in zip(first["losses"][stage], first["losses"]["1"]):
            assert found == pytest.approx(wanted, rel=1e-5), f"ZeRO-{stage} differs from ZeRO-1"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("kind", ["tokenizer", "lora", "full"])
def test_twenty_steps_a_kill_and_twenty_more_equal_forty_bit_for_bit(tmp_path, kind, zero):
    options = {"steps": 40, "kind": kind, "zero": zero, "drop": 0.3}
    straight = run_workers("train", tmp_path / "straight", **options)[0]
    run_workers("train", tmp_path / "killed", commits=[20], die_after=27, is_killed=True, **options)
    again = run_workers("train", tmp_path / "killed", **options)[0]
    assert again["resumed_at"] == 20
    assert again["losses"] == straight["losses"][20:]
    first = load_file(tmp_path / "straight" / "final_40.safetensors")
    second = load_file(tmp_path / "killed" / "final_40.safetensors")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
