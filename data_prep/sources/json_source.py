"""What the sources of dialogues and pages in JSON files share: their records, and the images beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from data_prep.sources.base import ConvertingSource
from data_prep.sources.inputs import list_files, require_keys
from data_prep.sources.join import ImageFinder
from data_prep.sources.records import TABLE_SUFFIXES, JsonRecords, RawRecord, TableRows, table_layout
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

    def _open(self, inputs: Sequence[Path]) -> JsonRecords | TableRows:
        return open_json(inputs, self.wanted, source=self.name, what=self.what)


def open_records(
    inputs: Sequence[Path], wanted: Mapping[str, Sequence[str]], *, source: str, what: str
) -> JsonRecords | TableRows:
    """The records of Parquet or Arrow files where there are any, with all their columns; else of JSON files."""
    tables = [file.path for file in list_files(inputs, TABLE_SUFFIXES)]
    columns = {name for path in tables if _is_table(path) for name in table_layout(path)[0]}
    if not columns:
        return open_json(inputs, wanted, source=source, what=what)
    return TableRows(inputs, wanted, optional=sorted(columns), source=source, what=what)


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLE_SUFFIXES)


def open_json(
    inputs: Sequence[Path],
    wanted: Mapping[str, Sequence[str]],
    *,
    source: str,
    what: str,
    kind: str = "records",
    count: Callable[[object], int] | None = None,
) -> JsonRecords:
    """The records of JSON files. Raises UserError when the first has not the keys that are wanted."""
    records = JsonRecords(inputs, source=source, kind=kind, count=count)
    first = records.first()
    try:
        require_keys(first.value, wanted, where=first.file.path, what=what)
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
