"""A conversation with images on both sides, and the prompt that the model reads of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image
from torch import Tensor

from vlgpt.decoding.api import ImageLike, Prompt, Reply
from vlgpt.document import IMAGE_MARK, Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage, decode_image, png_bytes

MAX_PIXELS = 16_000_000  # of an image that a user gives
ADDRESS = "dialogue"  # all prompts draw the same random numbers: a reply follows from the turns and the seed

Speaker = Literal["user", "assistant"]


@dataclass(frozen=True)
class Picture:
    """An image file of a conversation. A drawn one keeps its visual embeddings (N, d)."""

    # The model goes on from the embeddings that it predicted, not from what its drawing looks like to the image
    # encoder.

    data: bytes = field(repr=False)
    visual: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def read(cls, data: bytes, *, name: str = "the picture", max_pixels: int = MAX_PIXELS) -> Picture:
        """A picture from the bytes of a user's image file. They are checked by decoding, but kept as bytes.

        Raises UserError, which calls it `name`, when it cannot be decoded or has too many pixels.
        """
        try:
            decode_image(data, max_pixels=max_pixels)
        except BadImage as error:
            raise UserError(f"{name} cannot be used: {error}") from error
        return cls(data)

    @classmethod
    def drawn(cls, image: Image.Image, visual: Tensor) -> Picture:
        """An image that the model drew from its embeddings (N, d)."""
        return cls(png_bytes(image), visual)

    @property
    def image(self) -> Image.Image:
        return decode_image(self.data)

    @property
    def as_input(self) -> ImageLike:
        return self.data if self.visual is None else ("visual", self.visual)


Content = str | Picture


@dataclass(frozen=True)
class Turn:
    """What one speaker says: text and images in reading order."""

    speaker: Speaker
    content: tuple[Content, ...]

    @property
    def text(self) -> str:
        return " ".join(item for item in self.content if isinstance(item, str))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(item for item in self.content if isinstance(item, Picture))


@dataclass(frozen=True)
class Dialogue:
    """Turns, user and assistant taking turns, the user first. Immutable: every change gives a new one.

    Raises UserError when the speakers do not alternate or a user turn is empty.
    """

    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        for number, turn in enumerate(self.turns):
            wanted = ("user", "assistant")[number % 2]
            if turn.speaker != wanted:
                raise UserError(
                    f"turn {number + 1} of the dialogue is by {turn.speaker!r}, wanted {wanted!r}"
                )
            if turn.speaker == "user" and not turn.content:
                raise UserError(f"turn {number + 1} of the dialogue is empty: give text, a picture or both")

    def asking(self, *content: Content) -> Dialogue:
        """The dialogue with one more user turn. Raises UserError while a reply is due or without content."""
        return replace(self, turns=(*self.turns, Turn("user", content)))

    def answered(self, turn: Turn) -> Dialogue:
        """The dialogue with the model's turn. Raises UserError when no reply is due."""
        return replace(self, turns=(*self.turns, turn))

    def up_to(self, num_turns: int) -> Dialogue:
        """The first turns: `up_to(len(d.turns) - 1)` takes back the last one, for another reply."""
        return replace(self, turns=self.turns[:num_turns])

    def edited(self, number: int, text: str, *, instead_of: str | None = None) -> Dialogue:
        """Ends with user turn `number` (from 0) saying something else, its images kept.

        `instead_of` names one piece of text of the turn; without it all its text is replaced. Raises UserError.
        """
        if not (0 <= number < len(self.turns)) or self.turns[number].speaker != "user":
            raise UserError(f"turn {number + 1} of the dialogue is no user turn: only those can be edited")
        content = list(self.turns[number].content)
        if instead_of in content:
            content[content.index(instead_of)] = text
            return self.up_to(number).asking(*content)
        return self.up_to(number).asking(*interleave(text, self.turns[number].pictures))

    @property
    def is_reply_due(self) -> bool:
        return len(self.turns) % 2 == 1

    def prompt(self) -> Prompt:
        """What the model reads. Raises UserError when the last turn is not the user's."""
        if not self.is_reply_due:
            raise UserError("the dialogue waits for the user: say something before asking for a reply")
        parts: list[Part] = []
        images: list[ImageLike] = []
        for turn in self.turns:
            for item in turn.content or ("",):
                if isinstance(item, Picture):
                    parts.append(ImagePart(len(images), turn.speaker))
                    images.append(item.as_input)
                else:
                    parts.append(TextPart(item, turn.speaker))
        return Prompt(Document(ADDRESS, "chat", tuple(parts)), tuple(images))


def reply_turn(reply: Reply, pictures: Sequence[Picture]) -> Turn:
    """The model's turn; `pictures[i]` is the drawing of image i of the reply."""
    content = tuple(part.text if isinstance(part, TextPart) else pictures[part.index] for part in reply.parts)
    return Turn("assistant", content)


def split_marks(text: str, num_images: int) -> list[str | int]:
    """Text and image numbers in reading order: `<image>` marks the place of an image, without marks all come first.

    Raises UserError when there are marks, but not one for each image.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        pieces = [""] * num_images + pieces
    if len(pieces) - 1 != num_images:
        raise UserError(f"the prompt has {len(pieces) - 1} {IMAGE_MARK} marks, {num_images} images are given")
    found: list[str | int] = []
    for number, piece in enumerate(pieces):
        if piece.strip():
            found.append(piece.strip())
        if number < num_images:
            found.append(number)
    return found


def interleave(text: str, pictures: Sequence[Picture]) -> tuple[Content, ...]:
    """What a user typed and attached as the content of a turn, see `split_marks`. Raises UserError."""
    found = split_marks(text, len(pictures))
    return tuple(item if isinstance(item, str) else pictures[item] for item in found)
