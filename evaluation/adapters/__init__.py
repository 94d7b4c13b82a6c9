"""VL-GPT inside other evaluation harnesses: their messages -> our prompts."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlgpt.decoding.api import Prompt
from vlgpt.document import Document, ImagePart, Part, Role, TextPart


def prompt_of(pieces: Sequence[str | Image.Image], *, is_chat: bool, id: str) -> Prompt:
    """Texts and images in reading order as one user turn (`is_chat`) or as a plain document to go on with."""
    role: Role = "user" if is_chat else "plain"
    parts: list[Part] = []
    images: list[Image.Image] = []
    for piece in pieces:
        if isinstance(piece, str):
            if piece.strip():
                parts.append(TextPart(piece.strip(), role))
        else:
            parts.append(ImagePart(len(images), role))
            images.append(piece.convert("RGB"))
    return Prompt(Document(id, "harness", tuple(parts)), tuple(images), id)
