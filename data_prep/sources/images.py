"""Images without text: stage 1 trains on them too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from data_prep.sources.base import ConvertingSource, Listed, Record
from data_prep.sources.inputs import InputFile, report_passed_over, suffix_of, walk
from vlgpt.document import Document, ImagePart
from vlgpt.errors import UserError
from vlgpt.image_formats import FORMATS, HEIF_SUFFIXES, IMAGE_SUFFIXES, INSTALL, PREFIX_BYTES, format_of
from vlgpt.images import can_read


class ImagesSource(ConvertingSource[InputFile]):
    """All image files in the --input folders, at any depth, in the order of their names; no text.

    They are known by their suffix, and files without one by their content. HEIC needs `pip install pillow-heif`.
    """

    def __init__(self, inputs: Sequence[Path], *, licence: Annotated[str, "for the manifest"] = "unknown"):
        found, passed_over = walk(inputs)
        files, given = [], set(inputs)
        for file in found:
            if file.path in given or not (kind := _passed_over(file)):
                files.append(file)
            else:
                passed_over[kind] += 1
        report_passed_over(passed_over)
        if not files:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"the images source found no file ending in {suffixes} in --input {inputs}")
        self.records = Listed(files)
        self.licence = licence

    def make(self, raw: InputFile) -> Record:
        """A document of one image part."""
        return Record(Document(raw.name, "images", (ImagePart(0),)), (raw.path,))


def _passed_over(file: InputFile) -> str:
    """Empty for an image, else what to call the file in the list of those that are not looked at."""
    name = file.name.lower()
    if name.endswith(HEIF_SUFFIXES) and not can_read("HEIF"):
        return f"{suffix_of(name)} (pip install {INSTALL['HEIF']})"
    if name.endswith(IMAGE_SUFFIXES):
        return ""
    if suffix := suffix_of(name):
        return suffix
    try:
        with file.path.open("rb") as opened:
            is_image = format_of(opened.read(PREFIX_BYTES)) in FORMATS
    except OSError:
        is_image = False
    return "" if is_image else "without suffix"
