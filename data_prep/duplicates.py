"""Which documents of several data sets are duplicates, and which are in an evaluation set: pass 2 of data_prep.dedup.

Of equal images the first stays, in the order of the folders as given. A document leaves when all its images are
duplicates, or when any of them is in an evaluation set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arrays import load_arrays, save_arrays
from data_prep.hashes import IMAGE, Hashes, first_equal, load_hashes, near_pairs
from vlgpt.errors import UserError
from vlgpt.files import write_atomic
from vlgpt.processes import WHOLE, Share
from vlgpt.shards import ShardSet

REASONS = ("", "filtered:duplicate", "filtered:near_duplicate", "filtered:contaminated")
DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = 1, 2, 3
MAX_EXAMPLES = 50


@dataclass
class Corpus:
    """All hashes: evaluation sets first, then the training folders in order."""

    sets: list[ShardSet]
    num_protected: int
    """How many of the sets are evaluation sets."""
    hashes: Hashes
    owner: np.ndarray  # (n,) position in sets

    @property
    def is_protected(self) -> np.ndarray:
        return self.owner < self.num_protected

    def name(self, row: int) -> str:
        """`set / document id` of a row."""
        shards = self.sets[int(self.owner[row])]
        sample = shards.read(int(self.hashes.shard[row]), int(self.hashes.sample[row]), with_images=False)
        return f"{shards.name} / {sample.document.id}"


def load_corpus(folders: Sequence[Path], *, against: Sequence[Path] = ()) -> Corpus:
    """Raises UserError when a shard has not been hashed."""
    sets, parts, owners = [], [], []
    for number, folder in enumerate([*against, *folders]):
        shards = ShardSet.open(folder)
        sets.append(shards)
        for record in shards.shards:
            hashes = load_hashes(Path(shards.folder.where), record.name, tar_sha256=record.sha256)
            if hashes is None:
                raise UserError(
                    f"{folder}: shard {record.name} has no hashes; run python -m data_prep.dedup hash "
                    f"{folder}"
                )
            parts.append(hashes)
            owners.append(np.full(len(hashes), number, np.int32))
    owner = np.concatenate([np.zeros(0, np.int32), *owners])
    return Corpus(sets, len(against), Hashes.concatenate(parts), owner)


def judge(corpus: Corpus, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per row a position in REASONS and the earlier row that is the reason (-1 without). -> (n,) uint8, (n,) int64

    `pairs` are near pairs of the distinct perceptual hashes, as positions in their sorted list.
    """
    hashes, rows = corpus.hashes, np.arange(len(corpus.hashes))
    verdict, cause = np.zeros(len(rows), np.uint8), np.full(len(rows), -1, np.int64)
    values, first = distinct_hashes(hashes)
    # the earliest row that is near each distinct hash, itself included
    earliest = first.copy()
    np.minimum.at(earliest, pairs[:, 0], first[pairs[:, 1]])
    np.minimum.at(earliest, pairs[:, 1], first[pairs[:, 0]])
    images = np.flatnonzero(hashes.kind == IMAGE)
    near = np.full(len(rows), -1, np.int64)
    near[images] = earliest[np.searchsorted(values, hashes.phash[images])]
    equal = first_equal(hashes)
    for found, reason in ((near, NEAR_DUPLICATE), (equal, DUPLICATE)):
        is_later = (found >= 0) & (found < rows)
        verdict[is_later], cause[is_later] = reason, found[is_later]
    # evaluation rows come first, so the earliest row tells whether any evaluation set holds the image
    for found in (near, equal):
        is_contaminated = (found >= 0) & corpus.is_protected[found]
        verdict[is_contaminated], cause[is_contaminated] = CONTAMINATED, found[is_contaminated]
    verdict[corpus.is_protected], cause[corpus.is_protected] = 0, -1
    return verdict, cause


def distinct_hashes(hashes: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """The distinct perceptual hashes, sorted, and the first row of each. -> (U,) uint64, (U,) int64"""
    images = np.flatnonzero(hashes.kind == IMAGE)
    values, position = np.unique(hashes.phash[images], return_index=True)
    return values, images[position]


def document_verdicts(corpus: Corpus, number: int, verdict: np.ndarray) -> dict[tuple[int, int], int]:
    """(shard, sample) -> reason, for the documents of set `number` that leave."""
    mine = np.flatnonzero(corpus.owner == number)
    place = np.column_stack([corpus.hashes.shard[mine], corpus.hashes.sample[mine]])
    documents, row = np.unique(place, axis=0, return_inverse=True)
    row = row.reshape(-1)
    lowest = np.full(len(documents), CONTAMINATED, np.uint8)
    highest = np.zeros(len(documents), np.uint8)
    np.minimum.at(lowest, row, verdict[mine])
    np.maximum.at(highest, row, verdict[mine])
    leaving = np.flatnonzero((highest == CONTAMINATED) | (lowest > 0))
    return {(int(documents[i][0]), int(documents[i][1])): int(highest[i]) for i in leaving}


def find(
    folders: Sequence[Path],
    *,
    against: Sequence[Path],
    work: Path,
    max_distance: int,
    is_only_against: bool = False,
    share: Share = WHOLE,
) -> dict[str, Any] | None:
    """This task's share of the comparisons; the task that sees all shares writes the verdicts and returns the report.

    `is_only_against` keeps duplicates, as several captions or dialogues of one image are, and drops what evaluation
    sets hold.
    """
    corpus = load_corpus(folders, against=against)
    _require_different(corpus)
    stamp = "-".join(shards.fingerprint[:8] for shards in corpus.sets) + f"-{max_distance}"
    values, _ = distinct_hashes(corpus.hashes)
    work.mkdir(parents=True, exist_ok=True)
    paths = [work / f"pairs-{task:05d}-of-{share.step:05d}.npz" for task in range(share.step)]
    pairs = near_pairs(values, max_distance=max_distance, share=share)
    save_arrays(paths[share.first], stamp=stamp, pairs=pairs)
    found = [columns["pairs"] for path in paths if (columns := load_arrays(path, stamp=stamp))]
    if len(found) < len(paths):
        return None
    together = np.unique(np.concatenate(found), axis=0)
    verdict, cause = judge(corpus, together)
    if is_only_against:
        verdict[verdict != CONTAMINATED] = 0
    counted: dict[str, dict[str, int]] = {}
    report: dict[str, Any] = {
        "max_distance": max_distance,
        "only_against": is_only_against,
        "against": [str(path) for path in against],
        "folders": counted,
        "evaluation_sets": _evaluation_counts(corpus, verdict, cause),
        "contaminated_examples": _examples(corpus, verdict, cause, CONTAMINATED),
        "near_duplicate_examples": _examples(corpus, verdict, cause, NEAR_DUPLICATE),
    }
    for number, shards in enumerate(corpus.sets[corpus.num_protected :], corpus.num_protected):
        verdicts = document_verdicts(corpus, number, verdict)
        places = np.array([(*place, reason) for place, reason in sorted(verdicts.items())], np.int64).reshape(
            -1, 3
        )
        save_arrays(work / f"drops-{shards.fingerprint}.npz", places=places)
        counts = Counter(REASONS[reason] for reason in verdicts.values())
        counted[shards.name] = {"documents": shards.num_samples, **dict(sorted(counts.items()))}
    write_atomic(work / "report.json", json.dumps(report, indent=1, allow_nan=False))
    return report


def _require_different(corpus: Corpus) -> None:
    """The same data under two names would lose all documents of the second, and verdicts are stored by content."""
    names: dict[str, str] = {}
    for shards in corpus.sets[corpus.num_protected :]:
        if (other := names.setdefault(shards.fingerprint, shards.folder.where)) != shards.folder.where:
            raise UserError(f"{other} and {shards.folder.where} hold the same shards; leave one out")


def _evaluation_counts(corpus: Corpus, verdict: np.ndarray, cause: np.ndarray) -> dict[str, dict[str, int]]:
    """Per evaluation set: its images, how many of them occur in training, and how often."""
    hits = cause[verdict == CONTAMINATED]
    counts = {}
    for number, shards in enumerate(corpus.sets[: corpus.num_protected]):
        own = hits[corpus.owner[hits] == number]
        found = {"pictures": shards.num_images, "pictures_in_training": len(np.unique(own))}
        counts[shards.name] = {**found, "training_pictures": len(own)}
    return counts


def _examples(corpus: Corpus, verdict: np.ndarray, cause: np.ndarray, reason: int) -> list[list[str]]:
    rows = np.flatnonzero(verdict == reason)[:MAX_EXAMPLES]
    return [[corpus.name(int(row)), corpus.name(int(cause[row]))] for row in rows]
