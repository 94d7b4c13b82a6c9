"""`manifest.json` seals a data set: written only when every shard is there and verifies."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlgpt.errors import UserError
from vlgpt.files import sha256_file, write_atomic
from vlgpt.shards.schema import SCHEMA_VERSION, ShardIndex, ShardRecord, ShardReport, StoredModel
from vlgpt.shards.writer import shard_name

MANIFEST, SUCCESS = "manifest.json", "_SUCCESS"


class Manifest(StoredModel):
    """A data set at a glance: what it is, how it was made, every shard with counts and hash."""

    schema_version: int = SCHEMA_VERSION
    name: str
    licence: str
    versions: dict[str, str]
    """The library versions that decide the bytes."""
    build: dict[str, Any]
    """The settings of the build, enough to repeat it."""
    num_records: int
    num_samples: int
    num_images: int
    num_bytes: int
    dropped: dict[str, int]
    dropped_images: dict[str, int]
    shards: tuple[ShardRecord, ...]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.shards)


def fingerprint(shards: tuple[ShardRecord, ...]) -> str:
    """Equal if and only if schema, order and content of the shards are equal."""
    text = json.dumps([SCHEMA_VERSION, *[shard.sha256 for shard in shards]])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_report(folder: Path, shard: int) -> ShardReport | None:
    """The report of a finished shard; None when the shard is missing, cut short or lacks its index."""
    name = shard_name(shard)
    tar, index = folder / f"{name}.tar", folder / f"{name}.idx"
    try:
        report = ShardReport.model_validate_json((folder / f"{name}.json").read_bytes())
        is_complete = tar.stat().st_size == report.num_bytes and index.stat().st_size > 0
    except (FileNotFoundError, ValidationError):
        return None
    return report if is_complete else None


def verify_shard(folder: Path, report: ShardReport, *, hash_tar: bool = True) -> str | None:
    """None when tar, index and report agree, else what is wrong."""
    tar = folder / f"{report.name}.tar"
    if not tar.is_file():
        return "the tar is missing"
    if (size := tar.stat().st_size) != report.num_bytes:
        return f"the tar has {size} bytes, the report says {report.num_bytes}"
    if hash_tar and (found := sha256_file(tar)) != report.sha256:
        return f"the tar's sha256 is {found[:12]}..., the report says {report.sha256[:12]}..."
    try:
        index = ShardIndex.load(folder / f"{report.name}.idx")
    except (UserError, FileNotFoundError) as error:
        return f"the index cannot be read: {error}"
    if index.tar_sha256 != report.sha256:
        return "the index belongs to another tar"
    if (index.num_samples, index.num_images) != (report.num_samples, report.num_images):
        found = f"{index.num_samples} samples and {index.num_images} images"
        return f"the index has {found}, the report {report.num_samples} and {report.num_images}"
    return None


def write_manifest(
    folder: Path,
    *,
    name: str,
    licence: str,
    versions: Mapping[str, str],
    build: Mapping[str, Any],
    num_shards: int,
    hash_tars: bool = True,
) -> Manifest:
    """Verify every shard, then write `manifest.json` and `_SUCCESS`.

    Raises UserError that names the first shard that is missing or damaged and what is wrong with it.
    """
    reports = []
    for shard in range(num_shards):
        report = read_report(folder, shard)
        problem = (
            "missing or incomplete" if report is None else verify_shard(folder, report, hash_tar=hash_tars)
        )
        if report is None or problem:
            raise UserError(
                f"{folder}: shard {shard_name(shard)} of {num_shards}: {problem}; run the build again"
            )
        reports.append(report)
    dropped: Counter[str] = Counter()
    dropped_images: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
        dropped_images.update({reason: len(records) for reason, records in report.dropped_images.items()})
    manifest = Manifest(
        name=name,
        licence=licence,
        versions=dict(versions),
        build=dict(build),
        num_records=sum(report.num_records for report in reports),
        num_samples=sum(report.num_samples for report in reports),
        num_images=sum(report.num_images for report in reports),
        num_bytes=sum(report.num_bytes for report in reports),
        dropped=dict(sorted(dropped.items())),
        dropped_images=dict(sorted(dropped_images.items())),
        shards=tuple(report.record() for report in reports),
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1))
    write_atomic(folder / SUCCESS, b"")
    return manifest


def read_manifest(data: bytes, *, where: str) -> Manifest:
    """Raises UserError naming `where` when the manifest is damaged or of another schema version."""
    try:
        version = json.loads(data).get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where}: schema version {version}, this program reads {SCHEMA_VERSION}; build the data set "
                "again"
            )
        return Manifest.model_validate_json(data)
    except (ValidationError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{where} is damaged: {str(error).splitlines()[0]}; run the build again") from error
