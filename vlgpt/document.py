"""The one record type: a `Document` is text and images in reading order.

A caption pair, a web page, a chat, an edit and a few-shot evaluation prompt are all Documents. data_prep writes them,
training reads them, evaluation prompts are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vlgpt.files import JsonObject

Role = Literal["plain", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)
TextPlace = Literal[
    "plain", "first", "user", "assistant"
]  # `first`: in the user turn that a chat begins with
IMAGE_MARK = "<image>"  # what people type in the place of an image; never a token


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text. `role` says who speaks: `plain` in pre-training documents, `user` or `assistant` in chats."""

    text: str
    role: Role = "plain"


@dataclass(frozen=True, slots=True)
class ImagePart:
    """The place of image number `index` of the sample."""

    index: int
    role: Role = "plain"


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class Document:
    """Text and images in reading order. Images are numbered 0, 1, ... in the order in which they appear.

    `info` is free JSON about provenance and truth (url, licence, hashes, attributes); training never reads it. Raises
    ValueError when a role is unknown, images are out of order, or chat and plain parts are mixed.
    """

    id: str
    source: str
    parts: tuple[Part, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_images, is_plain, is_chat = 0, False, False
        for part in self.parts:  # one pass: every sample of a training run comes through here
            if part.role == "plain":
                is_plain = True
            elif part.role in ROLES:
                is_chat = True
            else:
                raise ValueError(
                    f"document {self.id!r}: unknown role {part.role!r}; valid: {', '.join(ROLES)}"
                )
            if isinstance(part, ImagePart):
                if part.index != num_images:
                    images = [part.index for part in self.parts if isinstance(part, ImagePart)]
                    raise ValueError(
                        f"document {self.id!r}: images must be numbered 0, 1, ... in reading order, found {images}"
                    )
                num_images += 1
        if is_plain and is_chat:
            raise ValueError(
                f"document {self.id!r}: plain parts cannot be mixed with chat roles user and assistant"
            )

    @property
    def num_images(self) -> int:
        return sum(isinstance(part, ImagePart) for part in self.parts)

    @property
    def is_chat(self) -> bool:
        return any(part.role != "plain" for part in self.parts)

    @property
    def text(self) -> str:
        """All text, joined by single spaces."""
        return " ".join(part.text for part in self.parts if isinstance(part, TextPart))

    def to_record(self) -> JsonObject:
        """JSON form: `{"id", "source", "parts": [{"text"|"image", "role"?}, ...], "info"?}`."""
        parts: list[JsonObject] = []
        for part in self.parts:
            record: JsonObject = {"text": part.text} if isinstance(part, TextPart) else {"image": part.index}
            if part.role != "plain":
                record["role"] = part.role
            parts.append(record)
        record = {"id": self.id, "source": self.source, "parts": parts}
        if self.info:
            record["info"] = dict(self.info)
        return record

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Document:
        """Inverse of `to_record`. Raises ValueError that names the offending field."""
        missing = [key for key in ("id", "source", "parts") if key not in record]
        if missing:
            raise ValueError(
                f"a document record needs id, source and parts; missing {missing}, found {sorted(record)}"
            )
        parts = tuple(_part_from_record(record["id"], part) for part in record["parts"])
        return Document(record["id"], record["source"], parts, record.get("info", {}))


def _part_from_record(document_id: str, record: Mapping[str, Any]) -> Part:
    role = record.get("role", "plain")
    if isinstance(record.get("text"), str):
        return TextPart(record["text"], role)
    if type(record.get("image")) is int:
        return ImagePart(record["image"], role)
    raise ValueError(
        f"document {document_id!r}: a part holds a `text` string or an `image` number, found {dict(record)}"
    )


def text_places(roles: Sequence[Role]) -> list[TextPlace]:
    """The places of the parts of a document, by their roles: they decide how text is tokenised."""
    opening = next((number for number, role in enumerate(roles) if role != "user"), len(roles))
    places: list[TextPlace] = ["first"] * opening
    return [*places, *roles[opening:]]


def join(
    id: str, source: str, pieces: Sequence[Sequence[Part]], info: Mapping[str, object] | None = None
) -> Document:
    """Concatenate part lists, with the images renumbered in reading order (few-shot prompts, multi-turn chats)."""
    parts: list[Part] = []
    num_images = 0
    for piece in pieces:
        for part in piece:
            if isinstance(part, ImagePart):
                parts.append(ImagePart(num_images, part.role))
                num_images += 1
            else:
                parts.append(part)
    return Document(id, source, tuple(parts), info or {})
