"""Laws of the loop and the engine, in real DeepSpeed processes: counts, ranks, accumulation, resume, frozen parts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import HELPERS, ROOT
from tests.helpers.small_data import page, write_dataset, write_feature
from tests.helpers.small_data import pair as pair_of
from tests.helpers.tiny_unified import NUM_PATCHES, PATCH_WIDTH, new_document_tokenizer

TOKENIZER = new_document_tokenizer()


@pytest.fixture(scope="module")
def run_workers(forks):
    """Runs worker.py as the ranks of one world: -> their results."""

    def run(task, folder, *, world_size=1, is_killed=False, code=0, **options):
        """`task` may be several with commas between, run one after the other in the same processes."""
        folder.mkdir(parents=True, exist_ok=True)
        command, log = [HELPERS / "worker.py", task, folder, json.dumps(options)], folder / "log"
        codes = forks.run(command, folder=ROOT, log=log, num_ranks=world_size, is_death_of_all=False)
        assert codes == [-9 if is_killed else code] * world_size, log.read_text()[-6000:]
        if is_killed:
            return []
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world_size)]

    return run


@pytest.fixture(scope="module")
def layouts(run_workers, tmp_path_factory):
    """The same eight packed rows as 1 rank x 8 or 2 micro-batches, and 2 ranks x 4 or 2 of them."""
    root = tmp_path_factory.mktemp("layouts")
    run_workers("layouts", root / "one", world_size=1)
    run_workers("layouts", root / "two", world_size=2)
    return {path.stem: load_file(path) for path in sorted(root.rglob("*.safetensors"))}


@pytest.mark.parametrize("layout", ["1x2x4", "2x4x1", "2x2x2"])
def test_gradients_depend_on_neither_ranks_nor_accumulation(layouts, layout):
    reference, found = layouts["gradient_1x8x1"], layouts[f"gradient_{layout}"]
    assert found.keys() == reference.keys()
    assert max(float(value.abs().max()) for value in reference.values()) > 1e-2, "the gradients say nothing"
    worst = max(float((found[name] - value).abs().max()) for name, value in reference.items())
    assert worst <= 1e-6, f"gradients differ by {worst}"


@pytest.mark.parametrize("layout", ["1x2x4", "2x4x1", "2x2x2"])
def test_weights_after_three_steps_depend_on_neither_ranks_nor_accumulation(layouts, layout):
    for name, value in layouts["weights_1x8x1"].items():
        assert torch.allclose(value, layouts[f"weights_{layout}"][name], atol=2e-6), name


@pytest.fixture(scope="module")
def updates(run_workers, tmp_path_factory):
    """What one step changes, with accumulation and without, in bf16."""
    root = tmp_path_factory.mktemp("accumulated")
    run_workers("accumulated", root, world_size=2)
    return {path.stem: load_file(path) for path in root.glob("*.safetensors")}


@pytest.mark.parametrize("layer", ["bf16 zero 1", "bf16 zero 2", "bf16 zero 3", "bf16 offload"])
def test_accumulated_micro_batches_count_alike_under_every_optimizer_of_deepspeed(updates, layer):
    """In the training precision: each of deepspeed's optimizers accumulates in code of its own."""
    one, many = (
        torch.cat([v.flatten() for v in updates[f"{layer}, {how}"].values()]) for how in ("one", "many")
    )
    assert float(one.norm()) > 0
    assert float((one - many).norm() / one.norm()) < 0.03


@pytest.fixture(scope="module")
def resumed(run_workers, tmp_path_factory):
    root, options = tmp_path_factory.mktemp("resume"), {"steps": 6, "drop": 0.3}
    runs = {"straight": options, "broken": {**options, "stop_after": 3}}
    straight = run_workers("several", root, runs=runs)[0]["straight"]
    broken = run_workers("train", root / "broken", **options)[0]
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


PAIR_TASKS = (
    "modalities,poison,switches,spike,drift,full_disk,averaged,uneven,measured,pictured,accumulating,"
    "poisoned_for_good"
)


@pytest.fixture(scope="module")
def pair(run_workers, tmp_path_factory):
    """Many faults in one start of two ranks; the last one ends both processes with code 70."""
    folder, data = tmp_path_factory.mktemp("pair"), tmp_path_factory.mktemp("data")
    write_dataset(data / "seven", [page(n) for n in range(21)], shard_sizes=[3] * 7, tokenizer=TOKENIZER)
    write_dataset(data / "one", [pair_of(n) for n in range(3)], shard_sizes=[3], tokenizer=TOKENIZER)
    for source in data.iterdir():
        write_feature(source, "patches", shape=(NUM_PATCHES, PATCH_WIDTH))
    options = {"kind": "full", "data": str(data)}
    return run_workers(PAIR_TASKS, folder, world_size=2, code=70, **options)


def test_a_non_finite_step_is_skipped_on_all_ranks_and_counted(pair):
    for rank in pair:
        result = rank["poison"]
        assert result["skipped_at"] == [3], "exactly the poisoned step is skipped"
        assert result["unchanged"], "a skipped step changed parameters"
        assert result["moved_on"], "training did not go on after the skipped step"


def test_five_non_finite_steps_in_a_row_stop_every_rank_alike(pair):
    for rank in pair:
        assert (rank["poisoned_for_good"]["exit_code"], rank["poisoned_for_good"]["step"]) == (70, 5)


def test_kill_switch_and_stop_request_commit_after_the_step(pair):
    for rank in pair:
        kill, stop = rank["switches"]["kill"], rank["switches"]["stop"]
        assert (kill["code"], kill["step"], stop["code"], stop["step"]) == (76, 5, 75, 5)
        assert kill["tags"][0] == stop["tags"][0] == "step_00000005"
    assert pair[0]["switches"]["stop"]["is_request_gone"], "the next start would stop at once"


def test_a_spike_rolls_back_to_the_newest_commit_and_leaves_its_data_out(pair):
    for rank in pair:
        assert (rank["spike"]["code"], rank["spike"]["step"]) == (0, 66)
        assert rank["spike"]["read"] == list(range(68)), (
            "after the spike at position 61 training reads on from 62"
        )
    kinds = [(event["event"], event["step"]) for event in pair[0]["spike"]["events"]]
    assert kinds == [("loss_spike", 62), ("rollback", 62)]
    assert pair[0]["spike"]["events"][1]["to_step"] == 60


def test_a_replica_that_drifted_stops_all_ranks(pair):
    assert [(rank["drift"]["code"], rank["drift"]["step"]) for rank in pair] == [(71, 4), (71, 4)]


def test_a_disk_that_is_full_on_one_rank_leaves_no_half_commit_on_any(pair):
    for rank in pair:
        found = rank["full_disk"]
        assert (found["code"], found["step"], found["left"]) == (74, 6, ["step_00000003"])
    (event,) = pair[0]["full_disk"]["events"]
    assert event["event"] == "disk_full" and "rank 1" in event["message"]


def test_what_a_step_holds_does_not_grow_with_its_micro_batches(pair):
    """Held as uint8, 1,024 micro-batches of 4 images of 96 px would be 113 MB; as fp32 in /dev/shm, 453 MB and 1,024
    descriptors.
    """
    for rank in pair:
        least = rank["accumulating"]["1"]
        for found in rank["accumulating"].values():
            assert found["descriptors"] <= least["descriptors"] + 2
            assert found.get("files_in_shm", 0) == 0
            assert found["resident"] <= least["resident"] + 40e6


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_the_moving_average_is_exact_and_survives_a_commit(pair, zero):
    for rank in pair:
        found = rank["averaged"][zero]
        assert found["error"] <= 1e-6 * max(found["size"], 1.0)
        assert found["is_kept"] and found["are_weights_kept"]


def test_another_number_of_ranks_goes_on_by_itself_with_the_same_samples(run_workers, tmp_path):
    """2 -> 1 ranks, and against a run of one rank all along: losses within 1e-5, the same documents."""
    options = {"steps": 4, "kind": "lora"}
    run_workers("train", tmp_path / "elastic", world_size=2, stop_after=2, **options)
    results = run_workers("several", tmp_path, runs={"straight": options, "elastic": options})[0]
    straight, elastic = results["straight"], results["elastic"]
    assert elastic["is_elastic"] and elastic["resumed_at"] == 2
    assert elastic["documents"] == straight["documents"][2:]
    assert elastic["losses"] == [pytest.approx(wanted, rel=1e-5) for wanted in straight["losses"][2:]]
    assert not list((tmp_path / "elastic" / "checkpoints").glob("*universal*")), (
        "conversion left files behind"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full", "tokenizer"])
def test_two_one_two_ranks_equal_one_rank(run_workers, tmp_path, kind):
    """Losses within 1e-5, and every step sees the same documents, whoever reads them."""
    straight = run_workers("train", tmp_path / "straight", steps=6, kind=kind)[0]
    losses, documents = [], []
    for world_size, stop_after in ((2, 2), (1, 4), (2, 6)):
        options = {"steps": 6, "stop_after": stop_after, "kind": kind}
        results = run_workers("train", tmp_path / "elastic", world_size=world_size, **options)
        losses += results[0]["losses"]
        documents += [
            sorted(name for part in parts for name in part)
            for parts in zip(*(r["documents"] for r in results))
        ]
        assert results[0]["resumed_at"] == stop_after - 2
    assert losses == [pytest.approx(wanted, rel=1e-5) for wanted in straight["losses"]]
    assert documents == straight["documents"]


def test_ranks_with_text_only_and_pictures_only_do_not_hang_under_any_zero_stage(pair):
    first, second = (rank["modalities"] for rank in pair)
    assert first["losses"] == second["losses"]
    for stage in ("2", "3"):
        for found, wanted in zip(first["losses"][stage], first["losses"]["1"]):
            assert found == pytest.approx(wanted, rel=1e-5), f"ZeRO-{stage} differs from ZeRO-1"


@pytest.mark.parametrize("zero", ["2", "3"])
def test_seven_shards_against_one_do_not_hang_and_deal_no_sample_twice(pair, zero):
    first, second = (rank["uneven"][zero] for rank in pair)
    assert first["losses"] == second["losses"] and len(first["losses"]) == 6
    assert first["num_passes"] == second["num_passes"]
    assert not set(first["documents"][:8]) & set(second["documents"][:8])
    assert first["documents"] == pair[0]["uneven"]["2"]["documents"]


@pytest.mark.parametrize("zero", ["2", "3"])
def test_packed_and_unpacked_validation_agree_and_so_do_all_ranks(pair, zero):
    first, second = (rank["measured"][zero] for rank in pair)
    assert first["best_fit"] == second["best_fit"]
    assert {"validation/text", "validation/visual", "validation/text/one"} <= set(first["none"])
    for name, value in first["none"].items():
        assert first["best_fit"][name] == pytest.approx(value, rel=1e-5), name


def test_a_probe_gives_the_same_under_zero_2_and_zero_3_and_hangs_nowhere(pair):
    found = [
        {
            name: value
            for name, value in pair[0]["measured"][zero]["whole"].items()
            if name.startswith("probe")
        }
        for zero in ("2", "3")
    ]
    assert found[0] == found[1] and found[0]["probe/length"] > 0 and len(found[0]) == 2


@pytest.mark.parametrize("zero", ["2", "3"])
def test_every_rank_gives_a_sign_of_life_at_each_batch_of_a_validation_and_of_the_probe(pair, zero):
    first, second = (rank["measured"][zero] for rank in pair)
    held_out = [
        {name: v for name, v in rank["whole"].items() if "probe" not in name} for rank in (first, second)
    ]
    assert held_out[0] == held_out[1] and "validation/text" in held_out[0]
    assert min(first["beats"], second["beats"]) >= 3 + 3, (
        "of three batches, and of the three parts of the probe"
    )


def test_reconstructions_are_measured_over_all_ranks_and_the_sheet_shows_the_same_pictures(pair):
    first, second = (rank["pictured"] for rank in pair)
    assert first["values"] == second["values"] and first["count"] == 8
    assert first["values"] == [pytest.approx(first["by_hand"], abs=1e-3)] * 2
    assert first["sheets"] == [[1, 96, 48], [2, 96, 48]] and first["are_equal"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2])
@pytest.mark.parametrize("kind", ["tokenizer", "lora", "full", "chat"])
def test_twenty_steps_a_kill_and_twenty_more_equal_forty_bit_for_bit(run_workers, tmp_path, kind, zero):
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
