"""Images in a folder with a table of captions: Hugging Face imagefolder and anything close to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import BadRecord, ConvertingSource, Record, mapping
from data_prep.sources.inputs import inside, list_files
from data_prep.sources.records import Concatenation, RawRecord, open_rows
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.image_formats import IMAGE_SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")


class FolderSource(ConvertingSource[RawRecord]):
    """`metadata.jsonl` or `metadata.csv` with the columns `file_name` and `text`, beside the images (any depth).

    Another table can be given as --input itself (.jsonl, .csv, .tsv); file names are relative to its folder. Other
    columns are kept; numbers under `similarity`, `aesthetic`, `watermark`, `nsfw` and a `url` serve the filters.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        file_column: Annotated[str, "column with the image's file name"] = "file_name",
        text_column: Annotated[str, "column with the caption"] = "text",
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        tables: list[Path] = []
        for path in inputs:
            files = [file.path for file in list_files([path], METADATA, others=IMAGE_SUFFIXES)]
            tables += [file for file in files if file.name in METADATA] if path.is_dir() else [path]
        if not tables:
            raise UserError(
                f"the folder source needs a {' or '.join(METADATA)} in --input, found none in {inputs}"
            )
        self.records = Concatenation([open_rows(path) for path in tables])
        self._file_column, self._text_column = file_column, text_column
        self.licence = licence

    def make(self, raw: RawRecord) -> Record:
        """A pair of image and caption."""
        columns = mapping(raw.value)
        name, text = columns.get(self._file_column), columns.get(self._text_column)
        if not isinstance(name, str) or not name:
            raise BadRecord("no_file_name")
        if not isinstance(text, str):
            raise BadRecord("no_text")
        path = inside(raw.file.path.parent, name)
        if path is None:
            raise BadRecord("path_outside_folder")
        info = {
            key: _number(value)
            for key, value in columns.items()
            if key not in (self._file_column, self._text_column)
        }
        return Record(Document(name, "folder", (ImagePart(0), TextPart(text.strip())), info), (path,))


def _number(value: object) -> object:
    """CSV gives strings: numbers become numbers again."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
