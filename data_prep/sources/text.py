"""Text without images: a share of it in stage 2 keeps the language model from forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import BadRecord, ConvertingSource, Record, mapping
from data_prep.sources.inputs import list_files
from data_prep.sources.records import LINES, JsonRecords, RawRecord
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError


class TextSource(ConvertingSource[RawRecord]):
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
        files = [file.path for file in list_files(inputs, packed, others=())]
        if not files:
            raise UserError(f"the text source needs .jsonl files in --input, found none in {inputs}")
        self.records = JsonRecords(files, source="text")
        self._text_column = text_column
        self.licence = licence

    def make(self, raw: RawRecord) -> Record:
        """A document of one text part."""
        columns = mapping(raw.value)
        text = columns.get(self._text_column)
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("no_text")
        info = {name: columns[name] for name in ("url", "id", "licence") if name in columns}
        return Record(Document(raw.key, "text", (TextPart(text.strip()),), info))
