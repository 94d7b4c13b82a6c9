"""Finding the official files: below --data, in the folders that docs/evaluation.md names or flat in one
folder."""

from __future__ import annotations

from pathlib import Path

from evaluation.core import DataNotFound


def find_file(data: Path, *names: str) -> Path:
    """The first of these files that exists, in its folder or directly in `data`. Raises DataNotFound that
    lists them."""
    candidates = [data / name for name in names] + [data / Path(name).name for name in names]
    for path in candidates:
        if path.is_file():
            return path
    raise DataNotFound(f"{names[0]} not found below {data}; docs/evaluation.md says where to get it")


def has_file(data: Path, *names: str) -> bool:
    """Whether `find_file` finds one."""
    return any((data / name).is_file() or (data / Path(name).name).is_file() for name in names)


def find_folder(data: Path, *names: str) -> Path:
    """The first of these folders that exists; else the first name, so that an error about a picture shows
    it."""
    return next((data / name for name in names if (data / name).is_dir()), data / names[0])


def coco_folder(data: Path, subset: str) -> Path:
    """The folder of COCO pictures `train2014`, `val2014` or `test2015`."""
    return find_folder(data, f"coco/{subset}", f"coco/images/{subset}", f"images/{subset}", subset)


def coco_image(folder: Path, subset: str, image_id: int) -> Path:
    """The path of a COCO picture by its id."""
    return folder / f"COCO_{subset}_{image_id:012d}.jpg"
