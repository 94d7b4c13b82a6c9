"""Our loader beside the libraries that people use, on the same tars with the same decoder, in one run.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--samples 2000] [--rounds 3] [--only webdataset ...]
    OMP_NUM_THREADS=1 python benchmarks/loader.py --against OTHER_CHECKOUT [--rounds 5]

Prints samples per CPU-second of finished batches (decode, resize to 224, crop, batch of 32) and of raw reads, the time
to the first batch, then what only ours has: planning for 1,024 ranks over 100,000 shards, padding shares, memory over
50,000 samples. Every contender runs in a process of its own, `rounds` times in turns, and the best round counts: a busy
machine disturbs all alike. Peers that are not installed are named and left out.

`--against` compares this checkout with another one where training meets the loader: two worker processes, steps of 1 to
256 micro-batches whose targets are counted first, pixels ready in [-1, 1]; and what the loader adds to the trainer's
process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, os.environ.get("VLGPT_CHECKOUT", str(Path(__file__).resolve().parent.parent)))
from benchmarks.loader_contenders import BATCH, CONTENDERS, write_tars

HERE = Path(__file__).resolve().parent.parent
SIZE_PX = 224


def decode_reference(picture: bytes, caption: bytes) -> tuple[np.ndarray, str]:
    """What every contender does with a sample."""
    from vlgpt.images import read_square

    return read_square(picture, size_px=SIZE_PX, decoder="pillow"), caption.decode()


def measure(name: str, folder: Path, *, mode: str, num_samples: int) -> dict[str, float]:
    """One contender in this process: seconds to the first item, samples per CPU-second after it, memory."""
    import torch

    torch.set_num_threads(1)
    start_s = time.perf_counter()
    stream = CONTENDERS[name][1](folder, decode_reference if mode == "full" else None)
    next(stream)
    first_s = time.perf_counter() - start_s
    size = BATCH if mode == "full" else 1
    for _ in islice(stream, 200 // size):
        pass
    before_s, count = time.process_time(), num_samples // size
    if (found := sum(1 for _ in islice(stream, count))) != count:
        raise RuntimeError(f"{name} ended after {found} of {count}")
    cpu_s = time.process_time() - before_s
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"per_cpu_s": count * size / cpu_s, "first_s": first_s, "memory_mb": memory_mb}


def run_apart(
    name: str, folder: Path, *, mode: str, num_samples: int, checkout: Path = HERE
) -> dict[str, float] | str:
    """`measure` in a new process; what went wrong, in one line, when it fails."""
    command = [sys.executable, __file__, "--measure", name, mode, str(folder), "--samples", str(num_samples)]
    environment = {
        **os.environ,
        "VLGPT_CHECKOUT": str(checkout),
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1][:100]
    return json.loads(done.stdout.strip().splitlines()[-1])


def is_installed(module: str) -> bool:
    """Whether a module, also one inside a package, can be imported; it is not imported here."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compare(folder: Path, names: Sequence[str], *, num_samples: int, rounds: int) -> dict[str, Any]:
    """Best of `rounds` of every contender, in turns."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in names:
            for mode, count in (("full", num_samples), ("raw", 10 * num_samples)):
                found = run_apart(name, folder, mode=mode, num_samples=count)
                row = best.setdefault(name, {})
                if isinstance(found, str):
                    row["error"] = found
                    continue
                row[mode] = max(row.get(mode, 0.0), found["per_cpu_s"])
                if mode == "full":
                    row["first_s"] = min(row.get("first_s", 1e9), found["first_s"])
                    row["memory_mb"] = found["memory_mb"]
    return best


def print_comparison(best: dict[str, Any]) -> None:
    """Print each contender's best round: batches and raw samples per CPU-second, start-up seconds, memory in MB."""
    peers = {name: row for name, row in best.items() if not name.startswith("vlgpt")}
    top = max((row.get("full", 0.0) for row in peers.values()), default=0.0)
    print(
        f"{'':30s} {'batches/CPU-s':>14s} {'x best peer':>12s} {'raw/CPU-s':>10s} {'first s':>8s} {'RSS MB':>7s}"
    )
    for name, row in sorted(best.items(), key=lambda item: -item[1].get("full", 0.0)):
        if "full" not in row:
            print(f"{name:30s} {row.get('error', '')}")
            continue
        ratio = f"{row['full'] / top:.2f}" if top else "-"
        numbers = f"{row['full']:14.0f} {ratio:>12s} {row.get('raw', 0):10.0f} {row['first_s']:8.2f}"
        print(f"{name:30s} {numbers} {row['memory_mb']:7.0f}")
    if "vlgpt" in best and "webdataset" in best and "raw" in best["webdataset"]:
        print(f"raw read: {best['vlgpt']['raw'] / best['webdataset']['raw']:.1f} x webdataset")


# --- two checkouts side by side

ACCUMULATIONS = (1, 16, 256)


def measure_steps(decoder: str, folder: Path, *, accumulation: int, num_samples: int) -> dict[str, float]:
    """Steps of a trainer that does nothing: images per second and per CPU-second of all processes; what it holds."""
    import torch

    from vlgpt.batch import to_device
    from vlgpt.data.loader import Loader
    from vlgpt.settings import DataSettings, SourceSettings

    torch.set_num_threads(1)
    source = SourceSettings(name="tars", path=str(folder))
    settings = DataSettings(sources=(source,), pixels=True, decoder=decoder, num_workers=2)  # type: ignore[arg-type]
    loader = Loader(settings, kind="conditions", micro_batch=BATCH, count_targets=lambda batch: {"x": 1.0})
    batches = iter(loader)
    before = held_now()
    held = dict.fromkeys(before, 0.0)

    def step() -> None:
        loader.targets(accumulation)
        for number, batch in enumerate(islice(batches, accumulation)):
            if number % 64 == 0:
                held.update({name: max(held[name], now - before[name]) for name, now in held_now().items()})
            to_device(batch, "cpu", torch.float32)
        loader.advance(accumulation)

    step()
    pids = [os.getpid(), *worker_pids(loader)]
    before_s, before_cpu_s = time.perf_counter(), sum(map(cpu_seconds, pids))
    num_steps = -(-num_samples // (BATCH * accumulation))
    for _ in range(num_steps):
        step()
    wall_s, cpu_s = time.perf_counter() - before_s, sum(map(cpu_seconds, pids)) - before_cpu_s
    loader.close()
    num_images = num_steps * accumulation * BATCH
    return {"per_s": num_images / wall_s, "per_cpu_s": num_images / cpu_s, **held}


def worker_pids(loader: Any) -> list[int]:
    """Process ids of the loader's workers."""
    return [worker.process.pid for worker in loader._source._workers]


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def held_now() -> dict[str, float]:
    """Open descriptors, mapped files of /dev/shm (in memory only once they are read) and memory of this process."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    shm_mb = sum(end - start for start, end in ranges) / 1e6
    memory_mb = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    return {"descriptors": len(os.listdir("/proc/self/fd")), "shm_mb": shm_mb, "memory_mb": memory_mb}


def compare_checkouts(folder: Path, other: Path, *, num_samples: int, rounds: int) -> None:
    """Both in turns, the best round of each; memory and descriptors are the most of all rounds."""
    print(
        f"{'decoder, micro-batches':24s} {'':6s} {'images/s':>9s} {'per CPU-s':>10s} {'+files':>6s} {'+shm MB':>7s} "
        f"{'+RSS MB':>7s}"
    )
    for decoder in ("pillow", "fast"):
        for accumulation in ACCUMULATIONS:
            best: dict[str, dict[str, float]] = {"other": {}, "this": {}}
            for _ in range(rounds):
                for name, checkout in (("other", other), ("this", HERE)):
                    found = run_apart(
                        f"{decoder},{accumulation}",
                        folder,
                        mode="steps",
                        num_samples=num_samples,
                        checkout=checkout,
                    )
                    if isinstance(found, str):
                        raise RuntimeError(f"{checkout}: {found}")
                    row = best[name]
                    row.update({key: max(row.get(key, 0.0), value) for key, value in found.items()})
            for name, row in best.items():
                print(
                    f"{f'{decoder}, {accumulation}':24s} {name:6s} {row['per_s']:9.0f} {row['per_cpu_s']:10.0f} "
                    f"{row['descriptors']:6.0f} {row['shm_mb']:7.0f} {row['memory_mb']:7.0f}",
                    flush=True,
                )


# --- what only ours has


def plan_at_scale() -> None:
    """1,024 ranks with 8 workers each, 100,000 shards: any of them plans its first batch of a far position."""
    from vlgpt.data.mixture import Mixture, SourceOrder

    rng = np.random.default_rng(0)
    counts = {name: rng.integers(5_000, 10_001, 100_000) for name in ("pairs", "pages")}
    tracemalloc.start()
    for rank, window in ((0, 0), (517, 70_000), (1023, 190_000)):
        before_s = time.process_time()
        orders = [SourceOrder(name, seed=1, counts=c, shuffle_shards=16) for name, c in counts.items()]
        slots = Mixture(orders, seed=1, weights=np.array([0.5, 0.5])).slots(window)
        own = slots.sample[rank % 4096 :: 1024]
        cpu_s, peak = time.process_time() - before_s, tracemalloc.get_traced_memory()[1]
        print(
            f"rank {rank:4d}, window {window:6d}: {cpu_s:.2f} s, peak {peak / 2**20:.0f} MB, {len(own)} samples"
        )
    tracemalloc.stop()


def padding_shares() -> None:
    """Packed against one sequence per row, for lengths as of LAION captions and MMC4 pages, 512 positions."""
    from vlgpt.data.packing import best_fit

    rng = np.random.default_rng(0)
    pairs = np.clip(rng.lognormal(2.9, 0.6, 4096), 3, 300).astype(np.int64) + 36
    pages = np.minimum(rng.lognormal(6.3, 0.7, 4096).astype(np.int64), 512)
    print(f"{'mixture':28s} {'packed':>8s} {'one per row':>12s} {'planning ms':>12s}")
    for name, lengths in {
        "pairs": pairs,
        "pairs 1 : 1 pages": np.concatenate([pairs[:2048], pages[:2048]]),
        "pages": pages,
    }.items():
        before_s = time.process_time()
        rows = int(best_fit(lengths, capacity=512).max()) + 1
        planning_ms = 1000 * (time.process_time() - before_s)
        packed, plain = 1 - lengths.sum() / (512 * rows), 1 - lengths.mean() / 512
        print(f"{name:28s} {100 * packed:7.2f}% {100 * plain:11.1f}% {planning_ms:12.1f}")


def memory_growth(folder: Path, *, num_samples: int = 50_000) -> None:
    """Resident memory of the main process and a worker over many samples, small images."""
    from vlgpt.data.loader import Loader
    from vlgpt.settings import DataSettings, SourceSettings

    source = SourceSettings(name="tars", path=str(folder))
    settings = DataSettings(
        sources=(source,), pixels=True, decoder="fast", image_size_px=32, num_workers=1, prefetch_batches=2
    )
    loader = Loader(settings, kind="conditions", micro_batch=BATCH)
    batches = iter(loader)
    sizes = []
    for _ in range(11):
        for _ in islice(batches, num_samples // BATCH // 11):
            loader.advance(1)
        pids = [os.getpid(), *worker_pids(loader)]
        sizes.append(sum(resident_mb(pid) for pid in pids if pid))
    loader.close()
    growth = sizes[-1] - sizes[0]
    print(f"memory over {num_samples} samples: {sizes[0]:.0f} -> {sizes[-1]:.0f} MB ({growth:+.1f})")


def resident_mb(pid: int) -> float:
    """Memory that a process needs: anonymous and shared pages, the latter divided among their users."""
    # Pages of files (libraries, tars) are left out: they come and go with other processes.
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def main() -> None:
    """Command line: measures every contender in a process of its own and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000, help="samples measured per contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare this checkout with another")
    parser.add_argument("--measure", nargs=3, metavar=("NAME", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, mode, folder = arguments.measure
        if mode == "steps":
            decoder, accumulation = name.split(",")
            found = measure_steps(
                decoder, Path(folder), accumulation=int(accumulation), num_samples=arguments.samples
            )
        else:
            found = measure(name, Path(folder), mode=mode, num_samples=arguments.samples)
        print(json.dumps(found))
        return
    if arguments.against is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "tars"
            write_tars(folder, num_tars=20, num_samples=2000)
            other = arguments.against.resolve()
            compare_checkouts(folder, other, num_samples=arguments.samples, rounds=arguments.rounds)
        return
    wanted = arguments.only or list(CONTENDERS)
    names = [name for name in wanted if is_installed(CONTENDERS[name][0])]
    if missing := [name for name in wanted if name not in names]:
        print(f"not installed, left out: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tars"
        write_tars(folder, num_tars=20, num_samples=2000)
        print_comparison(compare(folder, names, num_samples=arguments.samples, rounds=arguments.rounds))
        print()
        plan_at_scale()
        print()
        padding_shares()
        print()
        memory_growth(folder)


if __name__ == "__main__":
    main()
