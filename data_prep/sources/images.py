"""Images without text: stage 1 trains on them too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import ConvertingSource, Listed, Record
from data_prep.sources.inputs import InputFile, list_files
from vlgpt.document import Document, ImagePart
from vlgpt.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImagesSource(ConvertingSource[InputFile]):
    """All image files in the --input folders, at any depth, in the order of their names; no text."""

    def __init__(self, inputs: Sequence[Path], *, licence: Annotated[str, "for the manifest"] = "unknown"):
        files = []
        for path in inputs:
            root = path if path.is_dir() else path.parent
            found = (file.path for file in list_files([path], SUFFIXES))
            files += [InputFile(file, file.relative_to(root).as_posix()) for file in found]
        if not files:
            raise UserError(
                f"the images source found no file ending in {', '.join(SUFFIXES)} in --input {inputs}"
            )
        self.records = Listed(files)
        self.licence = licence

    def make(self, raw: InputFile) -> Record:
        """A document of one image part."""
        return Record(Document(raw.name, "images", (ImagePart(0),)), (raw.path,))
