"""The records of tests/assets/sources written out as the data sets lay them on disk, with real pictures."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.sources import Dropped, Record, source_class
from tests.helpers.processes import ROOT
from tests.helpers.tars import write_tar
from vlgpt.document import ImagePart

ASSETS = ROOT / "tests" / "assets" / "sources"


def asset(name: str):
    """A record as published."""
    return json.loads((ASSETS / name).read_text())


def picture(number: int, *, file_format: str = "JPEG") -> bytes:
    """A small picture; `number` can be read back from its colour with `number_of`."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (number * 20, 255 - number * 20, 40)).save(buffer, file_format, quality=95)
    return buffer.getvalue()


def number_of(data: bytes) -> int:
    """Which `picture` these bytes show."""
    with Image.open(io.BytesIO(data)) as image:
        return round(image.convert("RGB").getpixel((5, 5))[0] / 20)


def write_pictures(folder: Path, names: list[str]) -> None:
    """Picture 0, 1, ... under these names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def write_table(path: Path, rows: list[dict], *, rows_per_group: int = 2) -> Path:
    """A Parquet file with several row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group)
    return path


def write_download(
    folder: Path, urls: dict[str, bytes | None], *, has_table: bool = True, shard: int = 0
) -> Path:
    """What img2dataset writes for these URLs (None: the download failed)."""
    rows, members = [], {}
    for number, (url, data) in enumerate(urls.items()):
        key = f"{shard:05d}{number:04d}"
        status = "failed_to_download" if data is None else "success"
        row = asset("img2dataset.json") | {"url": url, "key": key, "status": status}
        rows.append(row)
        if data is not None:
            members |= {f"{key}.jpg": data, f"{key}.txt": row["caption"].encode()}
            members[f"{key}.json"] = json.dumps(row).encode()
    write_tar(folder / f"{shard:05d}.tar", members)
    if has_table:
        write_table(folder / f"{shard:05d}.parquet", rows)
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(rows)}))
    return folder


def open_source(name: str, *inputs: Path, **options):
    """The source as the command line makes it."""
    return source_class(name)(tuple(inputs), **options)


def read_all(source) -> list[Record | Dropped]:
    """All items; checks that any two pieces give the same as the whole."""
    whole = list(source.read(0, len(source)))
    assert len(whole) == len(source)
    for cut in range(len(whole) + 1):
        pieces = [*source.read(0, cut), *source.read(cut, len(whole))]
        assert list(map(describe, pieces)) == list(map(describe, whole))
    return whole


def describe(item: Record | Dropped):
    """Everything an item says, pictures opened."""
    if isinstance(item, Dropped):
        return item
    return item.document.to_record(), item.lost, [image_bytes(image) for image in item.images]


def image_bytes(opener) -> bytes:
    """Opens a picture as the build does."""
    if isinstance(opener, Path):
        return opener.read_bytes()
    return opener if isinstance(opener, bytes) else opener()


def shown(item: Record | Dropped) -> list:
    """The document in reading order: (role, text) or (role, number of the picture)."""
    if isinstance(item, Dropped):
        return [item.reason]
    numbers = [number_of(image_bytes(image)) for image in item.images]
    return [
        (part.role, numbers[part.index] if isinstance(part, ImagePart) else part.text)
        for part in item.document.parts
    ]
