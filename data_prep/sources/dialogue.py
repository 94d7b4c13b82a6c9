"""Turns of LLaVA- and SVIT-style dialogues -> parts of a chat."""

from __future__ import annotations

import re

from data_prep.sources.base import BadRecord, cleaned
from vlgpt.document import ImagePart, Part, Role, TextPart
from vlgpt.shards.samples import visible

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_TOKEN = re.compile(r"<image>|<\|image\|>|<img></img>", re.IGNORECASE)
OTHER_IMAGE_TOKEN = re.compile(r"<\|?(image|img)([\w-]*|\s?\d+)\|?>|\[ImageHere\]", re.IGNORECASE)
"""Numbered images and the like: what they stand for differs from publisher to publisher."""
OTHER_MEDIA_TOKEN = re.compile(
    r"<\|?(video|audio|speech|sound|music|point_?cloud)(s|_?\d+|_?pad)?\|?>", re.IGNORECASE
)


def dialogue_parts(turns: object, *, num_images: int) -> tuple[Part, ...]:
    """A chat in which every `<image>` of a question is an image part; without any, the images come first.

    Accepts `from` (or `role`) in human, user, gpt, assistant and the text under `value` or `content`. Raises
    BadRecord `no_turns`, `bad_turn`, `unknown_role`, `empty_turn`, `no_reply`, `other_media` for tokens of films and
    sounds, or `image_tokens` when the tokens are not as many as the images, or not those of LLaVA.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRecord("no_turns")
    spoken = [_turn(turn) for turn in turns]
    while spoken and spoken[0][0] == "assistant":
        spoken = spoken[1:]  # UPSTREAM: LLaVA's preprocessing skips what comes before the first question
    if not any(role == "assistant" for role, _ in spoken):
        raise BadRecord("no_reply")
    has_tokens = any(IMAGE_TOKEN.search(text) for _, text in spoken)
    parts: list[Part] = [] if has_tokens else [ImagePart(index, "user") for index in range(num_images)]
    found = len(parts)
    for role, text in spoken:
        pieces = IMAGE_TOKEN.split(text)
        if len(pieces) > 1 and role == "assistant":
            raise BadRecord("image_tokens", "in a reply")
        if token := OTHER_MEDIA_TOKEN.search(text):
            raise BadRecord("other_media", token[0])
        for place, piece in enumerate(pieces):
            if token := OTHER_IMAGE_TOKEN.search(piece):
                raise BadRecord("image_tokens", token[0])
            if place:
                parts.append(ImagePart(found, "user"))
                found += 1
            if shown := visible(piece):
                parts.append(TextPart(shown, role))
    if found != num_images:
        raise BadRecord("image_tokens", f"{found} tokens, {num_images} images")
    return tuple(parts)


def _turn(turn: object) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise BadRecord("bad_turn")
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str):
        raise BadRecord("bad_turn")
    if speaker.lower() not in ROLES:
        raise BadRecord("unknown_role", speaker)
    text = turn["value"] if isinstance(turn.get("value"), str) else turn.get("content")
    return ROLES[speaker.lower()], cleaned(text, word="turn")
