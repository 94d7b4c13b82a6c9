"""The prompts of the paper (Tables 6 and 7) as data: `load("vlgpt")["qa"].parts(question="What is it?")`.

The YAML beside this file holds each prompt byte for byte as the paper prints it. A template is cut into parts
*before* values are filled in, so a question that holds "<image>" or "USER:" stays plain text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import Field

from vlgpt.config import read_yaml, validate
from vlgpt.document import ImagePart, Part, Role, TextPart
from vlgpt.errors import UserError
from vlgpt.settings import Settings

FOLDER = Path(__file__).parent
MARKERS = re.compile(r"(<image>|USER:|ASSISTANT:|\[IMG\]$)")
ROLE_OF: dict[str, Role] = {"USER:": "user", "ASSISTANT:": "assistant"}


class PromptRow(Settings):
    """The templates of one kind of question."""

    prompt: str
    demonstration: str = ""
    start: str = ""
    candidate: str = ""
    source: str = ""


class PromptFile(Settings):
    """A prompt file; vlgpt.yaml says what each key is for."""

    kind: str
    prompts: dict[str, PromptRow]
    strip: dict[str, str] = Field(default_factory=dict)


@cache
def _pieces(template: str) -> tuple[str, ...]:
    """A template cut at its markers, the markers included. Cached, since a split has up to 214,354 prompts."""
    return tuple(MARKERS.split(template))


@dataclass(frozen=True)
class PromptTemplate:
    """One row of a prompt file: `text` holds its templates (prompt, demonstration, start, candidate)."""

    kind: str
    name: str
    text: Mapping[str, str]
    source: str = ""
    strip: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def hash(self) -> str:
        """Changes with every byte of the templates and with the stripping rules."""
        content = json.dumps([self.text, self.strip], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def gives_image_token(self) -> bool:
        """Whether the prompt itself ends with [IMG], so that the model starts with an image."""
        return self.text["prompt"].endswith("[IMG]")

    def fill(self, template: str, **values: str) -> str:
        """Put values into one template, each cut by its strip rule. Raises UserError for a missing one."""

        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name not in values:
                raise UserError(f"prompt {self.id} needs {name!r}; given: {', '.join(values) or 'nothing'}")
            return " ".join(values[name].split()).rstrip(self.strip.get(name, "") + " ")

        return re.sub(r"\{(\w+)\}", value, template)

    def parts(self, which: str = "prompt", *, has_image: bool = True, **values: str) -> tuple[Part, ...]:
        """The document parts of a template; `has_image=False` leaves its images out."""
        if which not in self.text:
            raise UserError(f"prompt {self.id} has no {which!r}; it has: {', '.join(self.text)}")
        role: Role = "plain"
        parts: list[Part] = []
        num_images = 0
        for piece in _pieces(self.text[which]):
            if piece in ROLE_OF:
                role = ROLE_OF[piece]
            elif piece == "<image>":
                if has_image:
                    parts.append(ImagePart(num_images, role))
                    num_images += 1
            elif piece.strip() and piece != "[IMG]":
                parts.append(TextPart(self.fill(piece, **values).strip(), role))
        return tuple(parts)

    def candidate(self, answer: str) -> str:
        """An answer as it is scored by likelihood after the prompt."""
        return self.fill(self.text.get("candidate", "{answer}"), answer=answer)


@cache
def load(kind: str = "vlgpt") -> Mapping[str, PromptTemplate]:
    """All prompts of one model kind (`vlgpt`, `vlgpt-i`) or of a YAML file of your own. Raises UserError."""
    path = Path(kind) if kind.endswith(".yaml") else FOLDER / f"{kind}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"prompt file {kind!r} not found; valid: {known}, or the path of a .yaml file")
    content = validate(PromptFile, read_yaml(path), where=str(path))
    return {
        name: PromptTemplate(
            kind=content.kind,
            name=name,
            text=row.model_dump(exclude_unset=True, exclude={"source"}),
            source=row.source,
            strip=content.strip,
        )
        for name, row in content.prompts.items()
    }


def merge_text(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Join neighbouring texts of one role by a space, so that a prompt is tokenised like a training text."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, TextPart) and isinstance(last, TextPart) and last.role == part.role:
            merged[-1] = TextPart(f"{last.text} {part.text}", part.role)
        else:
            merged.append(part)
    return tuple(merged)
