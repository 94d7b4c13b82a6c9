"""How each library reads the same tars: raw samples, or finished batches of 32 made by the same decoder.

A contender is a function (folder, decode) -> endless iterator. `decode` maps (encoded image, caption) to what is
batched; None asks for raw samples. Each library is used as its own documentation does, in one process, shuffled as far
as it can shuffle a stream. Where a library cannot read tars, its own format is written from them first.
"""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 32
Decode = Callable[[bytes, bytes], tuple[np.ndarray, str]]
Stream = Iterator[Any]


def collate(samples: list[tuple[np.ndarray, str]]) -> tuple[torch.Tensor, list[str]]:
    """The batch that every contender ends with: (32, 3, H, W) float32 and captions."""
    from vlgpt.batch import to_pixels

    return to_pixels(np.stack([pixels for pixels, _ in samples])), [caption for _, caption in samples]


def in_batches(samples: Stream) -> Stream:
    """Finished batches of BATCH samples; only the last one of a finite stream is smaller."""
    while batch := list(itertools.islice(samples, BATCH)):
        yield collate(batch)


def tars_of(folder: Path) -> list[str]:
    """Paths of a folder's tars, sorted by name."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def vlgpt(folder: Path, decode: Decode | None, *, decoder: str = "pillow") -> Stream:
    """Ours, on foreign tars without manifest."""
    from vlgpt.batch import to_device
    from vlgpt.data.loader import Loader
    from vlgpt.settings import DataSettings, SourceSettings
    from vlgpt.shards import ShardSet

    if decode is None:
        shards = ShardSet.open(folder)
        places = [(i, j) for i, shard in enumerate(shards.shards) for j in range(shard.num_samples)]
        random.Random(0).shuffle(places)
        return (shards.read(i, j) for i, j in itertools.cycle(places))
    source = SourceSettings(name="tars", path=str(folder))
    settings = DataSettings(sources=(source,), pixels=True, decoder=decoder, num_workers=0)  # type: ignore[arg-type]
    return (to_device(batch, "cpu") for batch in Loader(settings, kind="conditions", micro_batch=BATCH))


def vlgpt_fast(folder: Path, decode: Decode | None) -> Stream:
    """Our loader with its fast image decoder."""
    return vlgpt(folder, decode, decoder="fast")


def webdataset(folder: Path, decode: Decode | None) -> Stream:
    """webdataset, with its usual shuffle of 20 shards and 200 samples."""
    import webdataset as wds

    stream = wds.WebDataset(tars_of(folder), shardshuffle=20).shuffle(200).to_tuple("jpg", "txt")
    endless = itertools.chain.from_iterable(itertools.repeat(stream))
    return endless if decode is None else in_batches(decode(*pair) for pair in endless)


class Indexed(torch.utils.data.Dataset):
    """A map-style dataset over an index of the tars: the fastest reader of ours, lent to the peers that have none."""

    def __init__(self, folder: Path, decode: Decode | None):
        from vlgpt.shards import ShardSet

        self.shards, self.decode = ShardSet.open(folder), decode
        sizes = [shard.num_samples for shard in self.shards.shards]
        self.places = [(i, j) for i, size in enumerate(sizes) for j in range(size)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> object:
        sample = self.shards.read(*self.places[int(i)])
        if self.decode is None:
            return sample
        return self.decode(sample.images[0], sample.document.text.encode())


def torchdata(folder: Path, decode: Decode | None) -> Stream:
    """torchdata's StatefulDataLoader over indexed tars, shuffled over the whole data set."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    options = {"batch_size": None} if decode is None else {"batch_size": BATCH, "collate_fn": collate}
    loader = StatefulDataLoader(Indexed(folder, decode), shuffle=True, num_workers=0, **options)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def hf_datasets(folder: Path, decode: Decode | None) -> Stream:
    """Hugging Face `datasets` in streaming mode, with a shuffle buffer of 200 samples."""
    import datasets

    datasets.disable_progress_bars()
    files = {"train": tars_of(folder)}
    stream = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    stream = stream.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=200)
    endless = itertools.chain.from_iterable(itertools.repeat(stream))
    if decode is None:
        return endless
    return in_batches(decode(row["jpg"]["bytes"], row["txt"].encode()) for row in endless)


def grain(folder: Path, decode: Decode | None) -> Stream:
    """Google's grain over indexed tars, shuffled over the whole data set, without read-ahead threads."""
    import grain.python as grain_python

    stream = grain_python.MapDataset.source(Indexed(folder, decode)).seed(0).shuffle().repeat()
    if decode is not None:
        stream = stream.batch(BATCH, batch_fn=collate)
    options = grain_python.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(stream.to_iter_dataset(read_options=options))


def mosaic(folder: Path, decode: Decode | None) -> Stream:
    """Reads its own format: shards of the same size, written once beside the tars."""
    import streaming

    local = folder / "mds"
    if not local.exists():
        columns = {"jpg": "bytes", "txt": "bytes"}
        with streaming.MDSWriter(out=str(local), columns=columns, size_limit=2 << 20) as writer:
            for jpg, txt in members(folder):
                writer.write({"jpg": jpg, "txt": txt})
    stream = streaming.StreamingDataset(local=str(local), shuffle=True, batch_size=BATCH)
    rows = itertools.chain.from_iterable(itertools.repeat(stream))
    if decode is None:
        return rows
    return in_batches(decode(row["jpg"], row["txt"]) for row in rows)


def energon(folder: Path, decode: Decode | None) -> Stream:
    """megatron-energon over a prepared copy of the tars."""
    import shutil
    import subprocess
    import sys

    from megatron import energon as library

    prepared = folder / "energon"
    if not prepared.exists():
        prepared.mkdir()
        for tar in tars_of(folder):
            shutil.copy(tar, prepared)
        command = [
            str(Path(sys.executable).parent / "energon"),
            "prepare",
            str(prepared),
            "--non-interactive",
        ]
        options = ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--force-overwrite"]
        subprocess.run([*command, *options], check=True, timeout=300, capture_output=True)
        crude = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (prepared / ".nv-meta" / "dataset.yaml").write_text(crude)

    @dataclass
    class Cooked(library.Sample):
        content: object

    @library.stateless
    def cook(sample: dict[str, Any]) -> Cooked:
        pair = sample["jpg"], sample["txt"].encode() if isinstance(sample["txt"], str) else sample["txt"]
        return Cooked(**library.basic_sample_keys(sample), content=pair if decode is None else decode(*pair))

    class Encoder(library.DefaultTaskEncoder):
        decoder = None
        cookers = (library.Cooker(cook),)

        def batch(self, samples: list[Cooked]) -> object:
            content = [sample.content for sample in samples]
            return content if decode is None else collate(content)

    workers = library.WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = library.get_train_dataset(
        str(prepared),
        batch_size=BATCH,
        shuffle_buffer_size=200,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
        worker_config=workers,
    )
    batches = iter(library.get_loader(data))
    return itertools.chain.from_iterable(batches) if decode is None else batches


def tarfile_stream(folder: Path, decode: Decode | None) -> Stream:
    """The standard library alone, in order."""
    endless = itertools.chain.from_iterable(members(folder) for _ in itertools.count())
    return endless if decode is None else in_batches(decode(*pair) for pair in endless)


def members(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """(image, caption) of every sample of every tar, in order."""
    for tar in tars_of(folder):
        with tarfile.open(tar) as archive:
            fields: dict[str, bytes] = {}
            for info in archive:
                file = archive.extractfile(info)
                fields[info.name.rpartition(".")[2]] = file.read() if file else b""
                if len(fields) == 2:
                    yield fields["jpg"], fields["txt"]
                    fields = {}


def write_tars(folder: Path, *, num_tars: int, num_samples: int) -> None:
    """JPEGs of 256 x 256 at quality 90, about 18 KB each, with a caption."""
    from PIL import Image

    folder.mkdir(parents=True)
    for tar in range(num_tars):
        with tarfile.open(folder / f"{tar:05d}.tar", "w") as archive:
            for sample in range(num_samples // num_tars):
                number = tar * (num_samples // num_tars) + sample
                rng = np.random.default_rng(number)
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC), np.float32)
                noisy = np.clip(smooth + rng.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
                for suffix, data in (
                    ("jpg", buffer.getvalue()),
                    ("txt", f"caption of picture {number}".encode()),
                ):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


CONTENDERS: dict[str, tuple[str, Callable[[Path, Decode | None], Stream]]] = {
    "vlgpt": ("vlgpt", vlgpt),
    "vlgpt fast": ("vlgpt", vlgpt_fast),
    "webdataset": ("webdataset", webdataset),
    "torchdata StatefulDataLoader": ("torchdata", torchdata),
    "HF datasets streaming": ("datasets", hf_datasets),
    "grain": ("grain", grain),
    "mosaicml-streaming": ("streaming", mosaic),
    "megatron-energon": ("megatron.energon", energon),
    "tarfile": ("tarfile", tarfile_stream),
}
