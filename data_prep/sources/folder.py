"""Pictures in a folder with a table of captions: Hugging Face imagefolder and anything close to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from data_prep.sources import Dropped, Record
from data_prep.sources.inputs import inside, list_files
from data_prep.sources.rows import Row, Rows, Table, open_table
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")


class FolderSource:
    """`metadata.jsonl` or `metadata.csv` with the columns `file_name` and `text`, beside the pictures (any
    depth).

    Another table can be given as --input itself (.jsonl, .csv, .tsv); file names are relative to its folder.
    Other columns are kept; numbers under `similarity`, `aesthetic`, `watermark`, `nsfw` and a `url` serve the
    filters.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        file_column: Annotated[str, "column with the picture's file name"] = "file_name",
        text_column: Annotated[str, "column with the caption"] = "text",
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        tables: list[Path] = []
        for path in inputs:
            files = [file.path for file in list_files([path], (".jsonl", ".csv"))]
            tables += [file for file in files if file.name in METADATA] if path.is_dir() else [path]
        if not tables:
            raise UserError(
                f"the folder source needs a {' or '.join(METADATA)} in --input, found none in {inputs}"
            )
        self._rows = Rows([open_table(path) for path in tables])
        self._file_column, self._text_column = file_column, text_column
        self.licence = licence

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Pairs (picture, caption)."""
        for table, row in self._rows.read(start, stop):
            yield row if isinstance(row, Dropped) else self._pair(table, row)

    def _pair(self, table: Table, row: Row) -> Record | Dropped:
        key, columns = row
        name, text = columns.get(self._file_column), columns.get(self._text_column)
        if not isinstance(name, str) or not name:
            return Dropped("no_file_name", key)
        if not isinstance(text, str):
            return Dropped("no_text", key)
        path = inside(table.path.parent, name)
        if path is None:
            return Dropped("path_outside_folder", key)
        others = {
            k: _number(v) for k, v in columns.items() if k not in (self._file_column, self._text_column)
        }
        document = Document(name, "folder", (ImagePart(0), TextPart(text.strip())), others)
        return Record(document, (path,))


def _number(value: Any) -> Any:
    """CSV gives strings: numbers become numbers again."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value
