"""One build: its settings, its plan (which records make which shard) and the work of one shard.

Shard i holds the input records `i * shard_size ... (i + 1) * shard_size - 1`, kept or dropped, so any number of tasks
in any order, killed and restarted, write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from stat import S_ISREG

from data_prep.filters import FilterSettings, RecordFilter
from data_prep.images import ImagePreparer, ImageSettings, StoredImage
from data_prep.sources import Dropped, ImageOpener, Record, Source
from data_prep.sources.base import BadRecord
from vlgpt.document import Document, ImagePart, Part
from vlgpt.errors import UserError
from vlgpt.files import write_once
from vlgpt.images import BadImage
from vlgpt.log import get_logger
from vlgpt.shards import ShardReport, ShardWriter
from vlgpt.shards.manifest import read_report
from vlgpt.shards.reader import read_stored_samples
from vlgpt.shards.schema import TextTokenizer, UnstorableDocument

SETTINGS = "build.json"
FILTERED = "filtered:"
MAX_NAME_CHARS = 300
PER_IMAGE_INFO = ("image_urls", "similarities")
LIBRARIES = ("pillow", "numpy")
FAST_LIBRARIES = ("simplejpeg", "opencv-python-headless")


@dataclass(frozen=True)
class BuildJob:
    """Everything that decides the bytes of a data set, and where they go."""

    folder: Path
    source: Source
    source_name: str
    source_options: Mapping[str, object]
    inputs: tuple[Path, ...]
    images: ImageSettings
    filters: FilterSettings
    shard_size: int
    tokenizer: TextTokenizer | None = None
    crashed: frozenset[int] = field(default_factory=frozenset)
    """Input records whose decoding killed a process: dropped as `decoder_crash`."""

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.shard_size)

    def record_range(self, shard: int) -> range:
        """The input records of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.source)))

    def versions(self) -> dict[str, str]:
        """Libraries that decide the bytes."""
        names = [*LIBRARIES, *getattr(self.source, "libraries", ())]
        names += FAST_LIBRARIES if self.images.fast else ()
        return {name: metadata.version(name) for name in sorted(set(names))}

    def settings(self) -> dict[str, object]:
        """What `build.json` records: a restart with anything else is refused. Paths are absolute."""
        return {"inputs": _plain(self.inputs, Path.resolve), **self._rules(Path.resolve)}

    def _rules(self, place: Callable[[Path], Path]) -> dict[str, object]:
        """The settings but for the inputs, with every path as `place` writes it."""
        recipe = getattr(self.source, "recipe", None)
        return {
            **({} if recipe is None else {"recipe": json.loads(json.dumps(recipe))}),
            "source": self.source_name,
            "options": _plain(dict(sorted(self.source_options.items())), place),
            "num_records": len(self.source),
            "shard_size": self.shard_size,
            "pictures": self.images.model_dump(),
            "filters": _plain(self.filters.model_dump(), place),
            "tokenizer": "" if self.tokenizer is None else self.tokenizer.fingerprint,
            "versions": self.versions(),
        }

    @property
    def fingerprint(self) -> str:
        """Of the settings that decide the tars: token lengths live in the index, and inputs may be moved."""
        settings = {key: value for key, value in self._rules(Path).items() if key != "tokenizer"}
        text = json.dumps(settings, sort_keys=True, allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _plain(value: object, place: Callable[[Path], Path]) -> object:
    """As JSON has it, paths as `place` writes them."""
    if isinstance(value, dict):
        return {key: _plain(item, place) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, place) for item in value]
    return str(place(value)) if isinstance(value, Path) else value


def claim_folder(job: BuildJob) -> None:
    """Write `build.json`, or check that this folder is being built with the very same settings.

    Raises UserError that names the first setting that differs, both values and the fix.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / SETTINGS
    wanted = json.dumps(job.settings(), indent=1, sort_keys=True, allow_nan=False)
    # of several tasks that start at once the first writes, and the others compare
    write_once(path, wanted.encode())
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove {job.folder} to build again") from error
    for name, old, new in _differences(found, json.loads(wanted)):
        raise UserError(
            f"{job.folder} is being built with {name} = {old!r}, this run has {new!r}; "
            "use the same value, or another --output"
        )


def _differences(old: object, new: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new and not _is_same_place(old, new):
        yield name, old, new


def _is_same_place(old: object, new: object) -> bool:
    """Whether both name one path: folders that were begun before hold some paths as they were given."""
    return (
        isinstance(old, str)
        and isinstance(new, str)
        and Path(new).is_absolute()
        and str(Path(old).resolve()) == new
    )


class ShardBuilder:
    """Builds shards of one job, one after the other, in one process."""

    def __init__(self, job: BuildJob, *, on_record: Callable[[int], None] = lambda number: None):
        """`on_record` is called with the number of every input record before it is read."""
        self._job, self._on_record = job, on_record
        self._records = _RecordWriter(job)

    def build(self, shard: int, *, retry: bool = False) -> ShardReport:
        """Write a shard unless it is there; `retry` reads the failed records of a finished one again."""
        existing = read_report(self._job.folder, shard)
        if existing and not (retry and has_failures(existing)):
            return existing
        writer = ShardWriter(
            self._job.folder,
            shard,
            first_record=self._job.record_range(shard).start,
            build=self._job.fingerprint,
            tokenizer=self._job.tokenizer,
        )
        try:
            if existing is None and (finished := read_report(self._job.folder, shard)):
                writer.abort()  # another process finished it while this one waited for the lock
                return finished
            if existing is None:
                self._write_all(writer, self._job.record_range(shard))
            else:
                self._write_again(writer, self._job.record_range(shard), existing)
            return writer.close()
        except BaseException:
            writer.abort()
            raise

    def _write_all(self, writer: ShardWriter, records: range) -> None:
        items = self._read(records)
        for number in records:
            self._on_record(number)
            item = next(items)
            if number in self._job.crashed:
                writer.drop("decoder_crash", drop_name(item))
            else:
                self._records.write(item, writer)

    def _write_again(self, writer: ShardWriter, records: range, report: ShardReport) -> None:
        """Copy what is good, keep what filters decided, read the rest again."""
        samples = read_stored_samples(self._job.folder, report)
        decided = {place: drop for place, drop in report.drops().items() if not is_failure(drop[0])}
        for place, number in enumerate(records):
            self._on_record(number)
            if place in samples:
                writer.add(*samples[place])
            elif place in decided:
                writer.drop(*decided[place])
            elif number in self._job.crashed:
                writer.drop("decoder_crash", f"input record {number}")
            else:
                self._records.write(next(self._read(range(number, number + 1))), writer)

    def _read(self, records: range) -> Iterator[Record | Dropped]:
        """What the source gives: an item for each of these records, also for one that it cannot read."""
        number = records.start
        while number < records.stop:
            try:
                for item in self._job.source.read(number, records.stop):
                    number += 1
                    yield item
                if number < records.stop:
                    raise IndexError(f"the source ends before record {number}")
            except (UserError, OSError):  # the whole input, or the disk
                raise
            except Exception as error:
                yield _unforeseen(error, f"number {number} of the input")
                number += 1


def is_failure(reason: str) -> bool:
    """Whether a record was lost to damage; filters are intentions."""
    return not reason.startswith(FILTERED)


def num_failures(report: ShardReport) -> int:
    """Records lost to damage."""
    return sum(count for reason, count in report.dropped.items() if is_failure(reason))


def has_failures(report: ShardReport) -> bool:
    """Whether reading again could bring back a record or an image."""
    return any(map(is_failure, (*report.dropped, *report.dropped_images)))


class _RecordWriter:
    """Turns source items into samples or counted drops."""

    def __init__(self, job: BuildJob):
        self._filter = RecordFilter(job.filters)
        self._images = ImagePreparer(job.images)
        self._max_file_bytes = job.images.max_file_bytes
        self._is_image_optional = getattr(job.source, "is_image_optional", False)

    def write(self, item: Record | Dropped, writer: ShardWriter) -> None:
        """Add the item to the shard, or count why not. An error that nobody foresaw costs this record only."""
        try:
            document, images, lost = self._prepare(item)
        except BadRecord as error:
            writer.drop(error.reason, drop_name(item, error.detail))
            return
        except UserError:
            raise
        except Exception as error:
            drop = _unforeseen(error, _key(item))
            writer.drop(drop.reason, drop_name(drop))
            return
        try:
            writer.add(document, images, dropped_images=lost)
        except UnstorableDocument as error:
            writer.drop("bad_text", drop_name(item, str(error)))

    def _prepare(self, item: Record | Dropped) -> tuple[Document, list[tuple[str, bytes]], list[str]]:
        """-> what to store, and why images were lost. Raises BadRecord."""
        if isinstance(item, Dropped):
            raise BadRecord(item.reason, item.detail)
        if reason := self._filter.reason(item):
            raise BadRecord(reason)
        record = self._filter.crop(item)
        kept: list[StoredImage | None] = []
        lost = [BadImage(reason) for reason in record.lost]
        for opener in record.images:
            try:
                kept.append(self._image(opener))
            except BadImage as error:
                kept.append(None)
                lost.append(error)
        stored = [(image.suffix, image.data) for image in kept if image is not None]
        if lost and not (self._is_image_optional and stored):
            raise BadRecord(lost[0].reason, lost[0].detail)
        document = _with_images(record.document, kept)
        if document.num_images != len(stored):
            raise ValueError(f"{document.num_images} image parts, but {len(stored)} images")
        return document, stored, [error.reason for error in lost]

    def _image(self, opener: ImageOpener) -> StoredImage:
        stored = self._images.prepare(_open(opener, max_bytes=self._max_file_bytes))
        if self._filter.opted_out_hash(stored.info["sha256"]):
            raise BadImage("filtered:opt_out")
        return stored


def _unforeseen(error: Exception, key: str) -> Dropped:
    """The drop of a record that made our code or a library fail; the log says how."""
    get_logger(__name__).warning("record %s is dropped: %s: %s", key, type(error).__name__, error)
    return Dropped("unforeseen_error", key, f"{type(error).__name__}: {error}")


def _key(item: Record | Dropped) -> str:
    return item.key if isinstance(item, Dropped) else item.document.id


def drop_name(item: Record | Dropped, detail: str = "") -> str:
    """One line for people: which record was dropped, and what was wrong with it."""
    detail = detail or (item.detail if isinstance(item, Dropped) else "")
    name = " ".join(f"{_key(item)}: {detail}".split() if detail else _key(item).split())
    return name[:MAX_NAME_CHARS].encode("utf-8", "backslashreplace").decode()


def _open(opener: ImageOpener, *, max_bytes: int) -> bytes:
    try:
        if isinstance(opener, Path):
            stat = opener.stat()
            if not S_ISREG(stat.st_mode):  # a pipe would be waited for, a device read without end
                raise BadImage("unreadable_file", f"{opener} is no file")
            if stat.st_size > max_bytes:
                raise BadImage("too_many_bytes", str(opener))
            return opener.read_bytes()
        data = opener if isinstance(opener, bytes) else opener()
    except FileNotFoundError as error:
        raise BadImage("missing_file", str(error)) from error
    except OSError as error:
        raise BadImage("unreadable_file", str(error)) from error
    if len(data) > max_bytes:
        raise BadImage("too_many_bytes", f"{len(data)} bytes")
    return data


def _with_images(document: Document, images: list[StoredImage | None]) -> Document:
    """The document without its lost images (None), and with the originals' hashes and sizes in `info`."""
    kept = [index for index, image in enumerate(images) if image is not None]
    numbers = {index: number for number, index in enumerate(kept)}
    parts: list[Part] = []
    for part in document.parts:
        if not isinstance(part, ImagePart):
            parts.append(part)
        elif part.index in numbers:
            parts.append(ImagePart(numbers[part.index], part.role))
    info = dict(document.info)
    if kept:
        info["images"] = [image.info for image in images if image is not None]
    for name in PER_IMAGE_INFO:
        if name in info:
            info[name] = [value for index, value in enumerate(info[name]) if index in numbers]
    return Document(document.id, document.source, tuple(parts), info)
