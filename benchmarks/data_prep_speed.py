"""Speed of data_prep against what it replaces: images built and checked per CPU-second, memory over 100,000 records.

The build is compared with plain Pillow + webdataset and with img2dataset's own operations.

    python benchmarks/data_prep_speed.py --folder /tmp/speed [--count 200] [--rounds 3] [--memory-records 100000]

Everything reads the same JPEG files and writes tars of images with shorter side 256, quality 95. The contestants take
turns, so that a busy machine slows all of them; the best round of each counts, in CPU time. "img2dataset's operations"
are those of its Resizer for `keep_ratio`, `only_if_bigger`, quality 95: cv2.imdecode, cv2.resize with INTER_AREA,
cv2.imencode and the sha256 that it stores by default (its downloading is left out), written with webdataset.ShardWriter
as it does.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data_prep.build import build
from data_prep.check import check_folder
from data_prep.filters import FilterSettings
from data_prep.images import ImageSettings
from data_prep.job import BuildJob, ShardBuilder, claim_folder
from data_prep.sources import Record, Source
from data_prep.sources.images import ImagesSource
from vlgpt.document import Document, ImagePart, TextPart

SIZE_PX = 256
QUALITY = 95
SIZES = ((640, 480), (1024, 768), (2048, 1536))
RIVAL = "img2dataset's operations"


def make_pictures(folder: Path, *, count: int, width: int, height: int) -> list[Path]:
    """Photograph-like JPEGs: smooth structure plus fine noise. Made once."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            generator = np.random.default_rng(number)
            coarse = generator.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
            image = np.asarray(
                Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16
            )
            noisy = image + generator.normal(0, 6, image.shape)
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)
    return sorted(folder.glob("*.jpg"))[:count]


def job_of(output: Path, source: Source, *, shard_size: int, **pictures: bool) -> BuildJob:
    """The settings of one build of `source` into `output`; `pictures` are fields of ImageSettings."""
    return BuildJob(
        folder=output,
        source=source,
        source_name="speed",
        source_options={},
        inputs=(),
        images=ImageSettings(**pictures),
        filters=FilterSettings(),
        shard_size=shard_size,
    )


def ours(files: list[Path], output: Path, **pictures: bool) -> None:
    """All that a build does: filters, sha256 of original and tar, index, fsync, verification, manifest."""
    source = ImagesSource([files[0].parent])
    build(job_of(output, source, shard_size=1000, **pictures), name="speed", num_workers=0)


def write_webdataset(files: list[Path], output: Path, operation: Callable[[bytes], bytes]) -> None:
    """Write the files through `operation` into tars of 1,000 samples, with webdataset's writer."""
    output.mkdir(parents=True)
    import webdataset  # a peer, no dependency of ours

    with webdataset.ShardWriter(f"file:{output}/%05d.tar", maxcount=1000, verbose=0) as writer:
        for number, path in enumerate(files):
            data = operation(path.read_bytes())
            writer.write(
                {"__key__": f"{number:09d}", "jpg": data, "json": json.dumps({"id": path.name}).encode()}
            )


def pillow(data: bytes) -> bytes:
    """A JPEG with shorter side SIZE_PX, resized by Pillow with bicubic interpolation."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE_PX / min(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def img2dataset(data: bytes) -> bytes:
    """A JPEG with shorter side SIZE_PX, made by the steps of img2dataset: hash, OpenCV decode, area resize, encode."""
    hashlib.sha256(data).hexdigest()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    scale = SIZE_PX / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", resized, [int(cv2.IMWRITE_JPEG_QUALITY), QUALITY])[1].tobytes()


CONTESTANTS: dict[str, Callable[[list[Path], Path], None]] = {
    "data_prep": lambda files, output: ours(files, output),
    "data_prep --fast": lambda files, output: ours(files, output, fast=True),
    "data_prep --fast --no-perceptual-hash": lambda files, output: ours(
        files, output, fast=True, perceptual_hash=False
    ),
    "Pillow + webdataset": lambda files, output: write_webdataset(files, output, pillow),
    RIVAL: lambda files, output: write_webdataset(files, output, img2dataset),
}


def speeds(folder: Path, width: int, height: int, *, count: int, rounds: int) -> dict[str, float]:
    """Best images per CPU-second of every contestant."""
    files = make_pictures(folder / f"{width}x{height}", count=count, width=width, height=height)
    best = dict.fromkeys(CONTESTANTS, 0.0)
    for _ in range(rounds):
        for name, contestant in CONTESTANTS.items():
            output = folder / "out"
            shutil.rmtree(output, ignore_errors=True)
            start = time.process_time()
            contestant(files, output)
            best[name] = max(best[name], len(files) / (time.process_time() - start))
    return best


def check_speed(folder: Path, *, count: int, rounds: int) -> float:
    """Best MB per CPU-second of a full check."""
    output = folder / "check"
    if not output.exists():
        ours(make_pictures(folder / "640x480", count=count, width=640, height=480), output, fast=True)
    num_bytes = sum(path.stat().st_size for path in output.glob("*.tar"))
    repeats = max(1, (50 << 20) // num_bytes)
    best = 0.0
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            assert not list(check_folder(output))
        best = max(best, num_bytes * repeats / (time.process_time() - start) / 1e6)
    return best


class PairSource:
    """Any number of small pairs of which no two are equal (a JPEG may end with anything)."""

    licence = "none"

    def __init__(self, num_records: int):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        self._num_records, self._picture = num_records, buffer.getvalue()

    def __len__(self) -> int:
        return self._num_records

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """Records `start` to `stop`, each with the one JPEG; the number behind its end makes every hash differ."""
        for number in range(start, stop):
            document = Document(str(number), "stream", (ImagePart(0), TextPart(f"picture {number}")))
            yield Record(document, (self._picture + number.to_bytes(8, "big"),))


def builder_of(output: Path, source: Source, *, shard_size: int) -> ShardBuilder:
    """What a worker process of the build holds."""
    job = job_of(output, source, shard_size=shard_size)
    claim_folder(job)
    return ShardBuilder(job)


def resident_mb() -> float:
    """Memory of this process in MB (10^6 bytes), from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def memory(folder: Path, *, num_records: int) -> list[float]:
    """Resident MB after each tenth of the records."""
    output = folder / "memory"
    shutil.rmtree(output, ignore_errors=True)
    builder = builder_of(output, PairSource(num_records), shard_size=max(1, num_records // 50))
    measured = []
    for shard in range(50):
        builder.build(shard)
        for path in output.glob(f"{shard:05d}.*"):
            path.unlink()
        if shard % 5 == 4:
            measured.append(resident_mb())
    return measured


def main() -> None:
    """Command line: prints images per CPU-second by image size, then the memory over many records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-records", type=int, default=100_000, help="0 leaves the memory part out")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    names = ("pillow", "opencv-python-headless", "simplejpeg", "webdataset")
    print(f"Python {platform.python_version()},", ", ".join(f"{n} {metadata.version(n)}" for n in names))
    tables = {}
    for width, height in SIZES:
        count = max(20, arguments.count * 640 * 480 // (width * height))
        tables[f"{width} x {height}"] = speeds(
            arguments.folder, width, height, count=count, rounds=arguments.rounds
        )
    print(f"\n| pictures per CPU-second | {' | '.join(tables)} |\n|---{'|---' * len(tables)}|")
    for name in CONTESTANTS:
        cells = [f"{best[name]:.0f} ({best[name] / best[RIVAL]:.2f} x)" for best in tables.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    megabytes = check_speed(arguments.folder, count=arguments.count, rounds=arguments.rounds)
    print(f"\ndata_prep.check: {megabytes:.0f} MB per CPU-second")
    if arguments.memory_records:
        measured = memory(arguments.folder, num_records=arguments.memory_records)
        shown = ", ".join(f"{value:.0f}" for value in measured)
        growth = max(measured[1:]) - measured[0]
        print(f"resident MB after each tenth of {arguments.memory_records} records: {shown} ({growth:+.1f})")


if __name__ == "__main__":
    main()
