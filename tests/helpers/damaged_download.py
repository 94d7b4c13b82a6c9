"""A download as it may end: tars of pairs, some of them cut, some of their pairs odd."""

import os
import tarfile
from pathlib import Path

import numpy as np

from tests.helpers.corpus import picture
from tests.helpers.source_files import asset, write_table
from tests.helpers.tars import add

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
