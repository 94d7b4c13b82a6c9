"""The shards that img2dataset writes, in all their forms, as numbered samples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from data_prep.sources.base import (
    BadRecord,
    Columns,
    Dropped,
    ImageOpener,
    Info,
    Numbered,
    mapping,
    table_image,
)
from data_prep.sources.fetch import fetch_commands
from data_prep.sources.inputs import list_files
from data_prep.sources.records import RawRecord, TableRows, table_layout
from data_prep.sources.sample_tar import SampleTar, open_sample_tar
from vlgpt.errors import UserError
from vlgpt.log import get_logger

CAPTION_COLUMNS = ("top_caption", "caption", "txt", "text", "TEXT")
IMAGE_COLUMNS = ("jpg", "png", "webp")
FILTER_COLUMNS = {
    "similarity": ("similarity",),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score"),
    "watermark": ("pwatermark",),
    "nsfw": ("punsafe",),
}
LAION_COCO_COLUMNS = ("TEXT", "top_caption", "all_captions", "all_similarities")
OTHER_COLUMNS = ("url", "original_width", "original_height", "sha256", *LAION_COCO_COLUMNS)
URL_LISTS = (".tsv", ".csv", ".txt")
FAILURES = ("failed_to_download", "failed_to_resize")
MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DownloadedImage:
    """One downloaded image and what is known about it."""

    key: str
    value: Columns
    image: ImageOpener


class TableShard:
    """A table of rows, with the images inside (`jpg` column) or in the tar of the same name."""

    def __init__(self, table: Path, name: str, tar: Path | None, captions: Sequence[str]):
        columns = table_layout(table)[0]
        self._image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if not {"key", "status"} <= set(columns) or (self._image_column is None and tar is None):
            raise UserError(_not_downloaded(table, columns))
        scores = itertools.chain.from_iterable(FILTER_COLUMNS.values())
        self._rows = TableRows(
            [table],
            {"key": ("key",), "caption": captions} if len(captions) == 1 else {"key": ("key",)},
            optional=("status", *captions, *IMAGE_COLUMNS, *OTHER_COLUMNS, *scores),
            source="img2dataset",
            what="table of img2dataset",
        )
        self._name, self._tar = name, tar

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[DownloadedImage | Dropped]:
        """Rows `start ... stop - 1`; a failed download is dropped."""
        for row in self._rows.read(start, stop):
            if isinstance(row, Dropped):
                yield row
                continue
            key = f"{self._name}/{row.value['key']}"
            try:
                yield DownloadedImage(key, row.value, self._image(row))
            except BadRecord as error:
                yield Dropped(error.reason, key)

    def _image(self, row: RawRecord) -> ImageOpener:
        status = row.value["status"]
        if status != "success":
            raise BadRecord(status if status in FAILURES else "not_downloaded")
        if self._image_column is not None:
            return table_image(row.value[self._image_column])
        assert self._tar is not None  # checked above
        samples = open_sample_tar(self._tar)
        number = samples.number(str(row.value["key"]))
        place = None if number is None else samples.place(number, "image")
        if place is None:
            raise BadRecord("missing_in_tar" if samples.is_complete else "truncated_tar")
        return place


class TarShard:
    """A tar without table: captions and scores come from its .txt and .json members.

    A cut tar gives what lies before the cut, and one drop `truncated_tar`.
    """

    def __init__(self, tar: Path, name: str):
        self._tar, self._name = tar, name
        samples = SampleTar(tar)
        self._num_samples, self._is_complete = len(samples), samples.is_complete

    def __len__(self) -> int:
        return self._num_samples + (not self._is_complete)

    def read(self, start: int, stop: int) -> Iterator[DownloadedImage | Dropped]:
        """Samples `start ... stop - 1`."""
        samples = open_sample_tar(self._tar)
        for place in range(start, stop):
            if place == self._num_samples:
                yield Dropped("truncated_tar", self._name)
                continue
            key = f"{self._name}/{samples.keys[place]}"
            try:
                yield _tar_sample(samples, place, key)
            except BadRecord as error:
                yield Dropped(error.reason, key)


def _tar_sample(samples: SampleTar, number: int, key: str) -> DownloadedImage:
    if samples.is_duplicate(number):
        raise BadRecord("duplicate_key")
    image = samples.place(number, "image")
    if image is None:
        raise BadRecord("no_image")
    value: Info = {}
    if (caption := samples.place(number, "txt")) is not None:
        value["txt"] = _text(caption.size, caption())
    if (record := samples.place(number, "json")) is not None:
        try:
            value |= mapping(json.loads(_text(record.size, record())))
        except (ValueError, RecursionError) as error:
            raise BadRecord("bad_json") from error
    return DownloadedImage(key, value, image)


def _text(size: int, data: bytes) -> str:
    if size > MAX_TEXT_BYTES:
        raise BadRecord("text_too_long")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("text_not_utf8") from error


def open_shards(inputs: Sequence[Path], captions: Sequence[str]) -> Iterator[Numbered[DownloadedImage]]:
    """One shard per name, in order. Raises UserError for lists of URLs that were never downloaded."""
    for path in inputs:
        if path.suffix in URL_LISTS:
            raise UserError(_list_not_downloaded(path))
    tars = {file.name: file.path for file in list_files(inputs, (".tar",)) if file.path.suffix == ".tar"}
    # NAME_stats.json and the images' own texts belong to img2dataset's output
    found = list_files(inputs, (".parquet",), others=(".tar", ".json"))
    tables = {file.name: file.path for file in found if file.path.suffix == ".parquet"}
    if not tars and not tables:
        raise UserError(f"no .tar or .parquet of img2dataset in {', '.join(map(str, inputs))}")
    for name in sorted({*tars, *tables}):
        tar, table = tars.get(name), tables.get(name)
        if table is not None and (tar is None or _is_table(table)):
            yield TableShard(table, name, tar, captions)
        elif tar is not None:
            yield TarShard(tar, name)


def _is_table(path: Path) -> bool:
    """False for the table of a shard that img2dataset did not finish: its tar is then read alone."""
    try:
        table_layout(path)
    except UserError as error:
        get_logger(__name__).warning("%s; the tar beside it is read without it", error)
        return False
    return True


def _not_downloaded(table: Path, columns: Sequence[str]) -> str:
    url = next((column for column in ("url", "URL") if column in columns), "url")
    caption = next((column for column in CAPTION_COLUMNS if column in columns), "caption")
    wanted = (*itertools.chain.from_iterable(FILTER_COLUMNS.values()), *LAION_COCO_COLUMNS)
    more = [column for column in wanted if column in columns and column != caption]
    commands = fetch_commands(
        table, input_format="parquet", url_column=url, caption_column=caption, more_columns=more
    )
    return (
        f"{table} holds no pictures (columns: {', '.join(columns)}). Download them first, then give the "
        f"output folder as --input:\n{commands}"
    )


def _list_not_downloaded(path: Path) -> str:
    titled = path.with_name(f"titled-{path.name}")
    commands = fetch_commands(
        titled, input_format=path.suffix[1:], url_column="url", caption_column="caption"
    )
    return (
        f"{path} is a list of URLs. Download the pictures first, then give the output folder as --input. "
        "CC3M's list has no header line, so add one:\n"
        f"(printf 'caption\\turl\\n'; cat {quote(str(path))}) > {quote(str(titled))}\n{commands}"
    )
