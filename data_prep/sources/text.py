"""Text without pictures: a share of it in stage 2 keeps the language model from forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from data_prep.sources import Dropped, Record
from data_prep.sources.inputs import list_files
from data_prep.sources.json_records import LINES, JsonRecord, JsonRecords
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError


class TextSource:
    """JSON lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zip`) with a `text` column, as most text corpora have them; one
    document per line.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        text_column: Annotated[str, "column with the text"] = "text",
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        packed = [f"{suffix}{packing}" for suffix in LINES for packing in ("", ".gz", ".zip")]
        files = [file.path for file in list_files(inputs, packed)]
        if not files:
            raise UserError(f"the text source needs .jsonl files in --input, found none in {inputs}")
        self._records = JsonRecords(files, source="text")
        self._text_column = text_column
        self.licence = licence

    def __len__(self) -> int:
        return len(self._records)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Documents of one text part."""
        for item in self._records.read(start, stop):
            if not isinstance(item, JsonRecord):
                yield item
                continue
            key, columns = item.key, item.value
            if not isinstance(columns, dict):
                yield Dropped("bad_row", key)
                continue
            text = columns.get(self._text_column)
            if not isinstance(text, str) or not text.strip():
                yield Dropped("no_text", key)
                continue
            info: dict[str, Any] = {
                name: columns[name] for name in ("url", "id", "licence") if name in columns
            }
            yield Record(Document(key, "text", (TextPart(text.strip()),), info))
