"""Foreign webdataset tars (image + caption per key): indexed once and then read like our own shards, or streamed.

Only members named `KEY.jpg|jpeg|png|webp`, `KEY.txt` and `KEY.json` are looked at; nothing is extracted, unpickled or
decoded here, and keys are never used as paths. As in webdataset, a key ends at the first dot of the base name.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.files import sha256_file, write_atomic
from vlgpt.log import get_logger
from vlgpt.shards.index import IndexBuilder, Member, crc32, tar_headers
from vlgpt.shards.schema import IMAGE_SUFFIXES, BadSample, Sample, ShardIndex, ShardRecord

TEXT_SUFFIXES = ("txt", "json")
CAPTION_KEYS = ("caption", "text")
MAX_TEXT_BYTES = 1 << 20
INDEX_FOLDER = ".vlgpt-index"
STREAM_PROTOCOLS = ("http", "https", "s3", "gs", "hf")


class ForeignFolder:
    """A list of tars without manifest. `skipped` counts samples that cannot be used, by reason."""

    def __init__(self, tars: list[Path], *, index_dir: Path | None):
        stems = [tar.stem for tar in tars]
        if len(set(stems)) != len(stems):
            raise UserError(
                "foreign tars must have different names, found twice: "
                f"{Counter(stems).most_common(1)[0][0]}.tar"
            )
        self._tars = dict(zip(stems, tars))
        self._index_dir = index_dir
        self.where = str(tars[0].parent)
        self.skipped: dict[str, int] = {}
        self.records: list[ShardRecord] = []
        skipped: Counter[str] = Counter()
        for stem, tar in self._tars.items():
            record, reasons = self._record(stem, tar)
            self.records.append(record)
            skipped.update(reasons)
        self.skipped = dict(sorted(skipped.items()))
        if not any(record.num_samples for record in self.records):
            raise UserError(f"{self.where}: no tar holds a usable image; skipped {self.skipped}")
        if self.skipped:
            get_logger(__name__).warning("%s: left out of the index: %s", self.where, self.skipped)

    def path(self, name: str) -> Path:
        """Path of a shard's tar, which may lie outside the data set's folder, or of any other file in it."""
        stem, _, suffix = name.rpartition(".")
        return self._tars[stem] if suffix == "tar" and stem in self._tars else Path(self.where) / name

    def index_path(self, shard: int) -> Path:
        """Path of the index that was written for a shard, by shard number."""
        return self._index_path(self._tars[self.records[shard].name])

    def _index_path(self, tar: Path) -> Path:
        """In a hidden folder beside the tar, or in the cache folder when given or when the tar's folder is read-only.

        Never in the tar's folder itself: img2dataset takes every `*.json` there for a finished shard of its own.
        """
        folder = self._index_dir
        if folder is None:
            writable = os.access(tar.parent, os.W_OK)
            temporary = Path(tempfile.gettempdir()) / f"vlgpt-index-{os.getuid()}"
            folder = tar.parent / INDEX_FOLDER if writable else temporary
        return folder / f"{tar.name}.idx"

    def _record(self, stem: str, tar: Path) -> tuple[ShardRecord, dict[str, int]]:
        """The manifest line of one tar; read again only when size or time changed."""
        stat, path = tar.stat(), self._index_path(tar)
        stamp = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        report = path.with_suffix(".idx.json")
        try:
            stored = json.loads(report.read_text())
            if stored["stamp"] == stamp and path.is_file():
                return ShardRecord.model_validate(stored["record"]), stored["skipped"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        index, skipped = index_foreign_tar(tar)
        record = ShardRecord(
            name=stem,
            num_samples=index.num_samples,
            num_images=index.num_images,
            num_bytes=stat.st_size,
            sha256=index.tar_sha256,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, index.save_bytes())
        body = {"stamp": stamp, "record": record.model_dump(), "skipped": skipped}
        write_atomic(report, json.dumps(body).encode())
        return record, skipped


def foreign_document(text: bytes | None, suffix: str, *, key: str, source: str) -> Document:
    """The pair (image, caption), or the image alone. Raises UnicodeDecodeError and ValueError for a bad caption."""
    parts: tuple[Part, ...] = (ImagePart(0),)
    if text is not None:
        caption = text.decode("utf-8").strip() if suffix == "txt" else _json_caption(text)
        parts = (*parts, TextPart(caption))
    return Document(key, source, parts)


def _json_caption(text: bytes) -> str:
    record = json.loads(text)
    for name in CAPTION_KEYS:
        if isinstance(record, dict) and isinstance(record.get(name), str):
            return str(record[name]).strip()
    raise ValueError(f"the JSON holds none of {', '.join(CAPTION_KEYS)}")


def foreign_sample(fields: Mapping[str, bytes], *, key: str, source: str) -> Sample:
    """The sample of members grouped by key (suffix -> bytes). Raises BadSample, with the reasons of the index."""
    image = next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), None)
    suffix = next((suffix for suffix in TEXT_SUFFIXES if suffix in fields), "")
    text = fields.get(suffix)
    if image is None:
        raise BadSample("no_image", key, source)
    if text is not None and len(text) > MAX_TEXT_BYTES:
        raise BadSample("caption_too_long", key, source)
    try:
        return Sample(foreign_document(text, suffix, key=key, source=source), (image,), key)
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8", key, source) from error
    except ValueError as error:
        raise BadSample("bad_record", key, source) from error


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
        for fields in group_by_keys(members, handler=self._skip):
            try:
                yield foreign_sample(fields, key=fields["__key__"], source=self.name)
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
        if isinstance(error, tarfile.TarError):
            # webdataset reports the same damage for the member and for the tar
            self.skipped["truncated_tar"] += not self._is_damaged
            self._is_damaged = True
        elif isinstance(error, ValueError) and "duplicate" in str(error):
            self.skipped["duplicate"] += 1
        else:
            raise UserError(f"{self._url} cannot be fetched: {error}") from error
        return True


def index_foreign_tar(tar: Path) -> tuple[ShardIndex, dict[str, int]]:
    """Index every usable sample, in order of first appearance, and count the others by reason.

    Usable: it has an image, and a caption of at most 1 MiB (none is needed if the whole tar has no text).
    A tar that is cut keeps what lies before the cut, and counts once as `truncated_tar`.
    """
    samples, skipped = _scan(tar)
    has_text = any(suffix in TEXT_SUFFIXES for fields in samples.values() for suffix in fields)
    builder = IndexBuilder()
    for key, fields in samples.items():
        image = next((fields[suffix] for suffix in IMAGE_SUFFIXES if suffix in fields), None)
        text = next((fields[suffix] for suffix in TEXT_SUFFIXES if suffix in fields), None)
        if image is None:
            skipped["no_image"] += 1
        elif text is None and has_text:
            skipped["no_caption"] += 1
        elif text is not None and text.size > MAX_TEXT_BYTES:
            skipped["caption_too_long"] += 1
        else:
            parts: tuple[Part, ...] = (ImagePart(0),) if text is None else (ImagePart(0), TextPart(""))
            builder.add(key, Document(key, "", parts), [image] if text is None else [text, image])
    return builder.build(tar_sha256=sha256_file(tar)), dict(skipped)


def _scan(tar: Path) -> tuple[dict[str, dict[str, Member]], Counter[str]]:
    samples: dict[str, dict[str, Member]] = {}
    skipped: Counter[str] = Counter()
    size = tar.stat().st_size
    try:
        with tar.open("rb") as file:
            for info in tar_headers(tar):
                key, _, suffix = info.name.rpartition("/")[2].partition(".")
                key, suffix = f"{info.name.rpartition('/')[0]}/{key}".lstrip("/"), suffix.lower()
                if info.issparse() or not info.isreg():
                    skipped["not_a_file"] += not info.isdir()
                elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES and "." in suffix:
                    skipped["dots_in_key"] += 1
                elif suffix in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
                    if info.offset_data + info.size > size:
                        break
                    fields = samples.setdefault(key, {})
                    if suffix in fields:
                        skipped["duplicate"] += suffix in IMAGE_SUFFIXES
                    else:
                        data = os.pread(file.fileno(), info.size, info.offset_data)
                        fields[suffix] = Member(suffix, info.offset_data, info.size, crc32(data))
            else:
                return samples, skipped
    except tarfile.TarError:
        pass
    skipped["truncated_tar" if size else "empty_tar"] += 1
    return samples, skipped
