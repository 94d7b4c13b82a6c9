"""Turns of LLaVA- and SVIT-style dialogues -> parts of a chat."""

from __future__ import annotations

from data_prep.sources.base import BadRecord
from vlgpt.document import ImagePart, Part, Role, TextPart

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_TOKEN = "<image>"


def dialogue_parts(turns: object, *, num_images: int) -> tuple[Part, ...]:
    """A chat in which every `<image>` of a question is an image part; without any, the images come first.

    Accepts `from` (or `role`) in human, user, gpt, assistant and the text under `value` or `content`. Raises
    BadRecord `no_turns`, `bad_turn`, `unknown_role`, `empty_turn`, `no_reply`, or `image_tokens` when the
    tokens are not as many as the images.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRecord("no_turns")
    spoken = [_turn(turn) for turn in turns]
    while spoken and spoken[0][0] == "assistant":
        spoken = spoken[1:]  # UPSTREAM: LLaVA's preprocessing skips what comes before the first question
    if not any(role == "assistant" for role, _ in spoken):
        raise BadRecord("no_reply")
    has_tokens = any(IMAGE_TOKEN in text for _, text in spoken)
    parts: list[Part] = [] if has_tokens else [ImagePart(index, "user") for index in range(num_images)]
    found = len(parts)
    for role, text in spoken:
        pieces = text.split(IMAGE_TOKEN)
        if len(pieces) > 1 and role == "assistant":
            raise BadRecord("image_tokens")
        if not text.strip():
            raise BadRecord("empty_turn")
        for place, piece in enumerate(pieces):
            if place:
                parts.append(ImagePart(found, "user"))
                found += 1
            if piece.strip():
                parts.append(TextPart(piece.strip(), role))
    if found != num_images:
        raise BadRecord("image_tokens")
    return tuple(parts)


def _turn(turn: object) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise BadRecord("bad_turn")
    speaker = turn.get("from", turn.get("role"))
    if not isinstance(speaker, str):
        raise BadRecord("bad_turn")
    if speaker.lower() not in ROLES:
        raise BadRecord("unknown_role")
    text = turn["value"] if isinstance(turn.get("value"), str) else turn.get("content")
    if not isinstance(text, str):
        raise BadRecord("bad_turn")
    return ROLES[speaker.lower()], text
