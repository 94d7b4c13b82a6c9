"""Reading COCO's and Flickr30k's caption files: Karpathy's split, the official annotations, and LAVIS's
list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks.files import coco_folder, find_file, find_folder, has_file
from evaluation.core import read_json
from vlgpt.errors import UserError


@dataclass(frozen=True)
class CaptionedImage:
    """One picture and all its captions (id and text), in file order."""

    image_id: int
    path: Path
    captions: tuple[tuple[int, str], ...]


def karpathy(data: Path, *, split: str) -> list[CaptionedImage]:
    """COCO pictures of Karpathy's `train` (with restval), `val` or `test`: 5,000 pictures in each of the
    last two.

    Reads dataset_coco.json, or LAVIS's coco_karpathy_{split}.json where that is missing. Raises UserError.
    """
    names = ("coco/dataset_coco.json", "coco/annotations/dataset_coco.json")
    if not has_file(data, *names) and has_file(data, *_lavis_names(split)):
        return _lavis(data, split=split)
    wanted = ("train", "restval") if split == "train" else (split,)
    records = [image for image in read_json(find_file(data, *names))["images"] if image["split"] in wanted]
    if not records:
        raise UserError(f"dataset_coco.json has no picture of split {split!r}; valid: train, val, test")
    folders = {name: coco_folder(data, name) for name in {image["filepath"] for image in records}}
    return [
        CaptionedImage(
            image["cocoid"],
            folders[image["filepath"]] / image["filename"],
            tuple((sentence["sentid"], sentence["raw"]) for sentence in image["sentences"]),
        )
        for image in records
    ]


def _lavis_names(split: str) -> tuple[str, ...]:
    return (f"coco/coco_karpathy_{split}.json", f"coco/annotations/coco_karpathy_{split}.json")


def _lavis(data: Path, *, split: str) -> list[CaptionedImage]:
    images = []
    for record in read_json(find_file(data, *_lavis_names(split))):
        subset, name = record["image"].split("/")[-2:]
        captions = [record["caption"]] if isinstance(record["caption"], str) else record["caption"]
        image_id = int(Path(name).stem.split("_")[-1])
        images.append(CaptionedImage(image_id, coco_folder(data, subset) / name, tuple(enumerate(captions))))
    return images


def annotated(data: Path, *, subset: str) -> list[CaptionedImage]:
    """All pictures of `val2014` or `train2014` by the official captions_{subset}.json."""
    content = read_json(
        find_file(data, f"coco/annotations/captions_{subset}.json", f"annotations/captions_{subset}.json")
    )
    captions: dict[int, list[tuple[int, str]]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append((annotation["id"], annotation["caption"]))
    folder = coco_folder(data, subset)
    return [
        CaptionedImage(image["id"], folder / image["file_name"], tuple(captions[image["id"]]))
        for image in content["images"]
        if image["id"] in captions
    ]


def flickr30k(data: Path, *, split: str) -> list[CaptionedImage]:
    """Flickr30k pictures of Karpathy's `train`, `val` or `test` (1,000 pictures); the id is the number in
    the name."""
    content = read_json(find_file(data, "flickr30k/dataset_flickr30k.json"))
    folder = find_folder(data, "flickr30k/flickr30k-images", "flickr30k/images", "flickr30k-images")
    return [
        CaptionedImage(
            int(Path(image["filename"]).stem),
            folder / image["filename"],
            tuple((sentence["sentid"], sentence["raw"]) for sentence in image["sentences"]),
        )
        for image in content["images"]
        if image["split"] == split
    ]


def load_coco(data: Path, *, split: str) -> Sequence[CaptionedImage]:
    """Karpathy's split for `train`, `val`, `test`; the official annotations for `train2014`, `val2014`."""
    return annotated(data, subset=split) if split.endswith("2014") else karpathy(data, split=split)
