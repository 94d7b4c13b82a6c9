"""A damaged download through the whole build: every good pair is written, every other is counted with its reason."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.builds import build, documents
from tests.helpers.corpus import picture
from tests.helpers.source_files import asset, write_table
from tests.helpers.tars import add, add_special
from vlgpt.shards import ShardSet

KINDS = {"half": 10, "garbage": 5, "no_text": 5, "latin": 5, "twice": 5, "JPG": 5}


def write_download(folder: Path, *, has_table: bool) -> set[str]:
    """Ten tars of 100 pairs: one cut inside a picture, one between two pairs, one empty, and 35 odd pairs in the
    rest; the captions of what can be saved.
    """
    folder.mkdir()
    places = np.random.default_rng(0).choice(700, size=sum(KINDS.values()), replace=False).tolist()
    odd = dict(zip(places, np.repeat(list(KINDS), list(KINDS.values())).tolist()))
    for shard in range(10):
        keys = [f"{shard:05d}{sample:04d}" for sample in range(100)]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for sample, key in enumerate(keys):
                write_pair(archive, key, odd.get(100 * shard + sample, ""), number=100 * shard + sample)
        if has_table:
            row = asset("img2dataset.json")
            rows = [row | {"key": key, "caption": f"caption {int(key)}"} for key in keys]
            write_table(folder / f"{shard:05d}.parquet", rows)
    os.truncate(folder / "00007.tar", picture_of(folder / "00007.tar", 57).offset_data + 100)
    os.truncate(folder / "00008.tar", picture_of(folder / "00008.tar", 62).offset)
    (folder / "00009.tar").write_bytes(b"")
    lost = {"half", "garbage"} | (set() if has_table else {"no_text", "latin"})
    saved = [n for n in range(700) if odd.get(n) not in lost] + list(range(700, 757)) + list(range(800, 862))
    return {f"caption {n // 100 * 10_000 + n % 100}" for n in saved}


def picture_of(tar: Path, number: int) -> tarfile.TarInfo:
    with tarfile.open(tar) as archive:
        return archive.getmembers()[2 * number]


def write_pair(archive: tarfile.TarFile, key: str, kind: str, *, number: int) -> None:
    data = picture(number)
    if kind == "half":
        data = data[: len(data) // 2]
    if kind == "garbage":
        data = b"<html>not found</html>"
    for _ in range(2 if kind == "twice" else 1):
        add(archive, f"{key}.{'JPG' if kind == 'JPG' else 'jpg'}", data)
        if kind != "no_text":
            add(archive, f"{key}.txt", b"caf\xe9" if kind == "latin" else f"caption {int(key)}".encode())


def built(folder: Path, output: Path) -> ShardSet:
    assert build("img2dataset", folder, output, "--shard-size", 300, "--max-bad-fraction", 0.5) == 0
    return ShardSet.open(output)


def captions(shards: ShardSet) -> list[str]:
    return [document.text for document in documents(shards)]


@pytest.mark.parametrize(
    ("has_table", "num_good", "dropped"),
    [
        (
            False,
            794,
            {
                "duplicate_key": 5,
                "no_caption": 5,
                "not_an_image": 5,
                "text_not_utf8": 5,
                "truncated": 10,
                "truncated_tar": 3,
            },
        ),
        (True, 804, {"not_an_image": 5, "truncated": 10, "truncated_tar": 181}),
    ],
    ids=["tars alone", "with tables"],
)
def test_a_damaged_download_loses_no_good_pair_and_counts_the_rest(tmp_path, has_table, num_good, dropped):
    """The tables know the captions and how many pairs there were; the tars alone know only that they were cut."""
    saved = write_download(tmp_path / "in", has_table=has_table)
    shards = built(tmp_path / "in", tmp_path / "out")
    assert shards.manifest.dropped == dropped
    found = captions(shards)
    assert len(found) == num_good and set(found) == saved


def test_hostile_tars_write_nothing_outside_and_allocate_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in ("../../outside", "/absolute", "café", "good"):
            add(archive, f"{name}.jpg", picture(1))
            add(archive, f"{name}.txt", f"text of {name}".encode())
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("node.jpg", tarfile.CHRTYPE),
        ):
            add_special(archive, name, kind)
        add(archive, "evil.pkl", b"cos\nsystem\n(S'touch x'\ntR.")
        add(archive, "huge.jpg", b"", claim=2 << 30)
    shards = built(folder, tmp_path / "out")
    assert captions(shards) == ["text of ../../outside", "text of /absolute", "text of café", "text of good"]
    assert shards.manifest.dropped == {"truncated_tar": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["a.tar"]
