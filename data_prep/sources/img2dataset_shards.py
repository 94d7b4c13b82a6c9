"""The shards that img2dataset writes, in all their forms, as numbered samples."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from data_prep.sources.base import (
    BadRecord,
    Columns,
    Dropped,
    ImageOpener,
    Numbered,
    table_image,
)
from data_prep.sources.csv_rows import read_header
from data_prep.sources.fetch import fetch_commands
from data_prep.sources.inputs import list_files, paths_by_name
from data_prep.sources.records import (
    RawRecord,
    TableRows,
    image_columns,
    table_layout,
    table_schema,
    text_columns,
)
from data_prep.sources.sample_tar import SampleTar, open_sample_tar
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.shards.samples import CAPTION_NAMES, BadText, SampleTexts, listed, names_found, read_texts
from vlgpt.shards.tars import TAR_SUFFIXES

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
NUM_SAMPLES_TRIED = 100


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
        tar = open_sample_tar(self._tar)
        number = tar.number(str(row.value["key"]))
        reason = "missing_in_tar" if number is None else tar.samples.reason(number)
        if number is None or reason:
            raise BadRecord("truncated_tar" if tar.samples.problems else reason)
        return tar.image(number)


class TarShard:
    """A tar without table: captions and scores come from its texts and JSON members.

    A damaged tar gives what is whole, and a drop for each kind of its damage.
    """

    def __init__(self, tar: Path, name: str):
        self._tar, self._name = tar, name
        samples = SampleTar(tar).samples
        self._num_samples, self._problems = len(samples), samples.problems
        self.passed_over = samples.passed_over

    def __len__(self) -> int:
        return self._num_samples + len(self._problems)

    def read(self, start: int, stop: int) -> Iterator[DownloadedImage | Dropped]:
        """Samples `start ... stop - 1`."""
        tar = open_sample_tar(self._tar)
        for number in range(start, stop):
            if number >= self._num_samples:
                yield Dropped(self._problems[number - self._num_samples], self._name)
                continue
            key = f"{self._name}/{tar.samples.keys[number]}"
            if reason := tar.samples.reason(number):
                yield Dropped(reason, key)
                continue
            try:
                value = read_texts(tar.samples, number, tar.read).values
            except BadText as error:
                yield Dropped(error.reason, key)
                continue
            except OSError as error:
                raise UserError(f"{self._tar} cannot be read: {error}") from error
            yield DownloadedImage(key, value, tar.image(number))


def warn_without_captions(shards: Sequence[TarShard], captions: Sequence[str]) -> None:
    """Say which names there are when none of the first samples has a caption."""
    items = itertools.chain.from_iterable(shard.read(0, len(shard)) for shard in shards)
    found = [item for item in itertools.islice(items, NUM_SAMPLES_TRIED) if isinstance(item, DownloadedImage)]
    if found and not any(item.value.get(name) is not None for item in found for name in captions):
        names = [SampleTexts({}, {}), *(SampleTexts(dict(item.value), {}) for item in found)]
        others = itertools.chain.from_iterable(shard.passed_over for shard in shards)
        get_logger(__name__).warning(
            "no caption among the first %d images, names found: %s; captions are read from %s (--caption-column NAME)",
            *(len(found), names_found(names, others), ", ".join(captions)),
        )


def open_shards(inputs: Sequence[Path], captions: Sequence[str]) -> Sequence[Numbered[DownloadedImage]]:
    """One shard per name, in order. Raises UserError for lists of URLs that were never downloaded."""
    for path in inputs:
        if path.suffix in URL_LISTS:
            raise UserError(_list_not_downloaded(path))
    # NAME_stats.json and the images' own texts belong to img2dataset's output
    found = list_files(inputs, (*TAR_SUFFIXES, ".parquet"), others=(".json",))
    tables, tars = (
        paths_by_name(
            (file for file in found if file.path.name.lower().endswith(suffixes)), source="img2dataset"
        )
        for suffixes in ((".parquet",), TAR_SUFFIXES)
    )
    if not tars and not tables:
        raise UserError(f"no .tar or .parquet of img2dataset in {', '.join(map(str, inputs))}")
    shards: list[TableShard | TarShard] = []
    for name in sorted({*tars, *tables}):
        tar, table = tars.get(name), tables.get(name)
        if table is not None and (tar is None or _is_table(table)):
            shards.append(TableShard(table, name, tar, captions))
        elif tar is not None:
            shards.append(TarShard(tar, name))
    alone = [shard for shard in shards if isinstance(shard, TarShard)]
    warn_without_captions(alone, captions)
    passed_over: Counter[str] = Counter()
    for shard in alone:
        passed_over.update(shard.passed_over)
    if passed_over:
        get_logger(__name__).info("members of tars passed over: %s", listed(passed_over))
    return shards


def _is_table(path: Path) -> bool:
    """False for the table of a shard that img2dataset did not finish: its tar is then read alone."""
    try:
        table_layout(path)
    except UserError as error:
        get_logger(__name__).warning("%s; the tar beside it is read without it", error)
        return False
    return True


def _not_downloaded(table: Path, columns: Sequence[str]) -> str:
    """What to do with a table that img2dataset did not write."""
    schema = table_schema(table)
    if held := image_columns(schema):
        return (
            f"{table} is no output of img2dataset, but holds images (in {', '.join(held)}): read it with the source "
            f"parquet: python -m data_prep.build parquet --input {quote(str(table))} --output DIR"
        )
    strings = text_columns(schema)
    url = url_column(strings)
    if url is None:
        return f"{table} holds neither images nor URLs of images (columns: {', '.join(columns)})"
    caption = caption_column(strings)
    wanted = (*itertools.chain.from_iterable(FILTER_COLUMNS.values()), *LAION_COCO_COLUMNS)
    more = [column for column in wanted if column in columns and column != caption]
    commands = fetch_commands(
        table, input_format="parquet", url_column=url, caption_column=caption, more_columns=more
    )
    return (
        f"{table} holds no pictures (columns: {', '.join(columns)}). Download them first, then give the "
        f"output folder as --input:\n{commands}"
    )


def url_column(columns: Sequence[str]) -> str | None:
    """Which of these columns of text holds URLs, by its name."""
    likely = (column for column in columns if "url" in column.lower() and "://" not in column)
    return next((column for column in ("url", "URL") if column in columns), next(likely, None))


def caption_column(columns: Sequence[str]) -> str | None:
    """Which of these columns of text holds captions, by its name."""
    likely = (column for column in columns if "caption" in column.lower() or "text" in column.lower())
    return next((column for column in CAPTION_NAMES if column in columns), next(likely, None))


def _list_not_downloaded(path: Path) -> str:
    fields, delimiter = read_header(path)
    kind = path.suffix[1:].lower()
    caption: str | None = None
    url = "url"
    if kind == "txt":
        urls, first = path, ""
    elif found := url_column(fields):
        urls, url, caption, first = path, found, caption_column(fields), ""
    else:
        names = [f"column{place}" for place in range(len(fields))]
        place = next((place for place, field in enumerate(fields) if "://" in field), len(fields) - 1)
        names[place - 1], names[place] = "caption", "url"
        urls = path.with_name(f"titled-{path.name}")
        caption = "caption" if len(names) > 1 else None
        title = delimiter.join(names).replace("\t", "\\t")
        first = (
            "It has no header line with a url (CC3M's list has none), so add one:\n"
            f"(printf '{title}\\n'; cat {quote(str(path))}) > {quote(str(urls))}\n"
        )
    commands = fetch_commands(urls, input_format=kind, url_column=url, caption_column=caption)
    return (
        f"{path} is a list of URLs. Download the pictures first, then give the output folder as --input. "
        f"{first}\n{commands}"
    )
