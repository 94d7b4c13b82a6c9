"""python -m data_prep.urls SOURCE --input ... --output DIR: the image URLs of MMC4 or OBELICS, for img2dataset.

One Parquet file of distinct URLs for each input file, and the commands that download them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.console import Console

from data_prep.sources.base import BadRecord, Dropped
from data_prep.sources.fetch import fetch_commands
from data_prep.sources.obelics import page_items
from data_prep.sources.records import JsonRecords, TableRows
from vlgpt.errors import UserError, run_command
from vlgpt.files import replacing
from vlgpt.log import configure
from vlgpt.options import Argument, Options, parse

console = Console()


def mmc4_urls(inputs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(input file's name, URL) for every image."""
    records = JsonRecords(inputs, source="mmc4")
    for item in records.read(0, len(records)):
        if not isinstance(item, Dropped) and isinstance(item.value, dict):
            for entry in item.value.get("image_info") or ():
                if isinstance(entry, dict) and isinstance(entry.get("raw_url"), str):
                    yield item.file.name, entry["raw_url"]


def obelics_urls(inputs: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(input file's name, URL) for every image."""
    columns = {"images": ("images",), "texts": ("texts",)}
    rows = TableRows(inputs, columns, source="obelics", what="OBELICS table")
    for row in rows.read(0, len(rows)):
        if isinstance(row, Dropped):
            continue
        try:
            items = page_items(row.value)
        except BadRecord:
            continue  # the build counts these pages
        yield from ((row.file.name, url) for _, url in items if url is not None)


URLS: dict[str, Callable[[Sequence[Path]], Iterator[tuple[str, str]]]] = {
    "mmc4": mmc4_urls,
    "obelics": obelics_urls,
}


def write_url_lists(pairs: Iterator[tuple[str, str]], folder: Path) -> tuple[int, int]:
    """Write one parquet file of distinct URLs per input file: -> (number of files, number of URLs).

    `pairs`: (file name, URL), grouped by file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_files = num_urls = 0
    current, urls = "", dict[str, None]()

    def write() -> None:
        nonlocal num_files, num_urls
        if urls:
            path = folder / f"{current.replace('/', '-')}.parquet"
            with replacing(path) as temporary:
                pq.write_table(pa.table({"url": list(urls)}), temporary)
            num_files, num_urls = num_files + 1, num_urls + len(urls)

    for name, url in pairs:
        if name != current:
            write()
            current, urls = name, {}
        urls[url] = None
    write()
    return num_files, num_urls


class UrlOptions(Options):
    """The command line."""

    source: Annotated[Literal["mmc4", "obelics"], Argument(is_positional=True)]
    input: tuple[Path, ...] = Field(description="files or folders to read")
    output: Path = Field(description="folder for the lists")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parse(UrlOptions, argv, prog="python -m data_prep.urls", description=__doc__)
    configure()
    for path in options.input:
        if not path.exists():
            raise UserError(f"--input {path} does not exist")
    num_files, num_urls = write_url_lists(URLS[options.source](options.input), options.output)
    console.print(f"{num_urls} URLs in {num_files} files. Download them with:", highlight=False)
    commands = fetch_commands(options.output, input_format="parquet", url_column="url")
    console.print(commands, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
