"""The chats of the paper's appendix, Table 6, as Documents. The system message is in vlgpt/tokens.py."""

from __future__ import annotations

from collections.abc import Sequence

from vlgpt.document import ImagePart, Part, TextPart

CAPTION_REQUEST = "Provide a brief description of the given image"
GENERATION_REQUEST = "Create an image that visually represents the description: {caption}"
GENERATION_REPLY = "Here's the image:"
EDIT_REPLY = "Here is the edited image:"


def sentence(text: str) -> str:
    """The text with one full stop, as the templates print it; other final punctuation stays."""
    text = text.strip()
    return text if text.endswith(("!", "?")) else f"{text.rstrip('. ')}."


def caption_chat(caption: str) -> tuple[Part, ...]:
    """USER: request <image> ASSISTANT: caption."""
    return TextPart(CAPTION_REQUEST, "user"), ImagePart(0, "user"), TextPart(sentence(caption), "assistant")


def generation_chat(caption: str) -> tuple[Part, ...]:
    """USER: request with the caption. ASSISTANT: reply <image>"""
    request = GENERATION_REQUEST.format(caption=sentence(caption))
    return TextPart(request, "user"), TextPart(GENERATION_REPLY, "assistant"), ImagePart(0, "assistant")


def edit_chat(turns: Sequence[tuple[str, bool]]) -> tuple[Part, ...]:
    """USER: <image> instruction. ASSISTANT: reply <image> USER: ..., from (instruction, shows its source).

    A turn that does not show its source edits the image that was generated last.
    """
    parts: list[Part] = []
    num_images = 0
    for instruction, shows_source in turns:
        if shows_source:
            parts.append(ImagePart(num_images, "user"))
            num_images += 1
        parts.append(TextPart(sentence(instruction), "user"))
        parts += [TextPart(EDIT_REPLY, "assistant"), ImagePart(num_images, "assistant")]
        num_images += 1
    return tuple(parts)
