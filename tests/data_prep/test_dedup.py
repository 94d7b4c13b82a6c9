"""Duplicates leave once, evaluation pictures leave always, everything else stays, for any number of tasks."""

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import check, dedup
from data_prep.hashes import hash_shard, near_pairs
from tests.helpers.builds import build, documents, write_imagefolder
from tests.helpers.corpus import encode
from vlgpt.errors import run_command
from vlgpt.processes import Share
from vlgpt.shards import ShardSet


def blobs(number: int) -> Image.Image:
    grid = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((240, 180), Image.Resampling.BICUBIC)


def make(folder: Path, pictures: list[tuple[str, bytes]]) -> Path:
    """A data set of (caption, file) pairs, three records per shard."""
    files = [(f"{number:03d}", data, {"text": text}) for number, (text, data) in enumerate(pictures)]
    source = write_imagefolder(folder.parent / f"{folder.name}-in", files)
    assert build("folder", source, folder, "--shard-size", 3, "--max-bad-fraction", 1) == 0
    return folder


def captions(folder: Path) -> list[str]:
    return [document.text for document in documents(folder)]


def png(number: int) -> bytes:
    return encode(blobs(number), "PNG")


def similar(number: int) -> bytes:
    return encode(blobs(number).resize((200, 150), Image.Resampling.BICUBIC), "JPEG", quality=85)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, Path]:
    first = [(f"a{n}", png(n)) for n in range(8)]
    first += [("a again", png(2)), ("a nearly", similar(3)), ("damaged", b"x"), ("in the test set", png(101))]
    second = [("b0", png(20)), ("b is a5", png(5)), ("b nearly test", similar(102)), ("b21", png(21))]
    evaluation = [(f"test {n}", png(n)) for n in (101, 102, 103)]
    return make(tmp_path / "a", first), make(tmp_path / "b", second), make(tmp_path / "test", evaluation)


def run(*arguments: object) -> int:
    return run_command(lambda: dedup.main([str(argument) for argument in arguments]))


def full_run(folders: tuple[Path, Path, Path], work: Path, *, num_tasks: int = 1) -> tuple[Path, Path]:
    first, second, evaluation = folders
    outputs = (work / "a", work / "b")
    for task in reversed(range(num_tasks)):
        assert run("hash", first, second, evaluation, "--task-index", task, "--num-tasks", num_tasks) == 0
    tasks = [("--task-index", task, "--num-tasks", num_tasks) for task in range(num_tasks)]
    for task in tasks:
        assert run("find", first, second, "--against", evaluation, "--work", work / "w", *task) == 0
    for folder, output in zip((first, second), outputs):
        for task in tasks:
            assert run("apply", folder, "--work", work / "w", "--output", output, *task) == 0
    return outputs


def test_duplicates_and_test_pictures_leave_and_are_counted(folders, tmp_path):
    first, second = full_run(folders, tmp_path / "one")
    assert captions(first) == [f"a{n}" for n in range(8)]
    assert captions(second) == ["b0", "b21"]
    assert ShardSet.open(first).manifest.dropped == {
        "filtered:contaminated": 1,
        "filtered:duplicate": 1,
        "filtered:near_duplicate": 1,
        "not_an_image": 1,
    }
    assert ShardSet.open(second).manifest.dropped == {"filtered:contaminated": 1, "filtered:duplicate": 1}
    for folder in (first, second):
        manifest = ShardSet.open(folder).manifest
        assert manifest.num_records == manifest.num_samples + sum(manifest.dropped.values())
        assert check.main([str(folder)]) == 0
    report = json.loads((tmp_path / "one" / "w" / "report.json").read_text())
    assert ["a / 011", "test / 000"] in report["contaminated_examples"]
    assert ["b / 002", "test / 001"] in report["contaminated_examples"]
    assert ["a / 009", "a / 003"] in report["near_duplicate_examples"]


def test_any_number_of_tasks_gives_the_same_bytes(folders, tmp_path):
    one = full_run(folders, tmp_path / "one")
    for folder in folders:
        shutil.rmtree(folder / "hashes")
    three = full_run(folders, tmp_path / "three", num_tasks=3)
    for whole, parts in zip(one, three):
        assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
            p.name: p.read_bytes() for p in parts.iterdir()
        }


def test_a_second_run_does_nothing(folders, tmp_path, capsys):
    outputs = full_run(folders, tmp_path / "one")
    times = {
        path: path.stat().st_mtime_ns
        for output in outputs
        for path in output.iterdir()
        if path.suffix == ".tar"
    }
    full_run(folders, tmp_path / "one")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "0 shards hashed" in capsys.readouterr().err


@pytest.mark.parametrize("max_distance", [0, 1, 3, 6])
@pytest.mark.parametrize("num_tasks", [1, 4])
def test_near_pairs_are_exactly_those_of_a_full_comparison(max_distance, num_tasks):
    generator = np.random.default_rng(max_distance)
    values = generator.integers(0, 2**64, 60, dtype=np.uint64)
    for _ in range(6):  # families of values a few bits apart
        flips = np.uint64(1) << generator.integers(0, 64, 40, dtype=np.uint64)
        values = np.concatenate([values, generator.choice(values, 40) ^ flips])
    values = np.unique(values)
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(values)), 2)
        if bin(int(values[i] ^ values[j])).count("1") <= max_distance
    ]
    parts = [
        near_pairs(values, max_distance=max_distance, share=Share(t, num_tasks)) for t in range(num_tasks)
    ]
    found = np.unique(np.concatenate(parts), axis=0)
    assert [tuple(pair) for pair in found.tolist()] == expected
    assert max_distance == 0 or expected


def test_a_document_leaves_only_when_all_its_pictures_are_duplicates(tmp_path):
    from vlgpt.document import Document, ImagePart, TextPart
    from vlgpt.shards import ShardWriter, write_manifest

    pages = [("x", [1, 2]), ("half new", [2, 3]), ("all old", [3, 1]), ("one of the test", [4, 9])]
    folder = tmp_path / "pages"
    folder.mkdir()
    writer = ShardWriter(folder, 0)
    for name, pictures in pages:
        parts = tuple(part for number in range(2) for part in (ImagePart(number), TextPart(name)))
        writer.add(Document(name, "s", parts), [("png", png(number)) for number in pictures])
    for text in ("same words", "same words", "other words"):
        writer.add(Document(text, "s", (TextPart(text),)), [])
    writer.close()
    write_manifest(folder, name="pages", licence="", versions={}, build={}, num_shards=1)
    evaluation = make(tmp_path / "test", [("t", png(9))])
    assert run("hash", folder, evaluation) == 0
    assert run("find", folder, "--against", evaluation, "--work", tmp_path / "w") == 0
    assert run("apply", folder, "--work", tmp_path / "w", "--output", tmp_path / "out") == 0
    shards = ShardSet.open(tmp_path / "out")
    assert [document.id for document in documents(shards)] == ["x", "half new", "same words", "other words"]
    assert shards.manifest.dropped == {"filtered:contaminated": 1, "filtered:duplicate": 2}


def test_captions_of_one_picture_stay_when_only_evaluation_pictures_are_to_leave(folders, tmp_path):
    first, _, evaluation = folders
    work, output = tmp_path / "w", tmp_path / "kept"
    assert run("hash", first, evaluation) == 0
    assert run("find", first, "--against", evaluation, "--only-against", "--work", work) == 0
    assert run("apply", first, "--work", work, "--output", output) == 0
    assert captions(output) == [*(f"a{n}" for n in range(8)), "a again", "a nearly"]
    assert ShardSet.open(output).manifest.dropped == {"filtered:contaminated": 1, "not_an_image": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("find", "A", "--work", "W", "--only-against"), "--only-against compares with nothing"),
        (("find", "A", "--work", "W"), "has no hashes; run python -m data_prep.dedup hash"),
        (("find", "A"), "find needs --work"),
        (("apply", "A", "--work", "W", "--output", "O"), "holds no verdicts"),
        (("apply", "A", "B", "--work", "W", "--output", "O"), "apply takes one DIR"),
        (("hash", "A", "--task-index", "2"), "--task-index must be between 0 and 0"),
    ],
)
def test_wrong_use_is_one_line(folders, tmp_path, capsys, arguments, message):
    places = {"A": folders[0], "B": folders[1], "W": tmp_path / "w", "O": tmp_path / "o"}
    assert run(*(places.get(argument, argument) for argument in arguments)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_images_that_cannot_be_decoded_are_near_nothing(tmp_path):
    tar = tmp_path / "foreign" / "00000.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as file:
        for number in range(4):
            for suffix, data in (("jpg", png(0)[:60] + bytes([number]) * 200), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    shards = ShardSet.open(tar.parent)
    hashes = hash_shard(shards, 0)
    assert len(hashes) == 4
    assert len(near_pairs(np.unique(hashes.phash), max_distance=4)) == 0 and len(np.unique(hashes.phash)) == 4
