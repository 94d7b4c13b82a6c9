"""COCO captions: annotation files, Karpathy's split file and LAVIS' lists, as pairs or as chats both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.sources.base import Columns, Dropped, Record, convert, mapping, text
from data_prep.sources.inputs import find_files
from data_prep.sources.join import ImageFinder, coco_names
from data_prep.sources.templates import caption_chat, generation_chat
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError

Direction = Literal["caption", "generate", "both", "pair"]
KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of one image as found in the file, unchecked."""

    key: str
    image: object
    value: object


class CocoSource:
    """`captions_train2014.json`, `dataset_coco.json` (Karpathy) or `coco_karpathy_train.json` (LAVIS). Every
    caption is a record of its own; `both` gives two, a captioning and a drawing chat (Table 6 of the paper).
    """

    licence = "COCO captions: CC BY 4.0; pictures: Flickr's terms of use"

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        images: Annotated[
            tuple[Path, ...] | None,
            "folder that holds COCO's folders of 2014 or 2017, or tars; else beside the input",
        ] = None,
        direction: Annotated[Direction, "chats to make; `pair` is the plain image and caption"] = "both",
        split: Annotated[
            Literal["train", "val", "test", "all"], "of Karpathy's file; its train includes restval"
        ] = "train",
    ):
        files = [file.path for file in find_files(inputs, (".json",), source="coco")]
        self._captions = [caption for path in files for caption in _read_file(path, split)]
        self._directions = ("caption", "generate") if direction == "both" else (direction,)
        self._images = ImageFinder(images or sorted({path.parent for path in files}))

    def __len__(self) -> int:
        return len(self._captions) * len(self._directions)

    def read(self, start: int, stop: int) -> Iterator[Record | Dropped]:
        """One caption each; with `both` the two chats of a caption follow each other."""
        for number in range(start, stop):
            place, direction = divmod(number, len(self._directions))
            make = partial(self._record, direction=self._directions[direction])
            yield from convert([self._captions[place]], make)

    def _record(self, item: Caption, *, direction: str) -> Record:
        image = mapping(item.image)
        caption = text(mapping(item.value), "caption", "raw", word="caption")
        names = _image_names(image)
        parts: tuple[Part, ...]
        if direction == "pair":
            parts = ImagePart(0), TextPart(caption)
        else:
            parts = caption_chat(caption) if direction == "caption" else generation_chat(caption)
        info = {"kind": direction, "image_id": image.get("id", image.get("cocoid")), "caption": caption}
        document = Document(f"{item.key}/{direction}", "coco", parts, info)
        return Record(document, (self._images.by_name(*names),))


def _image_names(image: Columns) -> tuple[str, ...]:
    """Where the image may lie: in the folder that Karpathy's file names, as named, and under COCO's other names."""
    name = text(image, "file_name", "filename", "image", word="image_name")
    folder = image.get("filepath")
    return (*([f"{folder}/{name}"] if isinstance(folder, str) and folder else []), *coco_names(name))


def _read_file(path: Path, split: str) -> list[Caption]:
    """All captions of a file in order. Raises UserError for another kind of file, naming its keys."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _annotations(content, path)
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _karpathy(content["images"], path, split)
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        if content and {"image", "caption"} <= set(content[0]):
            return _lavis(content, path)
        found = f"a list of objects with {', '.join(content[0])}" if content else "an empty list"
    else:
        found = f"the keys {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
    raise UserError(
        f"{path} is no COCO caption file: it holds {found}; wanted `images` and `annotations`, or Karpathy's "
        "`images` with `sentences`, or a list of `image` and `caption`"
    )


def _annotations(content: Columns, path: Path) -> list[Caption]:
    images = {str(image.get("id")): image for image in content.get("images") or () if isinstance(image, dict)}
    captions = []
    for number, value in enumerate(content["annotations"]):
        image = images.get(str(value.get("image_id")), {}) if isinstance(value, dict) else {}
        captions.append(Caption(f"{path.stem}:{number}", image, value))
    return captions


def _karpathy(images: Sequence[Any], path: Path, split: str) -> list[Caption]:
    wanted = KARPATHY_SPLITS.get(split)
    captions = []
    for place, image in enumerate(images):
        is_wanted = wanted is None or not isinstance(image, dict) or image.get("split") in wanted
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if is_wanted:
            values = sentences if isinstance(sentences, list) and sentences else [None]
            captions += [
                Caption(f"{path.stem}:{place}:{number}", image, value) for number, value in enumerate(values)
            ]
    return captions


def _lavis(entries: Sequence[Columns], path: Path) -> list[Caption]:
    captions = []
    for place, entry in enumerate(entries):
        values = entry.get("caption")
        for number, value in enumerate(values if isinstance(values, list) and values else [values]):
            image = {"image": entry.get("image"), "id": entry.get("image_id")}
            captions.append(Caption(f"{path.stem}:{place}:{number}", image, {"caption": value}))
    return captions
