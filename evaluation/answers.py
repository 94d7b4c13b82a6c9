"""Cutting a generated reply down to the answer that is scored. Which cut ran is part of every result.

A model trained on free text goes on after the answer; each published evaluation cuts differently, and that alone moves
scores by points. The cuts of three public code bases, by name: `emu` (default), `openflamingo`, `llava`, `none`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from vlgpt.log import UserError


def emu_answer(text: str) -> str:
    """First line, cut at ". ", quote and ", ", lower case, no opening words (Emu1/mm_eval/datasets/utils.py)."""
    for mark in ("\n", ". ", '"', ", "):
        text = text.split(mark)[0]
    text = text.strip().lower()
    text = text[:-1] if text.endswith(".") else text
    for opening in ("it is ", "it's ", "a ", "an ", "the "):
        text = text.removeprefix(opening)
    return text


def emu_caption(text: str) -> str:
    """First line and first sentence, lower case, no final full stop (Emu1/mm_eval/datasets/coco.py)."""
    text = text.split("\n")[0].split(". ")[0]
    return text.removesuffix(".").lower()


def openflamingo_answer(text: str) -> str:
    """Cut where the model starts a new question, then at ", " (open_flamingo/eval/vqa_metric.py)."""
    text = re.split("Question|Answer|Short", text, maxsplit=1)[0]
    return re.split(", ", text, maxsplit=1)[0]


def openflamingo_caption(text: str) -> str:
    """Cut where the model starts a new caption, quotes removed (open_flamingo/eval/coco_metric.py)."""
    return text.split("Output", 1)[0].replace('"', "")


def llava_answer(text: str) -> str:
    """Without surrounding space and final full stops, lower case (LLaVA's GQA conversion)."""
    return text.strip().rstrip(".").lower()


ANSWER_CUTS: Mapping[str, Callable[[str], str]] = {
    "emu": emu_answer,
    "openflamingo": openflamingo_answer,
    "llava": llava_answer,
    "none": str,
}
CAPTION_CUTS: Mapping[str, Callable[[str], str]] = {
    "emu": emu_caption,
    "openflamingo": openflamingo_caption,
    "none": str,
}


def cut(text: str, name: str, cuts: Mapping[str, Callable[[str], str]] = ANSWER_CUTS) -> str:
    """Apply a cut by name. Raises UserError for an unknown one."""
    if name not in cuts:
        raise UserError(f"answer cut {name!r} is unknown; valid: {', '.join(cuts)}")
    return cuts[name](text)
