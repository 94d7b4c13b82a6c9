"""Text without pictures: a share of it in stage 2 keeps the language model from forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from data_prep.sources import Dropped, Record
from data_prep.sources.rows import Rows, find_files, open_table
from vlgpt.document import Document, TextPart
from vlgpt.log import UserError


class TextSource:
    """JSON lines (`.jsonl`) with a `text` column, as most text corpora have them; one document per line."""

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        text_column: Annotated[str, "column with the text"] = "text",
        licence: Annotated[str, "licence of the data, for the manifest"] = "unknown",
    ):
        files = find_files(inputs, (".jsonl", ".ndjson"))
        if not files:
            raise UserError(f"the text source needs .jsonl files in --input, found none in {inputs}")
        self._rows = Rows([open_table(path) for path in files])
        self._text_column = text_column
        self.licence = licence

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Documents of one text part."""
        for _, row in self._rows.read(start, stop):
            if isinstance(row, Dropped):
                yield row
                continue
            key, columns = row
            text = columns.get(self._text_column)
            if not isinstance(text, str) or not text.strip():
                yield Dropped("no_text", key)
                continue
            info: dict[str, Any] = {
                name: columns[name] for name in ("url", "id", "licence") if name in columns
            }
            yield Record(Document(key, "text", (TextPart(text.strip()),), info))
