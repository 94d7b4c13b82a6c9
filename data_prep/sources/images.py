"""Pictures without text: stage 1 trains on them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources import Dropped, Record
from data_prep.sources.inputs import list_files
from vlgpt.document import Document, ImagePart
from vlgpt.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class ImagesSource:
    """All picture files in the --input folders, at any depth, in the order of their names; no text."""

    def __init__(self, inputs: Sequence[Path], *, licence: Annotated[str, "for the manifest"] = "unknown"):
        self._files: list[tuple[Path, str]] = []
        for path in inputs:
            root = path if path.is_dir() else path.parent
            found = [file.path for file in list_files([path], SUFFIXES)]
            self._files += [(file, file.relative_to(root).as_posix()) for file in found]
        if not self._files:
            raise UserError(
                f"the images source found no file ending in {', '.join(SUFFIXES)} in --input {inputs}"
            )
        self.licence = licence

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """Documents with one image part."""
        for path, name in self._files[start:stop]:
            yield Record(Document(name, "images", (ImagePart(0),)), (path,))
