"""Reads the samples of one finished shard without a manifest: for retries and for rewriting single shards."""

from __future__ import annotations

import json
from pathlib import Path

from vlgpt.document import Document
from vlgpt.shards.schema import ShardIndex, ShardReport

StoredSample = tuple[Document, list[tuple[str, bytes]]]


def read_stored_samples(
    folder: Path, report: ShardReport, *, with_incomplete: bool = False
) -> dict[int, StoredSample]:
    """Record place in the shard -> (document, [(suffix, bytes), ...]).

    Documents that lost an image in the build are left out unless `with_incomplete`.
    """
    index = ShardIndex.load(folder / f"{report.name}.idx")
    incomplete = {place for places in report.dropped_images.values() for place in places}
    samples: dict[int, StoredSample] = {}
    with (folder / f"{report.name}.tar").open("rb") as file:
        for sample, key in enumerate(index.keys):
            place = int(str(key)[-5:])
            if place in incomplete and not with_incomplete:
                continue
            members = []
            for member in range(int(index.member_start[sample]), int(index.member_start[sample + 1])):
                file.seek(int(index.member_offset[member]))
                members.append((str(index.member_suffix[member]), file.read(int(index.member_size[member]))))
            samples[place] = Document.from_record(json.loads(members[0][1])), members[1:]
    return samples
