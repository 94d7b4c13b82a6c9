"""COCO's and Flickr30k's caption files: Karpathy's split, the official annotations, and LAVIS's list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.core import Record, find_file, find_folder, has_file, read_json
from vlgpt.errors import UserError


@dataclass(frozen=True)
class CaptionedImage:
    """One image and all its captions (id and text), in file order."""

    image_id: int
    path: Path
    captions: tuple[tuple[int, str], ...]


def coco_folder(data: Path, subset: str) -> Path:
    """The folder of COCO images `train2014`, `val2014` or `test2015`."""
    return find_folder(data, f"coco/{subset}", f"coco/images/{subset}", f"images/{subset}", subset)


def load_coco(data: Path, *, split: str) -> Sequence[CaptionedImage]:
    """Karpathy's `train`, `val` or `test`; the official annotations for `train2014`, `val2014`. Raises UserError."""
    return _annotated(data, subset=split) if split.endswith("2014") else _karpathy(data, split=split)


def flickr30k(data: Path, *, split: str) -> list[CaptionedImage]:
    """Flickr30k images of Karpathy's `train`, `val` or `test` (1,000 images); the id is the number in the name."""
    content = read_json(find_file(data, "flickr30k/dataset_flickr30k.json"))
    folder = find_folder(data, "flickr30k/flickr30k-images", "flickr30k/images", "flickr30k-images")
    images = [image for image in content["images"] if image["split"] == split]
    return [_of_karpathy(image, int(Path(image["filename"]).stem), folder) for image in images]


def _karpathy(data: Path, *, split: str) -> list[CaptionedImage]:
    """`train` has restval too; `val` and `test` have 5,000 images each.

    Reads dataset_coco.json, or LAVIS's coco_karpathy_{split}.json where that is missing.
    """
    names = ("coco/dataset_coco.json", "coco/annotations/dataset_coco.json")
    lavis = (f"coco/coco_karpathy_{split}.json", f"coco/annotations/coco_karpathy_{split}.json")
    if not has_file(data, *names) and has_file(data, *lavis):
        return [_of_lavis(record, data) for record in read_json(find_file(data, *lavis))]
    wanted = ("train", "restval") if split == "train" else (split,)
    records = [image for image in read_json(find_file(data, *names))["images"] if image["split"] in wanted]
    if not records:
        raise UserError(f"dataset_coco.json has no image of split {split!r}; valid: train, val, test")
    folders = {name: coco_folder(data, name) for name in {image["filepath"] for image in records}}
    return [_of_karpathy(image, image["cocoid"], folders[image["filepath"]]) for image in records]


def _of_karpathy(image: Record, image_id: int, folder: Path) -> CaptionedImage:
    captions = tuple((sentence["sentid"], sentence["raw"]) for sentence in image["sentences"])
    return CaptionedImage(image_id, folder / image["filename"], captions)


def _of_lavis(record: Record, data: Path) -> CaptionedImage:
    subset, name = record["image"].split("/")[-2:]
    captions = [record["caption"]] if isinstance(record["caption"], str) else record["caption"]
    image_id = int(Path(name).stem.split("_")[-1])
    return CaptionedImage(image_id, coco_folder(data, subset) / name, tuple(enumerate(captions)))


def _annotated(data: Path, *, subset: str) -> list[CaptionedImage]:
    name = f"annotations/captions_{subset}.json"
    content = read_json(find_file(data, f"coco/{name}", name))
    captions: dict[int, list[tuple[int, str]]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append((annotation["id"], annotation["caption"]))
    folder = coco_folder(data, subset)
    return [
        CaptionedImage(image["id"], folder / image["file_name"], tuple(captions[image["id"]]))
        for image in content["images"]
        if image["id"] in captions
    ]
