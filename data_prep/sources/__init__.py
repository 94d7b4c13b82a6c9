"""Sources: each reads one on-disk format and gives Documents. A new source is one file, here or in your own package.

A source class is made as `SomeSource(inputs, *, option=default, ...)`: `inputs` are the paths after
`--input`, and every keyword parameter becomes a flag (`Annotated[int, "help text"]`; str, int, float, bool,
Path, Literal and `X | None` work). Its docstring says what it reads. Apart from the three members of `Source`
it may set `image_format` ("jpg" or "png", the build's default encoding) `libraries` (names of packages
whose version decides its output) and `recipe` (JSON that decides its output beside the options).
"""

from __future__ import annotations

from data_prep.sources.base import Dropped, ImageOpener, Record, Source
from vlgpt.registry import load_class

__all__ = ["SOURCES", "Dropped", "ImageOpener", "Record", "Source", "source_class"]

SOURCES: dict[str, str] = {
    "folder": "data_prep.sources.folder:FolderSource",
    "images": "data_prep.sources.images:ImagesSource",
    "parquet": "data_prep.sources.parquet:ParquetSource",
    "text": "data_prep.sources.text:TextSource",
    "mapped": "data_prep.sources.mapped:MappedSource",
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


def source_class(name: str) -> type[Source]:
    """The class behind a short name or `package.module:Class`. Raises UserError for an unknown name."""
    return load_class(name, Source, key="source", known=SOURCES)
