"""Pictures per second of one core: data_prep.build against plain Pillow + webdataset and img2dataset's own
operations.

    python benchmarks/data_prep_speed.py --folder /tmp/speed [--count 200] [--rounds 3]

Everything reads the same JPEG files and writes tars of pictures with shorter side 256, quality 95. The
contestants take turns, so that a busy machine slows all of them; the best round counts. "img2dataset's
operations" are those of its Resizer for `keep_ratio`, `only_if_bigger`, quality 95: cv2.imdecode, cv2.resize
with INTER_AREA, cv2.imencode (its downloading is left out), written with webdataset.ShardWriter as it does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import webdataset
from PIL import Image

from data_prep.build import build
from data_prep.check import check_folder
from data_prep.filters import FilterSettings
from data_prep.job import Job
from data_prep.pictures import PictureSettings
from data_prep.sources.images import ImagesSource

SIZE_PX = 256
QUALITY = 95


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
    return sorted(folder.glob("*.jpg"))


def ours(files: list[Path], output: Path, *, fast: bool, perceptual_hash: bool) -> None:
    job = Job(
        folder=output,
        source=ImagesSource([files[0].parent]),
        source_name="images",
        source_options={},
        inputs=(files[0].parent,),
        pictures=PictureSettings(fast=fast, perceptual_hash=perceptual_hash),
        filters=FilterSettings(),
        shard_size=1000,
    )
    build(job, name="speed", num_workers=0)


def write_webdataset(files: list[Path], output: Path, operation: Callable[[bytes], bytes]) -> None:
    output.mkdir(parents=True)
    with webdataset.ShardWriter(f"file:{output}/%05d.tar", maxcount=1000, verbose=0) as writer:
        for number, path in enumerate(files):
            data = operation(path.read_bytes())
            writer.write(
                {"__key__": f"{number:09d}", "jpg": data, "json": json.dumps({"id": path.name}).encode()}
            )


def pillow(data: bytes) -> bytes:
    import io

    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE_PX / min(image.size)
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def img2dataset(data: bytes) -> bytes:
    """With the sha256 that it stores by default."""
    hashlib.sha256(data).hexdigest()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    scale = SIZE_PX / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", resized, [int(cv2.IMWRITE_JPEG_QUALITY), QUALITY])[1].tobytes()


CONTESTANTS: dict[str, Callable[[list[Path], Path], None]] = {
    "data_prep": lambda files, output: ours(files, output, fast=False, perceptual_hash=True),
    "data_prep --fast": lambda files, output: ours(files, output, fast=True, perceptual_hash=True),
    "data_prep --fast --no-perceptual-hash": lambda files, output: ours(
        files, output, fast=True, perceptual_hash=False
    ),
    "Pillow + webdataset": lambda files, output: write_webdataset(files, output, pillow),
    "img2dataset's operations": lambda files, output: write_webdataset(files, output, img2dataset),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    print(
        "| pictures | tool | pictures per CPU-second | against img2dataset's operations |\n|---|---|---|---|"
    )
    for width, height in ((640, 480), (1024, 768), (2048, 1536)):
        count = max(10, arguments.count * 640 * 480 // (width * height))
        files = make_pictures(arguments.folder / f"{width}x{height}", count=count, width=width, height=height)
        best = dict.fromkeys(CONTESTANTS, 0.0)
        for _ in range(arguments.rounds):
            for name, contestant in CONTESTANTS.items():
                output = arguments.folder / "out"
                shutil.rmtree(output, ignore_errors=True)
                start = time.process_time()
                contestant(files, output)
                best[name] = max(best[name], len(files) / (time.process_time() - start))
        for name, speed in best.items():
            ratio = speed / best["img2dataset's operations"]
            print(f"| {width} x {height} | {name} | {speed:.0f} | {ratio:.2f} |", flush=True)
    output = arguments.folder / "check"
    if not output.exists():
        big = make_pictures(arguments.folder / "640x480", count=arguments.count, width=640, height=480)
        ours(big, output, fast=True, perceptual_hash=False)
    num_bytes = sum(path.stat().st_size for path in output.glob("*.tar"))
    start = time.process_time()
    rounds = max(1, (100 << 20) // num_bytes)
    for _ in range(rounds):
        assert not list(check_folder(output))
    print(
        f"\ndata_prep.check: {num_bytes * rounds / (time.process_time() - start) / 1e6:.0f} MB per CPU-second"
    )


if __name__ == "__main__":
    main()
