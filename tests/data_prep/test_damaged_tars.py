"""A damaged download through the whole build: every good pair is written, every other is counted with its reason."""

import tarfile
from pathlib import Path

import pytest

from tests.helpers.builds import build, documents
from tests.helpers.corpus import picture
from tests.helpers.damaged_download import write_download
from tests.helpers.tars import add, add_special
from vlgpt.shards import ShardSet


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
