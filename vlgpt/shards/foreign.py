"""Foreign webdataset tars (image + caption per key): indexed once and then read like our own shards, or streamed.

Their samples are judged when they are indexed, by the rules of `samples`, which are the build's: what an index holds
can be read. Nothing is extracted, unpickled or decoded here, and keys are never used as paths.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.files import file_stamp, sha256_file, write_atomic
from vlgpt.log import get_logger
from vlgpt.shards.index import IndexBuilder, Member, crc32
from vlgpt.shards.samples import (
    CAPTION_NAMES,
    BadText,
    SampleTexts,
    TarSamples,
    choose_fields,
    list_samples,
    listed,
    names_found,
    pair_document,
    read_texts,
    split_name,
)
from vlgpt.shards.schema import BadSample, Sample, ShardIndex, ShardRecord, StoredModel
from vlgpt.shards.tars import index_folder, make_index_folder, plain_tar, without_suffix

RULES = 2  # indexes made by other rules are made again
NUM_SAMPLES_SHOWN = 100
STREAM_PROTOCOLS = ("http", "https", "s3", "gs", "hf")


class TarReport(StoredModel):
    """What is kept beside the index of a foreign tar."""

    rules: int
    stamp: str
    """Of the file, see `file_stamp`; when it differs, the hash decides."""
    record: ShardRecord
    skipped: dict[str, int]
    passed_over: dict[str, int]
    names: str
    """Where no sample has a caption: the names that might hold one."""


class ForeignFolder:
    """A list of tars without manifest. `skipped` counts samples that cannot be used, by reason.

    A shard is called by the path of its tar below `root`, without suffix. Raises UserError for two tars of one name,
    and when none has a usable sample.
    """

    def __init__(self, tars: Sequence[Path], *, root: Path, cache_dir: Path | None):
        self.where, self._cache_dir = str(root), cache_dir
        self._tars: dict[str, Path] = {}  # as found, by name
        for tar in tars:
            name = without_suffix(os.fsencode(tar.relative_to(root)).decode("utf-8", "backslashreplace"))
            if name in self._tars:
                raise UserError(
                    f"foreign tars must have different names, found twice: {self._tars[name]} and {tar}"
                )
            self._tars[name] = tar
        self._plain = {name: plain_tar(tar, cache_dir=cache_dir) for name, tar in self._tars.items()}
        reports = [self._report(name) for name in self._tars]
        self.records = [report.record for report in reports]
        skipped: Counter[str] = Counter()
        for report in reports:
            skipped.update(report.skipped)
        self.skipped = dict(sorted(skipped.items()))
        if not any(record.num_samples for record in self.records):
            raise UserError(f"{self.where}: no tar holds a usable image; skipped {self.skipped}")
        if self.skipped:
            get_logger(__name__).warning("%s: left out of the index: %s", self.where, self.skipped)
        if all(report.names for report in reports if report.record.num_samples):
            get_logger(__name__).warning(
                "%s: no image has a caption, names found: %s; captions are read from %s",
                *(self.where, reports[0].names, ", ".join(CAPTION_NAMES)),
            )

    def path(self, name: str) -> Path:
        """Path of a shard's tar, which may lie outside the data set's folder, or of any other file in it."""
        return self._plain.get(name.removesuffix(".tar"), Path(self.where) / name)

    def index_path(self, shard: int) -> Path:
        """Path of the index that was written for a shard, by shard number."""
        return self._index_path(self._tars[self.records[shard].name])

    def index_again(self, shard: int) -> ShardIndex:
        """A damaged or lost index, made anew. Raises UserError when the tar is another one by now."""
        record = self.records[shard]
        if self._make(record.name).record != record:
            raise UserError(f"{self._tars[record.name]} has changed since it was opened; start again")
        return ShardIndex.load(self.index_path(shard))

    def _index_path(self, tar: Path) -> Path:
        """Never in the tar's folder itself: img2dataset takes every `*.json` there for a finished shard of its own."""
        return index_folder(tar.parent, cache_dir=self._cache_dir) / f"{tar.name}.idx"

    def _report(self, name: str) -> TarReport:
        """What is known about one tar, which is read again only when its content changed."""
        tar = self._tars[name]
        path = self._index_path(tar)
        try:
            report = TarReport.model_validate_json(path.with_suffix(".idx.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return self._make(name)
        stamp = file_stamp(tar)
        is_same = report.stamp == stamp or report.record.sha256 == sha256_file(self._plain[name])
        if report.rules != RULES or not is_same or not path.is_file():
            return self._make(name)
        record = report.record.model_copy(update={"name": name})
        found = report.model_copy(update={"stamp": stamp, "record": record})
        if report.stamp != stamp:
            write_atomic(path.with_suffix(".idx.json"), found.model_dump_json())
        return found

    def _make(self, name: str) -> TarReport:
        tar, plain = self._tars[name], self._plain[name]
        path, stamp = self._index_path(tar), file_stamp(tar)
        found = index_foreign_tar(plain)
        record = ShardRecord(
            name=name,
            num_samples=found.index.num_samples,
            num_images=found.index.num_images,
            num_bytes=plain.stat().st_size,
            sha256=found.index.tar_sha256,
        )
        report = TarReport(
            rules=RULES,
            stamp=stamp,
            record=record,
            skipped=found.skipped,
            passed_over=found.passed_over,
            names=found.names,
        )
        if found.passed_over:
            get_logger(__name__).info("%s: members passed over: %s", tar, listed(found.passed_over))
        try:
            make_index_folder(tar.parent, cache_dir=self._cache_dir)
            write_atomic(path, found.index.save_bytes())
            write_atomic(path.with_suffix(".idx.json"), report.model_dump_json())
        except OSError as error:
            raise UserError(f"the index of {tar} cannot be written ({error}); set data.cache_dir") from error
        return report


@dataclass(frozen=True)
class IndexedTar:
    """The index of a foreign tar, and what is not in it; see `TarReport`."""

    index: ShardIndex
    left_out: tuple[tuple[str, str], ...]
    """(reason, key) of what cannot be used, and (reason, "") of damage of the tar itself."""
    passed_over: dict[str, int]
    names: str

    @property
    def skipped(self) -> dict[str, int]:
        """How many, by reason."""
        return dict(Counter(reason for reason, _ in self.left_out))


def index_foreign_tar(tar: Path) -> IndexedTar:
    """Index every usable sample, in order of first appearance, and count the others by reason.

    Usable: it has one image, and a caption (none is needed if no sample of the tar has one). Damage of the tar itself
    counts once for each kind.
    """
    samples = list_samples(tar)
    left_out = [(problem, "") for problem in samples.problems]
    with tar.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        captions, bad = _find_captions(samples, read)
        left_out += [
            (samples.reason(number), samples.keys[number])
            for number in np.flatnonzero(samples.reasons).tolist()
        ]
        left_out += [(reason, samples.keys[number]) for number, reason in bad.items()]
        has_captions = bool(bad) or any(captions.values())
        names = ""
        if captions and not has_captions:
            texts = [read_texts(samples, number, read) for number in list(captions)[:NUM_SAMPLES_SHOWN]]
            names = names_found(texts, samples.passed_over)
        builder = IndexBuilder()
        for number, role in captions.items():
            if has_captions and not role:
                left_out.append(("no_caption", samples.keys[number]))
                continue
            key = samples.keys[number]
            parts: tuple[Part, ...] = (ImagePart(0), TextPart("")) if role else (ImagePart(0),)
            members = []
            for field in (role, "image") if role else ("image",):
                place = samples.place(number, field)
                assert place is not None  # it was found by `caption`, or the sample would have a reason
                members.append(Member(field, *place, crc32(read(*place))))
            builder.add(key, Document(key, "", parts), members)
    index = builder.build(tar_sha256=sha256_file(tar))
    return IndexedTar(index, tuple(left_out), samples.passed_over, names)


def _find_captions(
    samples: TarSamples, read: Callable[[int, int], bytes]
) -> tuple[dict[int, str], dict[int, str]]:
    """Sample -> which of its texts holds the caption, "" if none does; and sample -> reason of those with bad texts."""
    found: dict[int, str] = {}
    bad: dict[int, str] = {}
    for number in np.flatnonzero(samples.reasons == 0).tolist():
        try:
            found[number] = read_texts(samples, number, read).caption()[0]
        except BadText as error:
            if error.reason == "no_caption":
                found[number] = ""
            else:
                bad[number] = error.reason
    return found, bad


def foreign_sample(fields: Mapping[str, bytes], *, key: str, source: str) -> Sample:
    """The sample of members grouped by key (field -> bytes). Raises BadSample, with the reasons of the index."""
    reason, chosen = choose_fields(fields)
    if reason:
        raise BadSample(reason, key, source)
    texts = {role: fields[field] for role, field in chosen.items() if role != "image"}
    try:
        caption = SampleTexts.parse(texts).caption()[1] if texts else None
    except BadText as error:
        raise BadSample(error.reason, key, source) from error
    return Sample(pair_document(caption, key=key, source=source), (fields[chosen["image"]],), key)


class ForeignStream:
    """Samples of foreign tars behind URLs (http, https, s3, gs, hf), in order, as they arrive: for tars that are too
    large to keep, so that no index can be made.

    A stream cannot be read at random, so the loader does not take it: `ShardWriter` makes a data set of it. `skipped`
    counts what cannot be used, by reason, as `ShardSet.skipped` does.

    Args:
        urls: one URL, with braces for several (`https://host/{00000..00099}.tar`), or a list.
    Raises UserError for another protocol and, while iterating, for a tar that cannot be fetched.
    """

    def __init__(self, urls: str | Sequence[str], *, name: str = "stream"):
        from webdataset.shardlists import expand_urls

        self.urls = [
            url for given in ([urls] if isinstance(urls, str) else urls) for url in expand_urls(given)
        ]
        self.name = name
        self.skipped: Counter[str] = Counter()
        self._url, self._is_damaged = "", False
        # webdataset runs the shell command of a `pipe:` URL: only plain protocols get there
        for url in self.urls:
            if url.partition("://")[0] not in STREAM_PROTOCOLS:
                raise UserError(f"{url}: tars are streamed over {', '.join(STREAM_PROTOCOLS)}")

    def __iter__(self) -> Iterator[Sample]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        members = tar_file_expander(self._open(), handler=self._skip)
        for sample in group_by_keys(members, handler=self._skip):
            fields = {field: data for field, data in sample.items() if not field.startswith("__")}
            key, _ = split_name(f"{sample['__key__']}.jpg") or ("", "")
            try:
                yield foreign_sample(fields, key=key, source=self.name)
            except BadSample as error:
                self.skipped[error.reason] += 1

    def _open(self) -> Iterator[dict[str, object]]:
        """The streams, one after the other. A failed download may look like the end of a tar: `close` tells."""
        for url in self.urls:
            try:
                if url.startswith("http"):
                    # curl, with its retries; fsspec would need aiohttp
                    from webdataset import gopen

                    stream = gopen(url)
                else:
                    import fsspec

                    stream = fsspec.open(url, "rb").open()
                self._url, self._is_damaged = url, False
                yield {"url": url, "stream": stream}
                stream.close()
            except (OSError, ImportError) as error:
                raise UserError(f"{url} cannot be fetched: {error}") from error

    def _skip(self, error: Exception) -> bool:
        """Count damage and go on behind it. Raises UserError for anything else, such as a broken connection."""
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise UserError(f"{self._url} cannot be fetched: {error}") from error
        if isinstance(error, ValueError) and "duplicate" in str(error):
            self.skipped["duplicate_key"] += 1
        else:
            # webdataset reports the same damage for the member and for the tar
            self.skipped["truncated_tar"] += not self._is_damaged
            self._is_damaged = True
        return True
