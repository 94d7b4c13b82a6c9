"""Sources: each reads one on-disk format and gives Documents. A new source is one file, here or in your own package.

A source class is made as `SomeSource(inputs, *, option=default, ...)`: `inputs` are the paths after
`--input`, and every keyword parameter becomes a flag (`Annotated[int, "help text"]`; str, int, float, bool,
Path, Literal and `X | None` work). Its docstring says what it reads. Apart from the three members of `Source`
it may set `image_format` ("jpg" or "png", the build's default encoding) and `libraries` (names of packages
whose version decides its output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from vlgpt.document import Document
from vlgpt.registry import load_class

ImageOpener = bytes | Path | Callable[[], bytes]

SOURCES: dict[str, str] = {
    "folder": "data_prep.sources.folder:FolderSource",
    "images": "data_prep.sources.images:ImagesSource",
    "text": "data_prep.sources.text:TextSource",
    "img2dataset": "data_prep.sources.img2dataset:Img2datasetSource",
    "mmc4": "data_prep.sources.mmc4:Mmc4Source",
    "obelics": "data_prep.sources.obelics:ObelicsSource",
    "llava": "data_prep.sources.llava:LlavaSource",
    "svit": "data_prep.sources.svit:SvitSource",
    "coco": "data_prep.sources.coco:CocoSource",
    "instructpix2pix": "data_prep.sources.instructpix2pix:InstructPix2PixSource",
    "magicbrush": "data_prep.sources.magicbrush:MagicBrushSource",
    "gimp_help": "data_prep.sources.gimp_help:GimpHelpSource",
}


@dataclass(frozen=True)
class Record:
    """One document and its images, still as found: the build opens, decodes and encodes them, not the source.

    `document.info` may carry numbers that filters read under these names: `similarity`, `aesthetic`,
    `watermark`, `nsfw`, `url`, `image_urls` and `similarities` (lists, one entry per image), and anything
    else that is worth keeping. `lost` names the reasons for pictures that the source itself had to leave out
    of the document; the build counts them with those that cannot be decoded.
    """

    document: Document
    images: tuple[ImageOpener, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """An input record that gives no document: `reason` is one word with underscores, `key` names the record
    for people.
    """

    reason: str
    key: str


@runtime_checkable
class Source(Protocol):
    """A fixed, ordered list of input records, readable in pieces by any number of tasks."""

    licence: str
    """One line on licence and attribution, stored in the manifest."""

    def __len__(self) -> int:
        """The number of input records: the same at every call, on every machine."""
        ...

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Exactly `stop - start` items, always the same for the same range. Raises UserError for unreadable
        input.
        """
        ...


def source_class(name: str) -> type[Source]:
    """The class behind a short name or `package.module:Class`. Raises UserError for an unknown name."""
    return load_class(name, Source, key="source", known=SOURCES)
