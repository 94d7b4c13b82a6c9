"""Features: equal to what the encoder gives, for any number of processes and kills, within the stored precision."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import check, features
from data_prep.feature_jobs import compute_shard, make_job
from tests.helpers.builds import build, write_imagefolder
from tests.helpers.corpus import picture
from tests.helpers.processes import ROOT
from tests.helpers.tiny_clip import save_tiny_clip
from vlgpt.batch import to_pixels
from vlgpt.errors import UserError, run_command
from vlgpt.images import read_square
from vlgpt.models.encoders import load_clip
from vlgpt.shards import ShardSet, write_spec

NUM_PICTURES = 14


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five shards of up to three pairs."""
    files = [
        (f"{n:02d}.png", picture(n, "PNG", width=40 + n), {"text": f"picture number {n}"})
        for n in range(NUM_PICTURES)
    ]
    write_imagefolder(tmp_path / "in", files)
    assert build("folder", tmp_path / "in", tmp_path / "data", "--shard-size", 3) == 0
    return tmp_path / "data"


def run(folder: Path, clip: Path, *options: object) -> int:
    arguments = [str(folder), "--encoder", str(clip), "--device", "cpu", *map(str, options)]
    return run_command(lambda: features.main(arguments))


def stored(folder: Path, name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "features" / name).iterdir())}


def all_rows(folder: Path, name: str) -> np.ndarray:
    shards = ShardSet.open(folder)
    reader = shards.feature(name)
    parts = [reader.rows(number, 0, record.num_images) for number, record in enumerate(shards.shards)]
    return np.concatenate(parts)


def direct(folder: Path, clip: Path) -> np.ndarray:
    """Patch features straight from the encoder, one picture at a time."""
    encoder, shards, rows = load_clip(str(clip)), ShardSet.open(folder), []
    for number, record in enumerate(shards.shards):
        for sample in range(record.num_samples):
            square = read_square(shards.read(number, sample).images[0], size_px=24, decoder="pillow")
            with torch.no_grad():
                rows.append(encoder.patches(to_pixels(np.array(square)[None])).numpy())
    return np.stack(rows)


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-5), ("float16", 1e-3), ("int8", 1 / 200)])
def test_stored_rows_are_the_encoder_s_within_the_precision_of_their_type(folder, clip, dtype, relative):
    assert run(folder, clip, "--features", "patches", "--dtype", dtype, "--batch-size", "4") == 0
    found, wanted = all_rows(folder, "patches"), direct(folder, clip)
    assert found.shape == wanted.shape == (NUM_PICTURES, 1, 5, 32)
    largest = np.abs(wanted).max(axis=-1, keepdims=True)  # int8 has one scale per vector
    assert (np.abs(found - wanted) <= relative * largest).all()
    assert check.main([str(folder)]) == 0


def test_lower_precision_changes_the_rows_a_little_and_their_fingerprint_not(folder, clip):
    assert run(folder, clip, "--features", "patches") == 0
    exact = all_rows(folder, "patches").astype(np.float32)
    for path in (folder / "features/patches").glob("0*"):
        path.unlink()
    assert run(folder, clip, "--features", "patches", "--precision", "bfloat16") == 0
    rounded = all_rows(folder, "patches").astype(np.float32)
    assert 0 < np.abs(rounded - exact).mean() < 0.01 * np.abs(exact).max()


def test_one_view_of_int8_rows_is_read_with_its_own_scales(folder, clip):
    assert run(folder, clip, "--features", "patches", "--views", "3", "--dtype", "int8") == 0
    reader = ShardSet.open(folder).feature("patches")
    whole = reader.rows(1, 0, 3)
    assert whole.shape == (3, 3, 5, 32) and np.abs(whole[:, 1] - whole[:, 0]).max() > 0.01
    for view in range(3):
        np.testing.assert_array_equal(reader.rows(1, 0, 3, view=view), whole[:, view])
    np.testing.assert_allclose(whole[:, 0], direct(folder, clip)[3:6, 0], atol=0.05)


def test_int8_takes_half_of_float16_and_a_scale_per_vector(folder, clip):
    sizes = {}
    for dtype in ("float16", "int8"):
        assert run(folder, clip, "--features", "patches", "--dtype", dtype) == 0
        files = stored(folder, "patches")
        sizes[dtype] = {kind: sum(len(data) for name, data in files.items() if re.match(kind, name)) for kind in
                        (r"\d+\.npy", r"\d+\.scale\.npy")}  # fmt: skip
        for path in (folder / "features" / "patches").iterdir():
            path.unlink()
    header = 5 * 128
    plain, small = sizes["float16"][r"\d+\.npy"] - header, sizes["int8"][r"\d+\.npy"] - header
    assert plain == NUM_PICTURES * 5 * 32 * 2 == 2 * small
    assert sizes["float16"][r"\d+\.scale\.npy"] == 0
    assert sizes["int8"][r"\d+\.scale\.npy"] - header == NUM_PICTURES * 5 * 4


def test_bytes_per_row_is_what_lies_on_disk(folder, clip):
    encoder = load_clip(str(clip))
    for dtype in ("float16", "int8", "float32"):
        job = make_job("patches", encoder, encoder_name="e", dtype=dtype, views=2)
        (folder / "features" / "patches").mkdir(parents=True, exist_ok=True)
        compute_shard(job, ShardSet.open(folder), 0, folder=folder, batch_size=2)
        sizes = [len(data) - 128 for name, data in stored(folder, "patches").items() if name.endswith(".npy")]
        assert sum(sizes) == 3 * job.bytes_per_row
        for path in (folder / "features" / "patches").iterdir():
            path.unlink()


def test_flops_are_those_of_the_architecture(clip):
    """Two per multiply-add of every matrix product, counted by hand for the tiny tower."""
    width, tokens, patch = 32, 5, 3 * 12 * 12
    linears = tokens * (4 * width * width + 2 * width * 4 * width)
    attention = 2 * tokens * tokens * width
    wanted = 2 * (4 * patch * width + 2 * (linears + attention))
    job = make_job("patches", load_clip(str(clip), layer=-1), encoder_name="e")
    assert job.flops_per_row() == pytest.approx(wanted, rel=0.02)
    four = make_job("patches", load_clip(str(clip), layer=-1), encoder_name="e", views=4)
    assert four.flops_per_row() == pytest.approx(4 * wanted, rel=0.02)


def test_any_number_of_tasks_and_processes_gives_the_same_files(folder, clip, tmp_path):
    options = ("--features", "patches,image_condition,text_condition", "--views", "2", "--dtype", "int8")
    assert run(folder, clip, *options) == 0
    names = ("patches", "image_condition", "text_condition")
    whole = {name: stored(folder, name) for name in names}
    assert {name for name in whole["patches"] if name.endswith(".json")} > {"00000.json", "00004.json"}
    for path in sorted((folder / "features").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for task, num_workers in ((1, 2), (0, 1)):
        share = ("--task-index", task, "--num-tasks", 2, "--num-workers", num_workers)
        assert run(folder, clip, *options, *share) == 0
    assert {name: stored(folder, name) for name in names} == whole


def test_a_rerun_encodes_nothing_and_a_lost_shard_only(folder, clip, monkeypatch):
    assert run(folder, clip, "--features", "patches") == 0
    before = stored(folder, "patches")
    times = {path: path.stat().st_mtime_ns for path in (folder / "features/patches").glob("0*")}
    (folder / "features/patches/00002.json").unlink()  # a kill between rows and their seal
    assert run(folder, clip, "--features", "patches") == 0
    assert stored(folder, "patches") == before
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"00002.npy", "00002.json"}


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_same_files(folder, clip, tmp_path):
    assert run(folder, clip, "--features", "patches", "--batch-size", "1") == 0
    whole = stored(folder, "patches")
    for path in (folder / "features" / "patches").iterdir():
        path.unlink()
    command = [sys.executable, "-c", SLOW_RUN, str(folder), "--encoder", str(clip), "--device", "cpu"]
    command += ["--features", "patches", "--batch-size", "1"]
    hits = 0
    for wanted in (0, 1, 2, 3, 4):  # killed in the middle of a shard after this many are sealed
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        done = folder / "features" / "patches"
        while time.monotonic() < deadline and process.poll() is None:
            is_between = len(list(done.glob("0*.json"))) >= wanted and list(done.glob(".*.partial"))
            if is_between:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate(timeout=600)
        hits += process.returncode == -signal.SIGKILL
        for path in done.glob("0*.json"):
            assert np.load(path.with_suffix(".npy")).shape[0] == json.loads(path.read_text())["rows"]
    assert hits == 5
    assert run(folder, clip, "--features", "patches", "--batch-size", "1") == 0
    assert stored(folder, "patches") == whole


SLOW_RUN = """
import sys, time
from data_prep import feature_jobs, features
def slowly(self, rows):
    add(self, rows)
    time.sleep(0.05)
add = feature_jobs.FeatureWriter.add
feature_jobs.FeatureWriter.add = slowly
raise SystemExit(features.main(sys.argv[1:]))
"""


def test_sigterm_leaves_no_processes_and_asks_for_a_restart(folder, clip):
    command = [sys.executable, "-m", "data_prep.features", folder, "--encoder", clip, "--device", "cpu"]
    process = subprocess.Popen([*command, "--num-workers", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    children: list[str] = []
    while len(children) < 2 and time.monotonic() < deadline:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [pid for pid in listed if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=600) == 75
    deadline = time.monotonic() + 200
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_speed_and_trade_off_are_printed(folder, clip, capsys):
    assert run(folder, clip, "--features", "patches,text_condition", "--dtype", "int8") == 0
    printed = capsys.readouterr().err
    assert re.search(rf"patches: {NUM_PICTURES} images, [\d.]+ images/s", printed)
    assert re.search(rf"text_condition: {NUM_PICTURES} texts, [\d.]+ texts/s", printed)
    kilobytes, gigaflops = re.search(
        r"patches: ([\d.]+) kB \([\d.]+ x its picture\) and ([\d.]+) GFLOPs", printed
    ).groups()
    assert float(kilobytes) == pytest.approx(5 * (32 + 4) / 1000, abs=0.05) and float(gigaflops) >= 0
    assert run(folder, clip, "--features", "patches", "--dtype", "int8") == 0
    assert "patches: nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--features", "pixels"), "unknown feature 'pixels'; valid: patches"),
        (("--features", "visual"), "needs --image-tokenizer"),
        (("--num-workers", "0"), "--num-workers must be at least 1, found 0"),
        (("--task-index", "2", "--num-tasks", "2"), "--task-index must be between 0 and 1, found 2"),
    ],
)
def test_wrong_features_use_is_one_line(folder, clip, capsys, options, message):
    assert run(folder, clip, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_encoder_is_refused_and_a_damaged_picture_named(folder, clip, tmp_path, capsys):
    assert run(folder, clip, "--features", "patches") == 0
    assert run(folder, save_tiny_clip(tmp_path / "other", seed=1), "--features", "patches") == 2
    assert "another encoder, weights_hash" in capsys.readouterr().err
    tar = folder / "00001.tar"
    data = bytearray(tar.read_bytes())
    place = int(ShardSet.open(folder).index(1).member_offset[3])  # the picture of the second sample
    data[place + 30] ^= 1
    tar.write_bytes(data)
    assert run(folder, clip, "--features", "image_condition") == 2
    assert "shard 00001, sample" in capsys.readouterr().err
    assert not list((folder / "features/image_condition").glob(".*.partial"))


def test_the_writer_refuses_too_few_rows(folder, clip):
    from vlgpt.shards import FeatureWriter

    job = make_job("patches", load_clip(str(clip)), encoder_name="e")
    write_spec(folder, job.spec)
    writer = FeatureWriter(folder, job.spec, "00000", num_rows=3)
    writer.add(np.zeros((2, 1, 5, 32)))
    with pytest.raises(ValueError, match="2 rows given, 3 announced"):
        writer.close(tar_sha256="x")
    writer.abort()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e5])
def test_values_that_cannot_be_stored_are_refused(folder, clip, dtype, value):
    from vlgpt.shards import FeatureWriter

    job = make_job("patches", load_clip(str(clip)), encoder_name="e", dtype=dtype)
    write_spec(folder, job.spec)
    writer = FeatureWriter(folder, job.spec, "00000", num_rows=3)
    rows = np.zeros((3, 1, 5, 32), np.float32)
    rows[1, 0, 2, 7] = value
    if np.isfinite(value) and dtype != "float16":
        writer.add(rows)
    else:
        with pytest.raises(UserError, match="cannot be stored as"):
            writer.add(rows)
    writer.abort()
    assert not list((folder / "features/patches").glob(".*partial"))
