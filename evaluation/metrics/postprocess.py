"""Cutting a generated text down to the answer or caption, in the ways of published evaluators.

emu          Emu1/mm_eval: first line, first sentence; answers also lose a leading "it is" and article
openflamingo open_flamingo/eval: text before the next demonstration's words
llava        blanks and the final full stop off, lower case (answers); blanks off (captions)
none         unchanged
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

Style = Literal["emu", "openflamingo", "llava", "none"]

_EMU_OPENINGS = ("it is ", "it's ", "a ", "an ", "the ")


def cut_answer(text: str, style: Style = "emu") -> str:
    """Short answer within a generated text. Raises ValueError for an unknown style."""
    return _styled(_ANSWER_CUTS, style)(text)


def cut_caption(text: str, style: Style = "emu") -> str:
    """Caption within a generated text. Raises ValueError for an unknown style."""
    return _styled(_CAPTION_CUTS, style)(text)


def _styled(cuts: Mapping[str, Callable[[str], str]], style: str) -> Callable[[str], str]:
    if style not in cuts:
        raise ValueError(f"cut style is {style!r}; wanted one of {', '.join(cuts)}")
    return cuts[style]


def _unchanged(text: str) -> str:
    return text


def _emu_answer(text: str) -> str:
    text = text.split("\n")[0].split(". ")[0].split('"')[0].split(", ")[0]
    text = text.strip().lower().removesuffix(".")
    for opening in _EMU_OPENINGS:
        text = text.removeprefix(opening)
    return text


def _emu_caption(text: str) -> str:
    return text.split("\n")[0].split(". ")[0].removesuffix(".").lower()


def _openflamingo_answer(text: str) -> str:
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]


def _openflamingo_caption(text: str) -> str:
    return text.split("Output", 1)[0].replace('"', "")


def _llava_answer(text: str) -> str:
    return text.strip().rstrip(".").lower()


_ANSWER_CUTS: dict[str, Callable[[str], str]] = {
    "emu": _emu_answer, "openflamingo": _openflamingo_answer, "llava": _llava_answer, "none": _unchanged,
}  # fmt: skip
_CAPTION_CUTS: dict[str, Callable[[str], str]] = {
    "emu": _emu_caption, "openflamingo": _openflamingo_caption, "llava": str.strip, "none": _unchanged,
}  # fmt: skip
