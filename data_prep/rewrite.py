"""A copy of a data set without some documents, each of them counted: the last step of dedup and similarity.

A shard becomes the shard of the same number, and samples keep their keys. It runs as an array, can be killed and run
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_prep.job import SETTINGS
from vlgpt.document import Document, TextPart, TextPlace, text_places
from vlgpt.errors import UserError
from vlgpt.files import write_atomic
from vlgpt.processes import Share
from vlgpt.shards import Manifest, ShardIndex, ShardSet, ShardWriter, write_manifest
from vlgpt.shards.manifest import read_report
from vlgpt.shards.reader import read_stored_samples

Verdicts = Mapping[int, str]
"""Sample of a shard -> the reason why it leaves."""


def require_copyable(folder: Path, output: Path) -> Manifest:
    """The manifest of `folder`. Raises UserError for foreign tars and for a copy onto itself."""
    shards = ShardSet.open(folder)
    if shards.manifest is None:
        raise UserError(
            f"{folder} holds foreign tars, a copy needs a data set of data_prep; make one: python -m data_prep.build "
            f"img2dataset --input {folder} --output NEW"
        )
    if output.resolve() == folder.resolve():
        raise UserError(f"--output {output} is the data set itself; give another folder")
    return shards.manifest


def copy_without(
    folder: Path,
    output: Path,
    *,
    verdicts: Callable[[int], Verdicts],
    note: Mapping[str, object],
    share: Share,
) -> bool:
    """Copy this task's shards without the samples in `verdicts(shard)`; True when the copy is complete and sealed.

    `note` is added to the settings of the build: it must tell one set of verdicts from another. Raises UserError when
    the output holds another copy or a shard of the folder is damaged.
    """
    manifest, shards = require_copyable(folder, output), ShardSet.open(folder)
    settings = {**manifest.build, **note}
    output.mkdir(parents=True, exist_ok=True)
    if not (output / SETTINGS).is_file():
        write_atomic(output / SETTINGS, json.dumps(settings, indent=1, sort_keys=True, allow_nan=False))
    elif json.loads((output / SETTINGS).read_text()) != settings:
        raise UserError(f"{output} holds another data set; use another --output")
    mine = share.of(len(shards.shards))
    for shard in track(mine, description=f"copy {folder.name}", console=Console(stderr=True)):
        if read_report(output, shard) is None:
            _copy_shard(folder, output, shards, shard, verdicts(shard))
    if any(read_report(output, shard) is None for shard in range(len(shards.shards))):
        return False
    write_manifest(
        output,
        name=manifest.name,
        licence=manifest.licence,
        versions=manifest.versions,
        build=settings,
        num_shards=len(shards.shards),
    )
    return True


def _copy_shard(folder: Path, output: Path, shards: ShardSet, shard: int, verdicts: Verdicts) -> None:
    report = read_report(folder, shard)
    if report is None:
        raise UserError(
            f"{folder}: shard {shard:05d} is missing or incomplete; run python -m data_prep.check {folder}"
        )
    index, stored = shards.index(shard), read_stored_samples(folder, report, with_incomplete=True)
    dropped, lost = report.drops(), _by_place(report.dropped_images)
    samples = {int(str(key)[-5:]): number for number, key in enumerate(index.keys)}
    writer = ShardWriter(
        output,
        shard,
        first_record=report.first_record,
        build=report.build,
        tokenizer=KnownLengths.of(index, (stored[place][0] for place in samples)),
    )
    try:
        for place in range(report.num_records):
            if place in dropped:
                writer.drop(*dropped[place])
            elif reason := verdicts.get(samples[place]):
                writer.drop(reason, stored[place][0].id)
            else:
                writer.add(*stored[place], dropped_images=lost.get(place, ()))
        writer.close()
    except BaseException:
        writer.abort()
        raise


def _by_place(found: Mapping[str, Iterable[int]]) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for reason, numbers in found.items():
        for number in numbers:
            places.setdefault(number, []).append(reason)
    return places


@dataclass(frozen=True)
class KnownLengths:
    """Stands in for the tokenizer of a shard that is copied: its token lengths are in the index already."""

    fingerprint: str
    lengths: Mapping[tuple[str, TextPlace], int]

    @staticmethod
    def of(index: ShardIndex, documents: Iterable[Document]) -> KnownLengths | None:
        """None for a shard without token lengths. `documents` are those of the shard, in order."""
        if not index.tokenizer:
            return None
        parts = (
            part
            for document in documents
            for part in zip(document.parts, text_places([part.role for part in document.parts]))
        )
        tokens = zip(parts, index.part_tokens.tolist())
        lengths = {(part.text, place): n for (part, place), n in tokens if isinstance(part, TextPart)}
        return KnownLengths(index.tokenizer, lengths)

    def encode_text(self, text: str, place: TextPlace) -> list[int]:
        """As many ids as the tokenizer gave; their values are not known."""
        return [0] * self.lengths[text, place]
