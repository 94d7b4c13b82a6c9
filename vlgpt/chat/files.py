"""A conversation as files: dialogue.json, its images as PNG, and the embeddings of drawn ones."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from vlgpt.chat.dialogue import Content, Dialogue, Picture, Turn
from vlgpt.errors import UserError
from vlgpt.images import png_bytes

RECORD, EMBEDDINGS = "dialogue.json", "visual.safetensors"
MAX_FILES, MAX_FILE_BYTES, MAX_TOTAL_BYTES = 500, 64 << 20, 256 << 20  # of a dialogue that is read


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextRecord(_Strict):
    """A piece of text."""

    type: Literal["text"] = "text"
    text: str


class PictureRecord(_Strict):
    """An image; `is_drawn` says that its embeddings are stored under the file's name."""

    type: Literal["picture"] = "picture"
    file: str = Field(pattern=r"^[a-z0-9-]+\.png$")
    is_drawn: bool = False


class TurnRecord(_Strict):
    """One turn."""

    speaker: Literal["user", "assistant"]
    content: list[Annotated[TextRecord | PictureRecord, Field(discriminator="type")]]


class DialogueRecord(_Strict):
    """dialogue.json. `info` is free: model name and settings of the program that saved it."""

    format: Literal["vlgpt-dialogue-1"] = "vlgpt-dialogue-1"
    info: dict[str, Any] = {}
    turns: list[TurnRecord]


def to_files(dialogue: Dialogue, *, info: dict[str, object] | None = None) -> dict[str, bytes]:
    """File name -> bytes."""
    files: dict[str, bytes] = {}
    embeddings = {}
    turns = []
    for number, turn in enumerate(dialogue.turns):
        content: list[TextRecord | PictureRecord] = []
        for item in turn.content:
            if isinstance(item, str):
                content.append(TextRecord(text=item))
                continue
            name = f"turn-{number + 1:03d}-{turn.speaker}-{len(content):02d}.png"
            files[name] = item.data if item.visual is not None else png_bytes(item.image)
            if item.visual is not None:
                embeddings[name] = item.visual.float().contiguous()
            content.append(PictureRecord(file=name, is_drawn=item.visual is not None))
        turns.append(TurnRecord(speaker=turn.speaker, content=content))
    if embeddings:
        files[EMBEDDINGS] = save_tensors(embeddings)
    record = DialogueRecord(info=info or {}, turns=turns)
    return {RECORD: (record.model_dump_json(indent=1) + "\n").encode(), **files}


def from_files(read: Callable[[str], bytes]) -> Dialogue:
    """Inverse of `to_files`; `read` gives a file's bytes. Raises UserError that names what is wrong."""
    try:
        record = DialogueRecord.model_validate_json(read(RECORD))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{RECORD} is no saved dialogue: {where}: {first['msg']}") from error
    drawn = any(getattr(item, "is_drawn", False) for turn in record.turns for item in turn.content)
    try:
        embeddings = load_tensors(read(EMBEDDINGS)) if drawn else {}
    except SafetensorError as error:
        raise UserError(f"{EMBEDDINGS} cannot be read: {error}") from error

    def content_of(item: TextRecord | PictureRecord) -> Content:
        if isinstance(item, TextRecord):
            return item.text
        picture = Picture.read(read(item.file), name=f"{item.file} of the dialogue")
        if item.is_drawn and item.file not in embeddings:
            raise UserError(f"{EMBEDDINGS} holds no embeddings of {item.file}")
        return Picture(picture.data, embeddings[item.file]) if item.is_drawn else picture

    turns = [Turn(turn.speaker, tuple(content_of(item) for item in turn.content)) for turn in record.turns]
    return Dialogue(tuple(turns))


def save(dialogue: Dialogue, folder: Path, *, info: dict[str, object] | None = None) -> None:
    """Write the dialogue into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in to_files(dialogue, info=info).items():
        (folder / name).write_bytes(data)


def load(path: Path) -> Dialogue:
    """Read a folder of `save` or a zip file of `to_zip`. Raises UserError or FileNotFoundError."""
    if path.is_file():
        return from_zip(path.read_bytes())

    def read(name: str) -> bytes:
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}: it is no saved dialogue")
        return (path / name).read_bytes()

    return from_files(read)


def to_zip(dialogue: Dialogue, *, info: dict[str, object] | None = None) -> bytes:
    """The dialogue as one zip file, equal for equal dialogues."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in to_files(dialogue, info=info).items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def from_zip(data: bytes) -> Dialogue:
    """Inverse of `to_zip`, for files from strangers: nothing is unpacked to disk, sizes are bounded.

    Raises UserError.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(f"this is no zip file of a dialogue: {error}") from error
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) > MAX_FILES or sum(entry.file_size for entry in entries.values()) > MAX_TOTAL_BYTES:
        raise UserError(
            f"the dialogue is too large: at most {MAX_FILES} files of {MAX_TOTAL_BYTES >> 20} MiB"
        )

    def read(name: str) -> bytes:
        entry = entries.get(name)
        if entry is None:
            raise UserError(f"the zip file holds no {name}: it is no saved dialogue")
        try:
            with archive.open(entry) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            NotImplementedError,
            RuntimeError,
            EOFError,
            OSError,
        ) as error:
            raise UserError(f"{name} of the dialogue cannot be unpacked: {error}") from error
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"{name} of the dialogue is larger than {MAX_FILE_BYTES >> 20} MiB")
        return content

    return from_files(read)
