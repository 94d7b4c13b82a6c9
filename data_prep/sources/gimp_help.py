"""The GIMP manual (Debian's gimp-help-en): real interleaved pages, and images before and after a filter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from data_prep.sources.base import BadRecord, ConvertingSource, ImageOpener, Listed, Record
from data_prep.sources.inputs import InputFile, find_files, inside
from data_prep.sources.templates import edit_chat
from data_prep.sources.web_page import Block, captioned_images, read_page
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage

APPLIED = re.compile(r"\bapplied\b", re.IGNORECASE)
QUOTED = re.compile("“([^”]+)”")
ICONS = re.compile(r"images/(note|tip|warning|caution|important)\.png")


@dataclass(frozen=True, slots=True)
class Edit:
    """Two images of one figure, and the filter that leads from one to the other."""

    key: str
    page: Path
    before: str
    after: str
    name: str


class GimpHelpSource(ConvertingSource[InputFile | Edit]):
    """HTML pages unpacked by data_prep/fetch_gimp_help.sh. `documents` are the pages with images, in reading
    order; `edits` are the (original, filter applied) images as editing chats.
    """

    licence = "GIMP manual: (c) The GIMP Documentation Team, GFDL 1.2 or later, no invariant sections"
    is_image_optional = True

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        kind: Annotated[Literal["documents", "edits"], "what to make of the pages"] = "documents",
    ):
        pages = find_files(inputs, (".html",), source="gimp_help")
        edits = [edit for page in pages for edit in _edits(page)] if kind == "edits" else None
        self.records = Listed[InputFile | Edit](pages if edits is None else edits)

    def make(self, raw: InputFile | Edit) -> Record:
        """One page, or one pair of images."""
        return _page_record(raw) if isinstance(raw, InputFile) else _edit_record(raw)


def _page_record(page: InputFile) -> Record:
    parts: list[Part] = []
    openers: list[ImageOpener] = []
    lost = []
    for block in read_page(_html(page.path)).blocks:
        if block.text:
            follows_text = bool(parts) and isinstance(parts[-1], TextPart)
            parts.append(TextPart(f"\n\n{block.text}" if follows_text else block.text))
            continue
        if ICONS.fullmatch(block.source):
            continue
        try:
            openers.append(_image(page.path, block.source))
        except BadImage as error:
            lost.append(error.reason)
        else:
            parts.append(ImagePart(len(openers) - 1))
    if not openers:
        raise BadRecord(lost[0] if lost else "filtered:no_image")
    return Record(Document(page.key, "gimp_help", tuple(parts)), tuple(openers), tuple(lost))


def _edit_record(edit: Edit) -> Record:
    images = tuple(_image(edit.page, source) for source in (edit.before, edit.after))
    instruction = f"Apply the filter {edit.name}"
    info = {"instruction": instruction, "filter": edit.name}
    return Record(Document(edit.key, "gimp_help", edit_chat([(instruction, True)]), info), images)


def _edits(page: InputFile) -> Iterator[Edit]:
    """Every image captioned `... applied`, with the original (or first) image before it in its figure."""
    content = read_page(_html(page.path))
    for images in captioned_images(content):
        before: Block | None = None
        for block in images:
            if not APPLIED.search(block.caption):
                before = block if before is None or block.caption.startswith("Original") else before
            elif before is not None:
                quoted = QUOTED.search(block.caption)
                name = (quoted[1] if quoted else content.title).removesuffix("…")
                yield Edit(f"{page.key}:{block.source}", page.path, before.source, block.source, name)


def _html(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from error


def _image(page: Path, source: str) -> Path:
    """Raises BadImage `path_outside_folder` or `missing_file`."""
    path = inside(page.parent, source)
    if path is None:
        raise BadImage("path_outside_folder", source)
    if not path.is_file():
        raise BadImage("missing_file", source)
    return path
