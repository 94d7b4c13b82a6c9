"""What the sources of dialogues and pages in JSON files share: their records, and the images beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from data_prep.sources.base import ConvertingSource
from data_prep.sources.inputs import require_keys
from data_prep.sources.join import ImageFinder
from data_prep.sources.records import JsonRecords, RawRecord, TableRows
from vlgpt.errors import UserError


class JsonSource(ConvertingSource[RawRecord]):
    """A source of JSON files (a list, or JSON Lines) whose images lie in folders or tars.

    A subclass sets `name`, what its files are called (`what`), and the keys that the first record must have (`wanted`:
    meaning -> accepted names). Raises UserError when they are missing, naming the keys found.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    wanted: ClassVar[Mapping[str, Sequence[str]]]

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None, "folders or tars with the images; else beside the input"
        ] = None,
    ):
        self.records: JsonRecords | TableRows = self._open(inputs)
        self.images = ImageFinder(images or sorted({file.path.parent for file in self.records.files}))

    def _open(
        self,
        inputs: Sequence[Path],
        *,
        kind: str = "records",
        count: Callable[[object], int] | None = None,
    ) -> JsonRecords | TableRows:
        records = JsonRecords(inputs, source=self.name, kind=kind, count=count)
        first = records.first()
        try:
            require_keys(first.value, self.wanted, where=first.file.path, what=self.what)
        except UserError as error:
            raise UserError(f"{error}{_unwrap_help(first)}") from error
        return records


def _unwrap_help(record: RawRecord) -> str:
    """How to get at records that a file keeps within one object; empty where it does not."""
    path = record.file.path
    for name, value in record.value.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return (
                f"; if the records are the list under {name!r}: jq '.[{json.dumps(name)}]' {path} > NEW.json"
            )
    if len(record.value) > 1 and all(isinstance(value, dict) for value in record.value.values()):
        return f"; if the records are its values: jq '[.[]]' {path} > NEW.json"
    return ""
