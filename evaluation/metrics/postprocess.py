"""Cutting a generated text down to the answer or caption, in the ways of published evaluators.

emu          Emu1/mm_eval: first line, first sentence; answers also lose a leading "it is" and article
openflamingo open_flamingo/eval: text before the next demonstration's words
llava        without surrounding spaces; answers also in lower case and without the final full stop
none         unchanged
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

Style = Literal["emu", "openflamingo", "llava", "none"]
Cut = Callable[[str], str]

_EMU_OPENINGS = ("it is ", "it's ", "a ", "an ", "the ")


def cut_answer(text: str, style: Style = "emu") -> str:
    """Short answer within a generated text. Raises ValueError for an unknown style."""
    return _styled(_ANSWER_CUTS, style)(text)


def cut_caption(text: str, style: Style = "emu") -> str:
    """Caption within a generated text. Raises ValueError for an unknown style."""
    return _styled(_CAPTION_CUTS, style)(text)


def _styled(cuts: Mapping[str, Cut], style: str) -> Cut:
    if style not in cuts:
        raise ValueError(f"cut style is {style!r}; wanted one of {', '.join(cuts)}")
    return cuts[style]


def _emu_answer(text: str) -> str:
    text = text.split("\n")[0].split(". ")[0].split('"')[0].split(", ")[0]
    text = text.strip().lower().removesuffix(".")
    for opening in _EMU_OPENINGS:
        text = text.removeprefix(opening)
    return text


_ANSWER_CUTS: Mapping[str, Cut] = {
    "emu": _emu_answer,
    "openflamingo": lambda text: re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0],
    "llava": lambda text: text.strip().rstrip(".").lower(),
    "none": lambda text: text,
}
_CAPTION_CUTS: Mapping[str, Cut] = {
    "emu": lambda text: text.split("\n")[0].split(". ")[0].removesuffix(".").lower(),
    "openflamingo": lambda text: text.split("Output", 1)[0].replace('"', ""),
    "llava": str.strip,
    "none": lambda text: text,
}
