"""python -m data_prep.check DIR [--bad] [--html FILE]: is this data set complete, and what is in it?

Verifies manifest, reports, hashes, indexes, tar structure and every document; counts; writes a page of random
documents. The exit code is 1 on any damage, each named by shard and reason. With --bad it only lists the records that
the build could not use; the build need not be finished.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.progress import track

from data_prep.job import SETTINGS, is_failure
from data_prep.options import Folders, TokenizerOptions
from data_prep.report import write_report
from vlgpt.document import ROLES, Document
from vlgpt.errors import UserError, run_command
from vlgpt.images import BadImage, decode_image
from vlgpt.log import configure
from vlgpt.options import parse
from vlgpt.shards import BadSample, FeatureSpec, Manifest, ShardIndex, ShardSet, read_spec
from vlgpt.shards.foreign import index_foreign_tar
from vlgpt.shards.index import crc32
from vlgpt.shards.manifest import MANIFEST, SUCCESS, read_manifest, read_report
from vlgpt.shards.tars import find_tars, plain_tar

BLOCK_BYTES = 512


@dataclass
class Statistics:
    """What is in a data set."""

    images_per_document: Counter[int] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    text_tokens: list[np.ndarray] = field(default_factory=list)
    member_bytes: list[np.ndarray] = field(default_factory=list)

    def add(self, index: ShardIndex) -> None:
        """Count one shard."""
        self.images_per_document.update(np.diff(index.image_start).tolist())
        self.roles.update({role: int((index.part_role == number).sum()) for number, role in enumerate(ROLES)})
        self.suffixes.update(index.member_suffix.tolist())
        self.text_tokens.append(index.part_tokens[~index.part_is_image])
        self.member_bytes.append(index.member_size[index.member_suffix != "json"])

    def lines(self) -> Iterator[str]:
        """For people."""
        counts = ", ".join(f"{images}: {count}" for images, count in sorted(self.images_per_document.items()))
        yield f"documents by number of images: {counts}"
        yield "parts by role: " + ", ".join(f"{role} {count}" for role, count in self.roles.items() if count)
        yield "members: " + ", ".join(f"{suffix} {count}" for suffix, count in sorted(self.suffixes.items()))
        yield f"bytes per image: {_quantiles(self.member_bytes)}"
        tokens = np.concatenate(self.text_tokens) if self.text_tokens else np.zeros(0)
        has_tokens = bool(len(tokens)) and tokens.min() >= 0
        yield f"tokens per text part: {_quantiles(self.text_tokens) if has_tokens else 'not stored'}"


def _quantiles(columns: list[np.ndarray]) -> str:
    values = np.concatenate(columns) if columns else np.zeros(0)
    if not len(values):
        return "none"
    low, middle, high = np.percentile(values, [5, 50, 95])
    return (
        f"mean {values.mean():.0f}, 5 % {low:.0f}, median {middle:.0f}, 95 % {high:.0f}, max {values.max()}"
    )


def check_folder(
    folder: Path, *, decode: bool = False, statistics: Statistics | None = None
) -> Iterator[str]:
    """Every problem found, as `shard: reason`; nothing for a complete data set."""
    if not any((folder / name).exists() for name in (MANIFEST, SETTINGS)) and find_tars(folder):
        yield from _check_foreign(folder, decode, statistics)
        return
    try:
        manifest = read_manifest((folder / MANIFEST).read_bytes(), where=str(folder / MANIFEST))
    except (UserError, FileNotFoundError) as error:
        yield f"manifest: {error}"
        return
    if not (folder / SUCCESS).is_file():
        yield f"manifest: {SUCCESS} is missing; the build was not sealed"
    yield from _check_names(folder, manifest)
    for number, record in enumerate(
        track(manifest.shards, description=folder.name, console=Console(stderr=True))
    ):
        report = read_report(folder, number)
        if report is None:
            yield f"{record.name}: its tar, index or report is missing, cut or unreadable"
        elif report.record() != record:
            yield f"{record.name}: report and manifest disagree"
        else:
            yield from (
                f"{record.name}: {problem}"
                for problem in check_shard(folder, record.name, record.sha256, decode, statistics)
            )
    yield from _check_features(folder, manifest)


def bad_records(folder: Path) -> Iterator[str]:
    """A line for every record that was lost to damage: its shard, its number in the input, reason, key and detail.

    Foreign tars are judged as their index is made. Raises UserError for a folder that holds neither.
    """
    if (folder / SETTINGS).is_file() or (folder / MANIFEST).is_file():
        for path in sorted(folder.glob("[0-9]" * 5 + ".json")):
            if (report := read_report(folder, int(path.stem))) is None:
                continue
            for place, (reason, name) in report.drops().items():
                if is_failure(reason):
                    yield f"{report.name}: input record {report.first_record + place}: {reason}: {name}"
        return
    if not (tars := find_tars(folder)):
        raise UserError(f"{folder} is no data set: it holds neither {SETTINGS} nor tars")
    for tar in tars:
        for reason, key in index_foreign_tar(plain_tar(tar)).left_out:
            yield f"{tar.relative_to(folder)}: {reason}: {key}"


def _check_foreign(folder: Path, decode: bool, statistics: Statistics | None) -> Iterator[str]:
    """Samples of foreign tars that the index holds and that cannot be read; what it leaves out is counted there."""
    try:
        shards = ShardSet.open(folder)
    except UserError as error:
        yield f"tars: {error}"
        return
    for number, record in enumerate(
        track(shards.shards, description=folder.name, console=Console(stderr=True))
    ):
        if statistics is not None:
            statistics.add(shards.index(number))
        for sample in range(record.num_samples):
            try:
                for data in shards.read(number, sample).images:
                    if decode:
                        decode_image(data)
            except BadSample as error:
                yield f"{record.name}: sample {error.key}: {error.reason}"
            except BadImage as error:
                yield f"{record.name}: sample {shards.index(number).keys[sample]}: {error}"


def _check_names(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Numbers without gaps, totals that add up, no tar that the manifest does not know."""
    names = [shard.name for shard in manifest.shards]
    if names != [f"{number:05d}" for number in range(len(names))]:
        yield "manifest: shard names are not 00000, 00001, ..."
    if manifest.num_samples != sum(shard.num_samples for shard in manifest.shards):
        yield "manifest: num_samples is not the sum over shards"
    if manifest.num_records != manifest.num_samples + sum(manifest.dropped.values()):
        yield "manifest: records in are not records written plus dropped"
    for path in sorted(folder.glob("*.tar")):
        if path.stem not in names:
            yield f"{path.stem}: a tar that the manifest does not name"


def check_shard(
    folder: Path, name: str, sha256: str, decode: bool = False, statistics: Statistics | None = None
) -> Iterator[str]:
    """Problems of one shard whose report is readable."""
    try:
        index = ShardIndex.load(folder / f"{name}.idx")
    except (UserError, FileNotFoundError) as error:
        yield str(error)
        return
    if index.tar_sha256 != sha256:
        yield "the index belongs to another tar"
        return
    with (
        (folder / f"{name}.tar").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar,
    ):
        if hashlib.sha256(tar).hexdigest() != sha256:
            yield "the tar's sha256 is not the manifest's"
        problems = list(_layout_problems(index, len(tar)))
        yield from problems
        if not problems:
            yield from _content_problems(index, memoryview(tar), decode=decode)
    if statistics is not None:
        statistics.add(index)


def _layout_problems(index: ShardIndex, num_bytes: int) -> Iterator[str]:
    """Columns that fit together, members that lie end to end."""
    for name, last in (
        ("part_start", len(index.part_is_image)),
        ("member_start", len(index.member_offset)),
        ("image_start", int(index.part_is_image.sum())),
        ("text_start", int((~index.part_is_image).sum())),
    ):
        starts = getattr(index, name)
        if (
            len(starts) != index.num_samples + 1
            or starts[0] != 0
            or starts[-1] != last
            or (np.diff(starts) < 0).any()
        ):
            yield f"index column {name} is inconsistent"
            return
    padded = -(-index.member_size // BLOCK_BYTES) * BLOCK_BYTES
    expected = np.concatenate([[BLOCK_BYTES], index.member_offset + padded + BLOCK_BYTES])
    if (index.member_size < 0).any() or not np.array_equal(expected[:-1], index.member_offset):
        yield "members do not lie end to end"
    elif expected[-1] > num_bytes:
        yield "members lie beyond the end of the tar"
    if len(set(index.keys.tolist())) != index.num_samples or (np.sort(index.keys) != index.keys).any():
        yield "keys are not unique and ascending"


def _content_problems(index: ShardIndex, tar: memoryview, *, decode: bool) -> Iterator[str]:
    for sample in range(index.num_samples):
        key, first = str(index.keys[sample]), int(index.member_start[sample])
        for member in range(first, int(index.member_start[sample + 1])):
            place, size = int(index.member_offset[member]), int(index.member_size[member])
            suffix = str(index.member_suffix[member])
            name = f"{key}.json" if member == first else f"{key}.{member - first - 1}.{suffix}"
            if bytes(tar[place - BLOCK_BYTES : place - BLOCK_BYTES + 100]).rstrip(b"\0") != name.encode():
                yield f"sample {key}: expected member {name}"
            if crc32(tar[place : place + size]) != int(index.member_crc[member]):
                yield f"sample {key}: checksum of {name}"
            elif member == first:
                yield from (
                    f"sample {key}: {problem}"
                    for problem in _document_problems(index, sample, bytes(tar[place : place + size]))
                )
            elif decode:
                try:
                    decode_image(bytes(tar[place : place + size]))
                except BadImage as error:
                    yield f"sample {key}: {name} {error}"


def _document_problems(index: ShardIndex, sample: int, record: bytes) -> Iterator[str]:
    try:
        document = Document.from_record(json.loads(record, parse_constant=_refuse))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"no document: {error}"
        return
    part_range = slice(int(index.part_start[sample]), int(index.part_start[sample + 1]))
    roles = [ROLES.index(part.role) for part in document.parts]
    if index.part_role[part_range].tolist() != roles:
        yield "the index has other parts than the document"
    if document.num_images != int(index.image_start[sample + 1] - index.image_start[sample]):
        yield "the index has another number of images than the document"


def _refuse(constant: str) -> None:
    """Python reads NaN and Infinity, other JSON parsers do not."""
    raise ValueError(f"{constant} is no JSON")


def _check_features(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Features that are stored must be complete."""
    shards = ShardSet.open(folder) if (folder / SUCCESS).is_file() else None
    for path in sorted(folder.glob("features/*/spec.json")) if shards else ():
        name = path.parent.name
        try:
            spec: FeatureSpec = read_spec(path)
            reader = shards.feature(spec.name) if shards else None
            for number in range(len(manifest.shards)):
                if reader is not None:
                    reader.rows(number, 0, 1)
        except (UserError, FileNotFoundError) as error:
            yield f"feature {name}: {error}"


class CheckOptions(TokenizerOptions):
    """The command line."""

    folders: Folders = Field(description="data set folders")
    bad: bool = Field(False, description="list the records that were dropped as bad, and nothing else")
    decode: bool = Field(False, description="decode every image too")
    html: Path | None = Field(None, description="write a page of random documents")
    num_documents: int = Field(40, ge=1, description="on the page")
    seed: int = Field(0, description="which documents")
    tokenizer: str | None = Field(
        None, description="show the documents as training will see them, token by token"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 complete, 1 damaged, 2 wrong use."""
    options = parse(CheckOptions, argv, prog="python -m data_prep.check", description=__doc__)
    configure()
    console = Console()
    num_problems = 0
    complete: list[Path] = []
    for folder in options.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        if options.bad:
            for line in bad_records(folder):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            continue
        statistics = Statistics()
        problems = list(check_folder(folder, decode=options.decode, statistics=statistics))
        for problem in problems:
            console.print(
                f"DAMAGED {folder}/{problem}", style="red", markup=False, highlight=False, soft_wrap=True
            )
        num_problems += len(problems)
        if not problems:
            complete.append(folder)
            _print_summary(console, folder, statistics)
    if options.html and complete:
        tokenizer = options.load_tokenizer()
        write_report(
            options.html, complete, count=options.num_documents, seed=options.seed, tokenizer=tokenizer
        )
        console.print(f"wrote {options.html}", highlight=False, soft_wrap=True)
    return 1 if num_problems else 0


def _print_summary(console: Console, folder: Path, statistics: Statistics) -> None:
    shards = ShardSet.open(folder)
    manifest, dropped = shards.manifest, shards.skipped
    if manifest is not None:
        dropped = {**manifest.dropped, **{f"image {k}": v for k, v in manifest.dropped_images.items()}}
    listed = ", ".join(f"{reason} {count}" for reason, count in dropped.items()) or "nothing"
    what = (
        "left out of these foreign tars" if manifest is None else f"of {manifest.num_records} records dropped"
    )
    console.print(
        f"OK {folder}: {shards.num_samples} documents, {shards.num_images} images, {len(shards.shards)} shards, "
        f"{sum(shard.num_bytes for shard in shards.shards) / 1e6:.1f} MB; {what}: {listed}",
        *statistics.lines(),
        sep="\n  ",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
