"""Laws of bad days: nothing good is lost, everything bad is counted by its reason, and a dead or stuck
worker is named.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlgpt.images
from tests.helpers.damaged_download import write_download
from tests.helpers.small_data import make_tokenizer, page, pair, picture, write_dataset
from tests.helpers.tars import add
from vlgpt.data.buffers import Buffers
from vlgpt.data.loader import Loader
from vlgpt.data.tally import TooManyBadSamples
from vlgpt.data.workers import DataStalled
from vlgpt.document import Document
from vlgpt.errors import UserError
from vlgpt.images import decode_image
from vlgpt.seeds import generator
from vlgpt.settings import DataSettings, SourceSettings

TOKENIZER = make_tokenizer()
SIZE_PX = 8


def settings(*folders: Path, **options: Any) -> DataSettings:
    sources = tuple(SourceSettings(name=folder.name, path=str(folder)) for folder in folders)
    chosen: dict[str, Any] = {
        "pixels": True,
        "image_size_px": SIZE_PX,
        "num_workers": 0,
        "sequence_length": 64,
    }
    return DataSettings(sources=sources, **{**chosen, **options})


def conditions(chosen: DataSettings, **options: Any) -> Loader:
    return Loader(chosen, kind="conditions", **{"micro_batch": 32, **options})


def packed(chosen: DataSettings, **options: Any) -> Loader:
    return Loader(chosen, kind="packed", **{"micro_batch": 4, "tokenizer": TOKENIZER, **options})


def noise_jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = generator("noise", number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# --- the malformed corpus of foreign tars


def test_a_corpus_of_damaged_foreign_tars_loses_nothing_good_and_counts_the_rest(tmp_path: Path) -> None:
    write_download(tmp_path / "corpus", has_table=False)
    quarantine = tmp_path / "bad.jsonl"
    loader = conditions(settings(tmp_path / "corpus", num_workers=2), quarantine=quarantine, is_one_pass=True)
    batches = list(loader)
    good = Counter(
        name for b in batches for name, is_valid in zip(b.documents, b.is_valid.tolist()) if is_valid
    )
    whole = 700 - 25 + 57 + 62
    assert len(good) == whole == 794
    assert set(good.values()) == {1}
    found = loader.statistics()
    assert found["bad"] == {"corpus": {"not_an_image": 5, "text_not_utf8": 5, "truncated": 10}}
    assert found["skipped"]["corpus"]["no_caption"] == 5
    assert found["skipped"]["corpus"]["duplicate"] == 5
    assert found["skipped"]["corpus"]["truncated_tar"] >= 1
    assert found["skipped"]["corpus"]["empty_tar"] == 1
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == Counter(found["bad"]["corpus"])
    loader.close()


# --- our own shards, damaged after the manifest was sealed


def damage(folder: Path) -> None:
    """One shard gone, one cut, one byte flipped in each of three samples of another."""
    (folder / "00001.tar").unlink()
    os.truncate(folder / "00002.tar", 512 * 40)
    tar = bytearray((folder / "00003.tar").read_bytes())
    with tarfile.open(folder / "00003.tar") as archive:
        images = [m for m in archive.getmembers() if m.name.endswith(".png")]
    for number in (3, 7, 11):
        tar[images[number].offset_data + 60] ^= 1
    (folder / "00003.tar").write_bytes(tar)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust") / "pairs"
    return write_dataset(folder, [pair(n) for n in range(120)], shard_sizes=[30] * 4, tokenizer=TOKENIZER)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_the_manifest_promised_and_is_not_there_is_counted(pairs: Path, tmp_path: Path) -> None:
    broken = copy_of(pairs, tmp_path / "pairs")
    damage(broken)
    left_in_cut = (512 * 40 // 512) // 4  # a pair takes four blocks of the tar
    loader = conditions(settings(broken), is_one_pass=True)
    num_good = sum(int(batch.is_valid.sum()) for batch in loader)
    found = loader.statistics()["bad"]["pairs"]
    assert found == {"checksum": 3, "unreadable_shard": 30, "truncated_shard": 30 - left_in_cut}
    assert num_good == 120 - sum(found.values())


@pytest.mark.parametrize("kind", ["packed", "conditions"])
def test_a_bad_sample_shifts_no_other(pairs: Path, tmp_path: Path, kind: str) -> None:
    broken = copy_of(pairs, tmp_path / "pairs")
    damage(broken)

    def batches(folder: Path) -> list[Any]:
        chosen = settings(folder, max_bad_fraction=1.0)
        return list(islice(packed(chosen) if kind == "packed" else conditions(chosen), 12))

    lost = 0
    for whole, partial in zip(batches(pairs), batches(broken)):
        if kind == "packed":
            for row, kept in zip(whole.documents, partial.documents):
                rest = iter(row)
                assert all(name in rest for name in kept)  # the same order with holes
                lost += len(row) - len(kept)
            partial.validate()
        else:
            masked = ~partial.is_valid
            assert [n for n, m in zip(whole.documents, masked) if not m] == [
                n for n in partial.documents if n
            ]
            assert not partial.pixels[masked].any()
            lost += int(masked.sum())
    assert lost > 20


def test_a_row_whose_samples_are_all_bad_is_padding(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    write_dataset(
        folder,
        [pair(n) for n in range(4)],
        shard_sizes=[4],
        tokenizer=TOKENIZER,
        make_picture=lambda number: ("png", b"nothing"),
    )
    batch = next(iter(packed(settings(folder, max_bad_fraction=1.0))))
    assert batch.images is None
    assert not batch.segment_ids.any()
    assert not batch.is_target.any()


# --- enough is enough


def with_bad_pictures(folder: Path, num_samples: int, bad: set[int]) -> Path:
    return write_dataset(
        folder,
        [pair(n) for n in range(num_samples)],
        shard_sizes=[num_samples],
        make_picture=lambda number: ("png", b"nothing") if number in bad else picture(number),
    )


def test_too_many_bad_samples_stop_the_run_with_the_numbers(tmp_path: Path) -> None:
    folder = with_bad_pictures(tmp_path / "worse", 200, set(range(0, 200, 10)))
    loader = conditions(settings(folder, max_bad_fraction=0.001))
    with pytest.raises(
        TooManyBadSamples, match=r"'worse': 11 bad .*max_bad_fraction 0\.001 allows 10 .*not_an_image"
    ):
        list(islice(loader, 100))
    assert loader.statistics()["bad"]["worse"]["not_an_image"] == 11


def test_a_hundred_bad_samples_in_a_row_stop_the_run(tmp_path: Path) -> None:
    folder = with_bad_pictures(tmp_path / "dead", 200, set(range(200)))
    with pytest.raises(TooManyBadSamples, match="101 bad samples in a row"):
        list(islice(conditions(settings(folder, max_bad_fraction=1.0)), 100))


def test_a_few_bad_samples_are_tolerated_for_ever_and_quarantined_once(tmp_path: Path) -> None:
    folder = with_bad_pictures(tmp_path / "fine", 400, {5})
    quarantine = tmp_path / "q" / "bad.jsonl"
    loader = conditions(settings(folder, max_bad_fraction=0.005), quarantine=quarantine)
    list(islice(loader, 100))
    assert loader.statistics()["bad"]["fine"]["not_an_image"] >= 7
    (line,) = quarantine.read_text().splitlines()
    assert json.loads(line) == {
        "source": "fine",
        "shard": "00000",
        "key": "0000000005",
        "reason": "not_an_image",
        "rank": 0,
    }


# --- workers that die or hang


KILLER = picture(200)[1]


@pytest.fixture
def killer(tmp_path: Path) -> Path:
    """Sample 17 kills its decoder: the marked picture stands in for one that crashes a C library."""
    documents = [pair(n) for n in range(40)]
    return write_dataset(
        tmp_path / "killer",
        documents,
        shard_sizes=[20, 20],
        tokenizer=TOKENIZER,
        make_picture=lambda number: ("png", KILLER) if number == 17 else picture(number),
    )


def crash(data: bytes, **options: Any) -> Image.Image:
    if data == KILLER:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_image(data, **options)


def test_a_worker_killed_by_a_sample_is_replaced_and_the_sample_put_aside(
    killer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [b.documents for b in islice(conditions(settings(killer), micro_batch=4), 30)]
    monkeypatch.setattr(vlgpt.images, "decode_image", crash)
    quarantine = tmp_path / "bad.jsonl"
    loader = conditions(settings(killer, num_workers=2), micro_batch=4, quarantine=quarantine)
    found = [b.documents for b in islice(loader, 30)]
    assert [tuple(n if n != "pair-17" else "" for n in names) for names in wanted] == found
    assert loader.statistics()["bad"] == {"killer": {"killed_worker": sum("" in names for names in found)}}
    assert json.loads(quarantine.read_text())["key"] == "0000000017"
    assert "in crash" in caplog.text  # the stack at which the worker died
    loader.close()


def test_a_worker_killed_from_outside_is_replaced_without_loss(killer: Path) -> None:
    wanted = [b.documents for b in islice(packed(settings(killer)), 60)]
    loader = packed(settings(killer, num_workers=2, prefetch_batches=4))
    batches = iter(loader)
    found = [next(batches).documents for _ in range(10)]
    worker = loader._source._workers[1].process  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGTERM)  # what a scheduler sends to all processes: ignored
    found += [next(batches).documents for _ in range(10)]
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGKILL)
    found += [next(batches).documents for _ in range(40)]
    assert not worker.is_alive()
    names, kept = ([n for rows in batches for row in rows for n in row] for batches in (wanted, found))
    assert len(Counter(names) - Counter(kept)) <= 1  # the sample that was being read is under suspicion
    assert not Counter(kept) - Counter(names)
    loader.close()


def test_nothing_is_lost_with_a_worker_that_is_killed_while_it_writes(
    killer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is half full of something else; what was counted before stays counted, once."""
    put, killed, writes = (
        Buffers.put,
        tmp_path / "killed",
        count(1),
    )  # each worker has its own copy of the count

    def killed_once(self: Buffers, number: int, value: Any) -> Any:
        if next(writes) == 5 and not killed.exists():
            killed.touch()
            start = number * self._size
            self._memory[start : start + self._size // 2] = b"\xff" * (self._size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return put(self, number, value)

    def num_valid(batch: Any) -> dict[str, float]:
        return {"valid": float(batch.is_valid.sum()), "brightness": float(len("".join(batch.captions)))}

    wanted = list(islice(conditions(settings(killer), micro_batch=4), 40))
    monkeypatch.setattr(Buffers, "put", killed_once)
    loader = conditions(settings(killer, num_workers=2), micro_batch=4, count_targets=num_valid)
    batches, found, counted = iter(loader), [], []
    for _ in range(5):
        counted += loader.targets(8)
        found += [next(batches) for _ in range(8)]
    assert killed.exists()
    assert loader.statistics()["bad"] == {}
    assert [batch.documents for batch in wanted] == [batch.documents for batch in found]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(wanted, found, strict=True))
    assert counted == [num_valid(batch) for batch in wanted]
    loader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_takes_its_loss_away_but_not_its_targets_from_the_count(
    pairs: Path, tmp_path: Path, num_workers: int
) -> None:
    """So what the other samples of a step weigh does not depend on it."""
    broken = copy_of(pairs, tmp_path / "pairs")
    damage(broken)

    def count(batch: Any) -> dict[str, float]:
        return {"text": float(batch.is_target.sum())}

    def counted(folder: Path) -> tuple[list[Any], float]:
        chosen = settings(folder, max_bad_fraction=1.0, num_workers=num_workers)
        loader = packed(chosen, count_targets=count)
        batches = iter(loader)
        found = loader.targets(12), sum(count(next(batches))["text"] for _ in range(12))
        loader.close()
        return found

    whole, partial = counted(pairs), counted(broken)
    assert sum(targets["text"] for targets in whole[0]) == whole[1]
    assert sum(targets["text"] for targets in partial[0]) > partial[1]
    # the images with a flipped bit are still counted; what could not even be read as text is not
    assert sum(targets["text"] for targets in partial[0]) < whole[1]


def test_a_worker_that_dies_twice_ends_the_run(killer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_crash(data: bytes, **options: Any) -> Image.Image:
        os.kill(os.getpid(), signal.SIGKILL)
        return decode_image(data, **options)

    monkeypatch.setattr(vlgpt.images, "decode_image", always_crash)
    loader = conditions(settings(killer, num_workers=1))
    with pytest.raises(RuntimeError, match="died again"):
        next(iter(loader))
    loader.close()


def test_a_stuck_worker_is_noticed_and_its_stacks_are_logged(
    killer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sleep_for_ever(data: bytes, **options: Any) -> Image.Image:
        time.sleep(1000 if data == KILLER else 0)
        return decode_image(data, **options)

    monkeypatch.setattr(vlgpt.images, "decode_image", sleep_for_ever)
    loader = conditions(settings(killer, num_workers=2, watchdog_s=3.0))
    before = time.monotonic()
    with pytest.raises(DataStalled, match="watchdog_s"):
        list(islice(loader, 100))
    assert "sleep_for_ever" in caplog.text
    loader.close()
    assert time.monotonic() - before < 60


def test_an_error_in_a_worker_is_raised_in_the_main_process(
    killer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, **options: Any) -> Image.Image:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(vlgpt.images, "decode_image", broken)
    for num_workers, error in ((0, ZeroDivisionError), (1, RuntimeError)):
        loader = conditions(settings(killer, num_workers=num_workers))
        with pytest.raises(error, match="a bug of ours"):
            next(iter(loader))
        loader.close()


def test_a_users_error_in_a_worker_stays_a_users_error(tmp_path: Path) -> None:
    write_dataset(tmp_path / "plain", [pair(0)], shard_sizes=[1])
    loader = packed(settings(tmp_path / "plain", num_workers=1))
    with pytest.raises(UserError, match=r"data_prep\.index"):
        next(iter(loader))
    loader.close()


ORPHAN = """
import os, sys, signal
from vlgpt.data.loader import Loader
from vlgpt.settings import DataSettings, SourceSettings
source = SourceSettings(name="s", path=sys.argv[1])
settings = DataSettings(sources=(source,), pixels=True, image_size_px=8, num_workers=2)
loader = Loader(settings, kind="conditions", micro_batch=2)
next(iter(loader))
print(*[worker.process.pid for worker in loader._source._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


STUCK = ORPHAN.replace(
    "next(iter(loader))",
    """import threading, time, vlgpt.images
vlgpt.images.decode_image = lambda *rest, **more: time.sleep(1000)
threading.Thread(target=lambda: next(iter(loader)), daemon=True).start()
time.sleep(2)""",
)


@pytest.mark.parametrize("script", [ORPHAN, STUCK], ids=["waiting", "stuck in a decoder"])
def test_workers_do_not_outlive_a_killed_trainer(killer: Path, script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, str(killer)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 200
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


UNCLOSED = ORPHAN.replace("os.kill(os.getpid(), signal.SIGKILL)", "")


def test_a_trainer_that_forgets_to_close_ends_nevertheless(killer: Path) -> None:
    command = [sys.executable, "-c", UNCLOSED, str(killer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not any(is_running(int(pid)) for pid in done.stdout.split())


def test_closing_ends_all_workers(killer: Path) -> None:
    loader = conditions(settings(killer, num_workers=3))
    next(iter(loader))
    processes = [worker.process for worker in loader._source._workers]  # type: ignore[union-attr]
    loader.close()
    assert not any(process.is_alive() for process in processes)


# --- nothing in the data is ever executed


def payloads(canary: Path) -> dict[str, bytes]:
    """Files that execute `touch canary` when something unpickles or runs them."""
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (f"touch {canary}",)

    pickled = pickle.dumps(Touch())
    array = io.BytesIO()
    np.save(array, np.array([Touch()], dtype=object), allow_pickle=True)
    state = io.BytesIO()
    torch.save({"x": Touch()}, state)
    return {
        "pyd": pickled,
        "pkl": pickled,
        "pickle": pickled,
        "pth": state.getvalue(),
        "pt": state.getvalue(),
        "npy": array.getvalue(),
        "npz": array.getvalue(),
        "sh": f"touch {canary}".encode(),
        "py": f"import os; os.system('touch {canary}')".encode(),
    }


def test_no_member_of_a_tar_is_ever_executed(tmp_path: Path) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "evil"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number, (suffix, data) in enumerate(payloads(canary).items()):
            add(archive, f"{number:04d}.jpg", noise_jpeg(number))
            add(archive, f"{number:04d}.txt", f"$(touch {canary}); `touch {canary}`".encode())
            add(archive, f"{number:04d}.{suffix}", data)
        for number, (_, data) in enumerate(payloads(canary).items(), start=100):
            add(archive, f"{number:04d}.jpg", data)
            add(archive, f"{number:04d}.txt", b"the picture is the payload")
    loader = conditions(settings(folder), is_one_pass=True)
    assert sum(int(batch.is_valid.sum()) for batch in loader) == 9
    assert loader.statistics()["bad"]["evil"] == {"not_an_image": 9}
    assert not canary.exists()


def test_no_path_index_or_feature_is_ever_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for path in (f"pipe:touch {canary}", f"pipe:touch {canary} |", f"$(touch {canary})"):
        source = SourceSettings(name="s", path=path)
        with pytest.raises((FileNotFoundError, UserError)):
            conditions(DataSettings(sources=(source,), pixels=True))
    folder = write_dataset(tmp_path / "d", [page(0)], shard_sizes=[1], tokenizer=TOKENIZER)
    (folder / "00000.idx").write_bytes(payloads(canary)["npy"])
    with pytest.raises(UserError, match="index"):
        next(iter(packed(settings(folder))))
    assert not canary.exists()


def test_a_document_full_of_markup_stays_text(tmp_path: Path) -> None:
    from vlgpt.document import ImagePart, TextPart

    text = "[IMG] w1 [/IMG]"
    folder = write_dataset(
        tmp_path / "m",
        [Document("d", "s", (ImagePart(0), TextPart(text)))],
        shard_sizes=[1],
        tokenizer=TOKENIZER,
    )
    batch = next(iter(packed(settings(folder), micro_batch=1)))
    segment = batch.token_ids[0][batch.segment_ids[0] == 1].tolist()
    assert segment.count(TOKENIZER.begin_image_id) == 1
    assert segment.count(TOKENIZER.end_image_id) == 1
