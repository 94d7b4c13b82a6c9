"""CLIP similarity: the worst picture with its best text, the same for any number of tasks; nothing else leaves."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import check, similarity
from tests.helpers.builds import documents
from tests.helpers.corpus import picture
from tests.helpers.tiny_clip import save_tiny_clip
from vlgpt.batch import to_pixels
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import run_command
from vlgpt.images import read_square
from vlgpt.models.encoders import load_clip
from vlgpt.shards import ShardSet, ShardWriter, write_manifest

PAGES = [
    (["red dog"], [1]),
    (["one number", "picture of a dog"], [2]),
    (["of one", "a picture"], [3, 4, 5]),
    ([], [6]),
    (["only words"], []),
    (["number"], [7, 8]),
]


class Words:
    """A tokenizer of one token per letter."""

    fingerprint = "letters"

    def encode_text(self, text: str, place: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of two documents and a dropped record each, with token lengths."""
    path = tmp_path / "data"
    path.mkdir()
    for shard in range(3):
        writer = ShardWriter(path, shard, first_record=3 * shard, tokenizer=Words())
        for number in (2 * shard, 2 * shard + 1):
            texts, pictures = PAGES[number]
            parts = (*map(TextPart, texts), *map(ImagePart, range(len(pictures))))
            writer.add(Document(f"d{number}", "s", parts), [("png", picture(n, "PNG")) for n in pictures])
        writer.drop("truncated")
        writer.close()
    build = {"tokenizer": Words.fingerprint}
    write_manifest(path, name="data", licence="", versions={}, build=build, num_shards=3)
    return path


def run(*arguments: object) -> int:
    return run_command(lambda: similarity.main([str(argument) for argument in arguments]))


def direct(clip: Path) -> list[float]:
    encoder = load_clip(str(clip))
    values = []
    with torch.no_grad():
        for texts, pictures in PAGES:
            if not pictures or not texts:
                values.append(float("nan") if pictures else float("inf"))
                continue
            words = torch.nn.functional.normalize(encoder.embed_texts(texts), dim=-1)
            worst = []
            for number in pictures:
                square = read_square(picture(number, "PNG"), size_px=24, decoder="pillow")
                image = torch.nn.functional.normalize(
                    encoder.embed_images(to_pixels(np.array(square)[None])), dim=-1
                )
                worst.append(max((image @ words.T)[0].tolist()))
            values.append(min(worst))
    return values


def scores(folder: Path) -> list[float]:
    records = ShardSet.open(folder).shards
    found = [similarity.ShardSimilarity.load(folder, r.name, tar_sha256=r.sha256) for r in records]
    return list(itertools.chain.from_iterable(part.values.tolist() for part in found))


def ids(folder: Path) -> list[str]:
    return [document.id for document in documents(folder)]


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_scores_are_those_of_the_encoder(folder, clip, num_tasks):
    for task in range(num_tasks):
        options = ("--task-index", task, "--num-tasks", num_tasks, "--batch-size", 2)
        assert run("score", folder, "--encoder", clip, *options) == 0
    np.testing.assert_allclose(scores(folder), direct(clip), atol=1e-5)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_only_what_lies_below_the_limit_leaves_and_token_lengths_stay(folder, clip, tmp_path, num_tasks):
    values = direct(clip)
    limit = float(np.median([value for value in values if np.isfinite(value)]))
    assert run("score", folder, "--encoder", clip) == 0
    for task in range(num_tasks):
        options = ("--task-index", task, "--num-tasks", num_tasks)
        assert run("apply", folder, "--min-similarity", limit, "--output", tmp_path / "out", *options) == 0
        assert (tmp_path / "out" / "_SUCCESS").exists() == (task == num_tasks - 1)
    wanted = [f"d{number}" for number, value in enumerate(values) if value >= limit]
    assert 2 <= len(wanted) <= 4 and ids(tmp_path / "out") == wanted
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest.dropped == {
        "filtered:no_similarity": 1,
        "filtered:similarity": 5 - len(wanted),
        "truncated": 3,
    }
    assert manifest.num_records == 9 and manifest.build["min_clip_similarity"]["limit"] == limit
    shards = ShardSet.open(tmp_path / "out")
    for number in range(3):
        index = shards.index(number)
        lengths = [len(text) for key in range(index.num_samples) for text in texts_of(shards, number, key)]
        assert index.tokenizer == "letters"
        assert index.part_tokens[~index.part_is_image].tolist() == lengths
    assert check.main([str(tmp_path / "out")]) == 0


def texts_of(shards: ShardSet, shard: int, sample: int) -> list[str]:
    return [part.text for part in shards.read(shard, sample).document.parts if isinstance(part, TextPart)]


def test_a_second_encoder_is_refused_and_a_second_run_scores_nothing(folder, clip, tmp_path, capsys):
    assert run("score", folder, "--encoder", clip) == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "similarity").iterdir()}
    assert run("score", folder, "--encoder", clip) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "similarity").iterdir()} == before
    assert "0 pictures scored" in capsys.readouterr().err
    other = save_tiny_clip(tmp_path / "other", seed=1)
    (folder / "similarity/00002.npz").unlink()
    assert run("score", folder, "--encoder", other) == 2
    assert "was scored by" in capsys.readouterr().err
    (folder / "similarity/00000.npz").unlink()
    assert run("apply", folder, "--min-similarity", 0, "--output", tmp_path / "o") == 2
    assert "has no similarities; run python -m data_prep.similarity score" in capsys.readouterr().err
    assert run("apply", folder, "--output", tmp_path / "o") == 2


def test_a_copy_with_another_limit_is_refused(folder, clip, tmp_path, capsys):
    assert run("score", folder, "--encoder", clip) == 0
    assert run("apply", folder, "--min-similarity", -1, "--output", tmp_path / "o") == 0
    assert run("apply", folder, "--min-similarity", 0.5, "--output", tmp_path / "o") == 2
    assert "holds another data set" in capsys.readouterr().err
    assert run("apply", folder, "--min-similarity", 0.5, "--output", folder) == 2


def test_a_document_at_the_limit_stays(folder, tmp_path):
    for record in ShardSet.open(folder).shards:
        values = np.array([0.25, 0.2499], np.float32)
        similarity.ShardSimilarity(values, "by hand", record.sha256).store(folder, record.name)
    assert run("apply", folder, "--min-similarity", 0.25, "--output", tmp_path / "o") == 0
    assert ids(tmp_path / "o") == ["d0", "d2", "d4"]
