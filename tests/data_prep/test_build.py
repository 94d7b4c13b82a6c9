"""Laws of the build: same bytes for any split of the work, nothing done twice, nothing lost, settings never
mixed.
"""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_prep.build import build as run_job
from data_prep.images import ImageSettings
from tests.helpers.builds import build, documents, write_imagefolder
from tests.helpers.corpus import encode, picture
from tests.helpers.processes import environment
from vlgpt.images import decode_image
from vlgpt.shards import ShardSet
from vlgpt.shards.manifest import read_report

NUM_RECORDS = 23


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imagefolder of 23 pictures, number 4 of them missing and 9 damaged."""
    files = []
    for number in range(NUM_RECORDS):
        data = picture(number, "PNG" if number % 2 else "JPEG", width=300 + number)
        data = None if number == 4 else data[:100] if number == 9 else data
        info = {"text": f"picture {number}", "title": "other", "similarity": number / 100}
        files.append((f"{number}.img", data, info))
    return write_imagefolder(tmp_path / "in", files)


def run(folder: Path, output: Path, *options: str, workers: int = 0) -> int:
    settings = ("--shard-size", 5, "--name", "toy", "--max-bad-fraction", 0.5, "--num-workers", workers)
    return build("folder", folder, output, *settings, *options)


def content(output: Path) -> dict[str, bytes]:
    assert not [path for path in output.iterdir() if path.name.startswith(".")], "left-over temporary files"
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def test_input_is_written_plus_dropped_and_shards_are_fixed_ranges(folder, tmp_path):
    assert run(folder, tmp_path / "out") == 0
    shards = ShardSet.open(tmp_path / "out")
    assert [record.num_samples for record in shards.shards] == [4, 4, 5, 5, 3]
    assert shards.manifest.dropped == {"missing_file": 1, "truncated": 1}
    texts = [f"picture {n}" for n in range(NUM_RECORDS) if n not in (4, 9)]
    assert [document.text for document in documents(shards)] == texts
    assert shards.read(1, 3).key == "0000100003"
    assert shards.read(0, 0).document.info["images"][0]["width"] == 300


@pytest.mark.parametrize(("num_tasks", "workers"), [(1, 1), (1, 3), (4, 0), (7, 1)])
def test_any_number_of_tasks_and_workers_gives_the_same_bytes(folder, tmp_path, num_tasks, workers):
    assert run(folder, tmp_path / "whole") == 0
    order = list(range(num_tasks))[::-1]
    for number, task in enumerate([*order, order[0]]):  # one task runs twice
        options = ("--task-index", str(task), "--num-tasks", str(num_tasks))
        assert run(folder, tmp_path / "parts", *options, workers=workers) == 0
        assert (tmp_path / "parts" / "_SUCCESS").exists() == (number >= num_tasks - 1)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_rerun_writes_nothing(folder, tmp_path):
    assert run(folder, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(folder, tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["00001.tar", "00001.json", "00001.idx", "_SUCCESS", "manifest.json"])
def test_what_is_lost_is_made_again_and_nothing_else(folder, tmp_path, name):
    assert run(folder, tmp_path / "out") == 0
    before = content(tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "_SUCCESS").unlink(missing_ok=True)
    assert run(folder, tmp_path / "out") == 0
    assert content(tmp_path / "out") == before
    remade = {
        path.name for path in (tmp_path / "out").glob("*.tar") if times[path.name] != path.stat().st_mtime_ns
    }
    assert remade == ({"00001.tar"} if name.startswith("00001") else set())


def test_a_cut_or_flipped_tar_is_found_before_sealing(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out") == 0
    before = content(tmp_path / "out")
    (tmp_path / "out" / "_SUCCESS").unlink()
    tar = tmp_path / "out" / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:-10240])
    assert run(folder, tmp_path / "out") == 0
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "_SUCCESS").unlink()
    flipped = bytearray(tar.read_bytes())
    flipped[3000] ^= 1
    tar.write_bytes(flipped)
    assert run(folder, tmp_path / "out") == 2
    assert "shard 00002 of 5: the tar's sha256" in capsys.readouterr().err


def test_retry_failed_brings_back_repaired_records_and_equals_a_fresh_build(folder, tmp_path):
    assert run(folder, tmp_path / "out") == 0
    tars = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    (folder / "4.img").write_bytes(picture(4))
    (folder / "0.img").unlink()  # a good record is copied from its shard, not read again
    assert run(folder, tmp_path / "out") == 0
    assert ShardSet.open(tmp_path / "out").num_samples == 21, "only --retry-failed reads again"
    assert run(folder, tmp_path / "out", "--retry-failed") == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.dropped == {"truncated": 1}
    remade = {
        path.name for path in (tmp_path / "out").glob("*.tar") if tars[path.name] != path.stat().st_mtime_ns
    }
    assert remade == {"00000.tar", "00001.tar"}
    (folder / "0.img").write_bytes(picture(0, width=300))
    assert run(folder, tmp_path / "fresh") == 0
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--size-px", "64"), "pictures.size_px = 256, this run has 64"),
        (("--shard-size", "6"), "shard_size = 5, this run has 6"),
        (("--text-column", "title"), "options.text_column = 'text', this run has 'title'"),
        (("--min-similarity", "0.1"), "filters.min_similarity = None, this run has 0.1"),
    ],
)
def test_a_folder_is_never_built_with_two_settings(folder, tmp_path, capsys, options, name):
    assert run(folder, tmp_path / "out") == 0
    (tmp_path / "out" / "_SUCCESS").unlink()
    assert run(folder, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error and "another --output" in error


def test_every_path_of_the_settings_is_absolute(folder, tmp_path, monkeypatch, capsys):
    """The same words in another folder mean other files."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.txt").write_text("nothing\n")
    monkeypatch.chdir(tmp_path / "here")
    assert run(folder, tmp_path / "out", "--exclude", "list.txt") == 0
    path = tmp_path / "out/build.json"
    assert json.loads(path.read_text())["filters"]["exclude"] == str(tmp_path / "here/list.txt")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["build"]["filters"]["exclude"] == str(tmp_path / "here/list.txt")
    path.write_text(path.read_text().replace(str(tmp_path / "here/list.txt"), "list.txt"))
    assert run(folder, tmp_path / "out", "--exclude", "list.txt") == 0, "begun when paths were kept as given"
    monkeypatch.chdir(tmp_path / "there")
    path.write_text(path.read_text().replace('"list.txt"', json.dumps(str(tmp_path / "here/list.txt"))))
    assert run(folder, tmp_path / "out", "--exclude", "list.txt") == 2
    assert "filters.exclude" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task-index", "3", "--num-tasks", "3"), "--task-index must be between 0 and 2, found 3"),
        (("--shard-size", "0"), "--shard-size must be between 1 and 100000, found 0"),
        (("--num-workers", "-1"), "--num-workers must be between 0 and 1024, found -1"),
        (("--quality", "101"), "--quality"),
        (("--opt-out", "/nowhere/list"), "/nowhere/list cannot be read"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(folder, tmp_path, capsys, options, message):
    assert run(folder, tmp_path / "out", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0]


def test_a_missing_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert f"error: --input {tmp_path / 'nowhere'} does not exist\n" in capsys.readouterr().err


def test_pictures_are_reduced_never_enlarged_and_keep_their_ratio(tmp_path):
    (tmp_path / "in").mkdir()
    sizes = {"large": (900, 600), "tall": (100, 800), "small": (40, 30)}
    for name, (width, height) in sizes.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(picture(1, "PNG", width=width, height=height))
    assert build("images", tmp_path / "in", tmp_path / "out", "--size-px", 60, "--image-format", "png") == 0
    shards = ShardSet.open(tmp_path / "out")
    found = {}
    for sample in range(3):
        read = shards.read(0, sample)
        found[read.document.id] = decode_image(read.images[0]).size
    assert found == {"large.png": (90, 60), "tall.png": (60, 480), "small.png": (40, 30)}


@pytest.mark.parametrize(
    "size", [(300, 270), (400, 330), (640, 480), (1024, 768), (2048, 1536), (3000, 1100)]
)
def test_fast_and_reference_paths_agree(size):
    """Smooth colours, noise and hard edges, as photographs have: 2 of 255 on average."""
    from data_prep.images import _prepare

    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number in range(12):
        x, y = (int(generator.integers(side)) for side in size)
        draw.rectangle((x, y, x + size[0] // 8, y + size[1] // 6), fill=(20 * number, 250 - 20 * number, 90))
    pixels = np.asarray(image) + generator.normal(0, 5, (size[1], size[0], 3))
    data = encode(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), "JPEG", quality=92)
    for file in (data, encode(Image.open(io.BytesIO(data)), "PNG")):
        stored = [
            np.asarray(decode_image(_prepare(file, "", ImageSettings(fast=fast)).data)).astype(float)
            for fast in (False, True)
        ]
        assert np.abs(stored[0] - stored[1]).mean() <= 2


@pytest.mark.parametrize("is_optional", [True, False])
def test_only_optional_images_may_leave_their_document(tmp_path, is_optional):
    from data_prep.filters import FilterSettings
    from data_prep.job import BuildJob
    from data_prep.sources import Record
    from vlgpt.document import Document, ImagePart, TextPart

    good = picture(1)

    class Pages:
        licence, is_image_optional = "none", is_optional

        def __len__(self):
            return 2

        def read(self, start, stop):
            parts = (TextPart("a"), ImagePart(0), TextPart("b"), ImagePart(1), TextPart("c"), ImagePart(2))
            for images in ((good, b"", good), (b"", b"x", b""))[start:stop]:
                yield Record(Document("p", "pages", parts, {"image_urls": ["u0", "u1", "u2"]}), images)

    job = BuildJob(
        folder=tmp_path,
        source=Pages(),
        source_name="pages",
        source_options={},
        inputs=(),
        images=ImageSettings(),
        filters=FilterSettings(),
        shard_size=10,
    )
    manifest = run_job(job, name="pages", num_workers=0, max_bad_fraction=1.0)
    if not is_optional:  # an edit without its target is no edit
        assert manifest.num_samples == 0 and manifest.dropped == {"empty": 2}
        return
    document = ShardSet.open(tmp_path).read(0, 0).document
    assert document.parts == (TextPart("a"), ImagePart(0), TextPart("b"), TextPart("c"), ImagePart(1))
    assert document.info["image_urls"] == ["u0", "u2"]
    assert manifest.dropped == {"empty": 1} and manifest.dropped_images == {"empty": 1}
    assert read_report(tmp_path, 0).dropped_images == {"empty": (0,)}


def test_token_lengths_are_stored_when_a_tokenizer_is_given(folder, tmp_path, word_tokenizer):
    assert run(folder, tmp_path / "out", "--tokenizer", str(word_tokenizer)) == 0
    from vlgpt.tokens import DocumentTokenizer

    tokenizer = DocumentTokenizer.load(word_tokenizer)
    shards = ShardSet.open(tmp_path / "out")
    index = shards.index(0)
    assert index.tokenizer == tokenizer.fingerprint
    lengths = [len(tokenizer.encode_text(shards.read(0, sample).document.text)) for sample in range(4)]
    assert index.part_tokens[~index.part_is_image].tolist() == lengths
    assert run(folder, tmp_path / "plain") == 0
    for shard in range(5):  # the tokenizer changes the index only
        name = f"{shard:05d}.tar"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_every_registered_source_has_flags_and_a_description():
    from data_prep.build import _parser
    from data_prep.sources import SOURCES, source_class
    from vlgpt.options import signature_options

    for name in SOURCES:
        source = source_class(name)
        assert source.__doc__, name
        help_text = _parser(source).format_help()
        flags = [f"--{option.name.replace('_', '-')}" for option in signature_options(source)]
        assert all(flag in help_text for flag in flags), name
    assert len(list(itertools.chain(SOURCES))) >= 12


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat_over_100_000_records(tmp_path):
    """In a process of its own, no picture twice: after the first tenth, the rest may add 20 MB at most."""
    script = tmp_path / "run.py"
    script.write_text(MEMORY_SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=environment())
    assert result.returncode == 0, result.stderr
    growth = int(result.stdout)
    assert growth < 20_000, f"{growth} kB"


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from benchmarks.data_prep_speed import Stream, builder_of
builder = builder_of(Path(sys.argv[1]), Stream(100_000), shard_size=2000)
for shard in range(50):
    builder.build(shard)
    if shard == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
