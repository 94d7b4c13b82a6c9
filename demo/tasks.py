"""Chats about emoji that are true by construction: questions, descriptions, drawings and edits with a real
target image.

Describe, draw and edit use the templates of the paper's Table 6; questions are plain turns. Training draws a
fixed mixture, held-out splits list everything there is, so that evaluation only reads shards.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_prep.sources.templates import CAPTION_REQUEST, EDIT_REPLY, GENERATION_REPLY, GENERATION_REQUEST
from demo.catalogue import TONE_NAMES, Emoji
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.seeds import address, generator

T = TypeVar("T")
QUESTIONS = {
    "category": "What category is this?",
    "flag": "Is this a flag?",
    "subcategory": "What sub-category is this?",
    "tone": "What skin tone is this?",
    "gender": "Is this a man, a woman or a person?",
    "style": "What drawing style is this?",
    "is_a": "Is this {name}?",
}
IS_A_ANSWERS = ("yes", "hard", "yes", "easy")
"""Half yes; of the others half name a neighbour in the sub-category (hard) and half something else (easy)."""
MIXTURE = {"question": 50, "describe": 15, "draw": 15, "edit": 20}
EDIT_MIXTURE = {"tone": 50, "gender": 25, "style": 25}


@dataclass(frozen=True)
class Task:
    """One chat. `kind` is question, describe, draw or edit; `family` says which question or edit."""

    kind: str
    family: str
    pictures: tuple[Emoji, ...]
    prompt: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Identity of a task in file names and seeds: kind, family, images and further choices."""
        pictures = ">".join(picture.id for picture in self.pictures)
        return "/".join([self.kind, self.family, pictures, *map(str, self.extra.values())])

    def document(self, *, number: int) -> Document:
        """The chat as a Document; `info` holds prompt, answer and the attributes of source and target."""
        user, assistant = (lambda text: TextPart(text, "user")), (lambda text: TextPart(text, "assistant"))
        parts: tuple[Part, ...]
        if self.kind == "question":
            parts = (ImagePart(0, "user"), user(self.prompt), assistant(self.answer))
        elif self.kind == "describe":
            parts = (user(self.prompt), ImagePart(0, "user"), assistant(self.answer))
        elif self.kind == "draw":
            parts = (user(self.prompt), assistant(self.answer), ImagePart(0, "assistant"))
        else:
            source, target = ImagePart(0, "user"), ImagePart(1, "assistant")
            parts = (source, user(self.prompt), assistant(self.answer), target)
        info: dict[str, object] = {
            "kind": self.kind,
            "family": self.family,
            "answer": self.answer,
            **self.extra,
        }
        if self.kind == "edit":
            info |= {"source": self.pictures[0].info(), "target": self.pictures[1].info()}
        else:
            info |= {"picture": self.pictures[0].info()}
        return Document(f"{self.name}#{number}", "emoji", parts, info)


def describe(picture: Emoji) -> Task:
    """Table 6, captioning."""
    return Task("describe", "caption", (picture,), CAPTION_REQUEST, f"{picture.caption}.")


def draw(picture: Emoji) -> Task:
    """Table 6, generation."""
    prompt = GENERATION_REQUEST.format(caption=f"{picture.caption}.")
    return Task("draw", "caption", (picture,), prompt, GENERATION_REPLY)


def edit(source: Emoji, target: Emoji, *, family: str) -> Task:
    """Table 6, editing. `family` names the one attribute in which the two images differ."""
    wanted = getattr(target, family)
    prompts = {
        "tone": "Remove the skin tone." if wanted == "none" else f"Change the skin tone to {wanted}.",
        "gender": f"Make it a {wanted}.",
        "style": f"Redraw it in the {wanted} style.",
    }
    return Task("edit", family, (source, target), prompts[family], EDIT_REPLY, {"wanted": wanted})


def label_question(picture: Emoji, family: str) -> Task:
    """A question whose answer is the image's attribute word."""
    return Task("question", family, (picture,), QUESTIONS[family], picture.labels[family])


def flag_question(picture: Emoji) -> Task:
    """Is it a flag: yes or no."""
    return Task("question", "flag", (picture,), QUESTIONS["flag"], "yes" if picture.is_flag else "no")


class Namer:
    """Asks `is this X?`; wrong names come from `pictures` and are a function of the image alone."""

    def __init__(self, pictures: Sequence[Emoji]):
        self._by_subcategory: dict[str, list[Emoji]] = defaultdict(list)
        for picture in pictures:
            if picture.style == "noto" and picture.tone in ("", "none"):
                self._by_subcategory[picture.subcategory].append(picture)
        self._subcategories = sorted(self._by_subcategory)

    def question(self, picture: Emoji, level: str) -> Task:
        """`level` is yes, hard (wrong name, same sub-category) or easy (wrong name, another one)."""
        name = picture.name if level == "yes" else self._wrong_name(picture, level)
        answer = "yes" if level == "yes" else "no"
        return Task(
            "question", "is_a", (picture,), QUESTIONS["is_a"].format(name=name), answer, {"level": level}
        )

    def _wrong_name(self, picture: Emoji, level: str) -> str:
        """A neighbour that is not the same thing by another gender; `easy` where a sub-category has no
        neighbour.
        """
        for attempt in itertools.count():
            number = address("emoji", "wrong name", picture.id, level, attempt)
            if level == "hard" and attempt < 20:
                subcategory = picture.subcategory
            else:
                subcategory = self._subcategories[number % len(self._subcategories)]
            candidates = self._by_subcategory[subcategory]
            if not candidates or (level == "easy" and subcategory == picture.subcategory):
                continue
            other = candidates[(number >> 20) % len(candidates)]
            is_same_role = bool(other.role) and other.role == picture.role
            if other.base != picture.base and other.name != picture.name and not is_same_role:
                return other.name
        raise AssertionError("unreachable: the loop ends at the first different name")


def plan_held_out(catalogue: Sequence[Emoji], split: str) -> list[Task]:
    """Every question, description and drawing of the split's images, and every edit whose target lies in
    it.

    Sources of edits come from the split or from training. Flags are asked about with equal numbers of yes and
    no.
    """
    pictures = [picture for picture in catalogue if picture.split == split]
    namer = Namer(catalogue)
    tasks = []
    for number, picture in enumerate(pictures):
        families = [family for family in picture.labels if family in QUESTIONS]
        tasks += [label_question(picture, family) for family in families]
        tasks += [namer.question(picture, IS_A_ANSWERS[2 * (number % 2) + offset]) for offset in (0, 1)]
        tasks += [describe(picture), draw(picture)]
    flags = [picture for picture in pictures if picture.is_flag]
    others = sorted(
        filter(_is_clearly_no_flag, pictures), key=lambda picture: address("emoji", "no flag", picture.id)
    )
    balanced = min(len(flags), len(others))
    tasks += [flag_question(picture) for picture in flags[:balanced] + others[:balanced]]
    usable = [picture for picture in catalogue if picture.split in (split, "train")]
    return tasks + [task for task in _edits(usable) if task.pictures[1].split == split]


def plan_held_out_gender(catalogue: Sequence[Emoji]) -> list[Task]:
    """Gender edits from a training image to one that was never trained on."""
    edits = [task for task in _edits(catalogue) if task.family == "gender"]
    return [task for task in edits if task.pictures[0].split == "train" and task.pictures[1].split != "train"]


def plan_training(catalogue: Sequence[Emoji], *, size: int, seed: int) -> list[Task]:
    """`size` chats of training images in the proportions of MIXTURE and EDIT_MIXTURE, shuffled."""
    pictures = [picture for picture in catalogue if picture.split == "train"]
    edits: dict[str, list[Task]] = defaultdict(list)
    for task in _edits(pictures):
        edits[task.family].append(task)
    asking = _question_makers(pictures)
    num_questions, num_edits = (size * MIXTURE[kind] // 100 for kind in ("question", "edit"))
    tasks = []
    for position, make in enumerate(asking.values()):
        count = num_questions // len(asking) + (position < num_questions % len(asking))
        tasks += list(itertools.islice(make(seed), count))
    for family, share in EDIT_MIXTURE.items():
        tasks += list(
            itertools.islice(_cycle(edits[family], seed, f"edit {family}"), num_edits * share // 100)
        )
    num_drawings = size * MIXTURE["draw"] // 100
    tasks += [draw(picture) for picture in itertools.islice(_cycle(pictures, seed, "draw"), num_drawings)]
    missing = size - len(tasks)
    tasks += [describe(picture) for picture in itertools.islice(_cycle(pictures, seed, "describe"), missing)]
    order = generator(seed, "emoji", "task order").permutation(len(tasks))
    return [tasks[position] for position in order]


def _question_makers(pictures: Sequence[Emoji]) -> dict[str, Callable[[int], Iterator[Task]]]:
    """Per family an endless stream of questions over its images, reshuffled at every pass."""
    namer = Namer(pictures)
    flags = [picture for picture in pictures if picture.is_flag]
    others = list(filter(_is_clearly_no_flag, pictures))

    def about(family: str) -> Callable[[int], Iterator[Task]]:
        asked = [picture for picture in pictures if family in picture.labels]
        return lambda seed: (label_question(picture, family) for picture in _cycle(asked, seed, family))

    def about_flags(seed: int) -> Iterator[Task]:
        for yes, no in zip(_cycle(flags, seed, "flags"), _cycle(others, seed, "no flags")):
            yield from (flag_question(yes), flag_question(no))

    def about_names(seed: int) -> Iterator[Task]:
        for picture, level in zip(_cycle(pictures, seed, "is_a"), itertools.cycle(IS_A_ANSWERS)):
            yield namer.question(picture, level)

    special = {"flag": about_flags, "is_a": about_names}
    return {family: special.get(family) or about(family) for family in QUESTIONS}


def _is_clearly_no_flag(picture: Emoji) -> bool:
    return not picture.is_flag and "flag" not in picture.name


def _cycle(items: Sequence[T], seed: int, purpose: str) -> Iterator[T]:
    """Pass after pass over all items, each in its own order."""
    for number in itertools.count():
        for position in generator(seed, "emoji", purpose, number).permutation(len(items)):
            yield items[position]


def _edits(pictures: Sequence[Emoji]) -> Iterator[Task]:
    """All ordered pairs that differ in exactly one attribute."""
    groups: dict[tuple[str, ...], list[Emoji]] = defaultdict(list)
    for picture in pictures:
        if picture.tone in (*TONE_NAMES, "none"):
            groups["tone", picture.base, picture.style].append(picture)
        if picture.role:
            groups["gender", picture.role, picture.style, picture.tone].append(picture)
        groups["style", picture.id.partition("/")[2]].append(picture)
    for (family, *_), group in groups.items():
        for source, target in itertools.permutations(group, 2):
            if getattr(source, family) != getattr(target, family):
                yield edit(source, target, family=family)
