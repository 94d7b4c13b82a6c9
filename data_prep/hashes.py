"""Hashes of every image of a data set, and the search for equal and nearly equal ones.

Only arrays of hashes are compared, no pixels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_prep.arrays import load_arrays, save_arrays
from data_prep.images import perceptual_hash
from vlgpt.errors import UserError
from vlgpt.images import BadImage, decode_image
from vlgpt.processes import WHOLE, Share
from vlgpt.shards import BadSample, ShardSet

IMAGE, TEXT = 0, 1


@dataclass
class Hashes:
    """One row per image, and one per document without images (the hash of its text)."""

    shard: np.ndarray  # (n,) int32
    sample: np.ndarray  # (n,) int32
    kind: np.ndarray  # (n,) uint8, IMAGE or TEXT
    sha: np.ndarray  # (n, 2) uint64, the first half of the original's sha256
    phash: np.ndarray  # (n,) uint64, 0 for text

    def __len__(self) -> int:
        return len(self.shard)

    @staticmethod
    def concatenate(parts: list[Hashes]) -> Hashes:
        """All rows, in order."""
        no_rows = np.zeros(0, np.int32)
        empty = Hashes(
            no_rows, no_rows, np.zeros(0, np.uint8), np.zeros((0, 2), np.uint64), np.zeros(0, np.uint64)
        )
        names = [field.name for field in fields(Hashes)]
        return Hashes(*(np.concatenate([getattr(part, name) for part in (empty, *parts)]) for name in names))


def hash_shard(shards: ShardSet, shard: int) -> Hashes:
    """Hashes of one shard: those that the build stored with the original files, else those of the stored images."""
    rows: list[tuple[int, int, bytes, int]] = []
    for sample in range(shards.shards[shard].num_samples):
        try:
            read = shards.read(shard, sample)
        except BadSample as error:
            raise UserError(f"{shards.folder.where}: {error}; {shards.repair}") from error
        if not read.images:
            rows.append((sample, TEXT, hashlib.sha256(read.document.text.encode()).digest(), 0))
        stored = read.document.info.get("images", [{}] * len(read.images))
        for data, info in zip(read.images, stored):
            digest = bytes.fromhex(info["sha256"]) if "sha256" in info else hashlib.sha256(data).digest()
            rows.append((sample, IMAGE, digest, int(info["phash"], 16) if "phash" in info else _phash(data)))
    # 128 bits are enough: among 10^9 images, two different ones have an equal half with a chance of 10^-21.
    halves = np.frombuffer(b"".join(row[2][:16] for row in rows), np.uint64).reshape(-1, 2)
    return Hashes(
        shard=np.full(len(rows), shard, np.int32),
        sample=np.array([row[0] for row in rows], np.int32),
        kind=np.array([row[1] for row in rows], np.uint8),
        sha=halves,
        phash=np.array([row[3] for row in rows], np.uint64),
    )


def _phash(data: bytes) -> int:
    try:
        return perceptual_hash(decode_image(data))
    except BadImage:
        # a constant would make all broken images near duplicates of each other; 64 bits of a digest are near nothing
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def hashes_path(folder: Path, name: str) -> Path:
    """Where the hashes of a shard are stored."""
    return folder / "hashes" / f"{name}.npz"


def store_hashes(folder: Path, name: str, hashes: Hashes, *, tar_sha256: str) -> None:
    """Write atomically, with the hash of the tar they belong to."""
    columns = {field.name: getattr(hashes, field.name) for field in fields(Hashes)}
    save_arrays(hashes_path(folder, name), tar_sha256=tar_sha256, **columns)


def load_hashes(folder: Path, name: str, *, tar_sha256: str) -> Hashes | None:
    """None when they are missing or belong to another tar."""
    columns = load_arrays(hashes_path(folder, name), tar_sha256=tar_sha256)
    if columns is None:
        return None
    return Hashes(**{field.name: columns[field.name] for field in fields(Hashes)})


def first_equal(hashes: Hashes) -> np.ndarray:
    """The first row with the same kind and sha256. -> (n,) int64"""
    order = np.lexsort((np.arange(len(hashes)), hashes.sha[:, 1], hashes.sha[:, 0], hashes.kind))
    ordered = np.column_stack([hashes.sha[order], hashes.kind[order].astype(np.uint64)])
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def near_pairs(values: np.ndarray, *, max_distance: int, share: Share = WHOLE) -> np.ndarray:
    """Pairs of positions in `values` (U,) uint64, all different, at most `max_distance` bits apart. -> (pairs, 2) int64

    Two such values agree in at least one of `max_distance + 1` bands of their bits, so only values with an equal band
    are compared. Tasks share the work by the band's value; together they find every pair, some of them more than once.
    """
    found = []
    # Pigeonholes, as in multi-index hashing (Norouzi et al. 2012). At distance 3 a band has 16 bits, so evenly spread
    # hashes cost about 4 x U^2 / 2^17 comparisons instead of U^2 / 2.
    for band in range(max_distance + 1):
        low, high = (64 * (band + offset) // (max_distance + 1) for offset in (0, 1))
        key = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        mine = np.flatnonzero(key % np.uint64(share.step) == share.first)
        mine = mine[np.argsort(key[mine], kind="stable")]
        key = key[mine]
        active = np.arange(len(mine))
        # Each value with the next of its bucket, then the one after: no list of pairs to compare is held.
        for step in range(1, len(mine)):
            active = active[active + step < len(mine)]
            # equal keys lie together, so a value whose bucket has ended stays out
            active = active[key[active] == key[active + step]]
            if not len(active):
                break
            first, second = mine[active], mine[active + step]
            is_near = np.bitwise_count(values[first] ^ values[second]) <= max_distance
            found.append(np.column_stack([first[is_near], second[is_near]]))
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    return np.unique(np.sort(pairs, axis=1), axis=0)
