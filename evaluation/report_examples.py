"""What report.html shows of single examples: which ones, their pictures, the answer and the best possible answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.core import Benchmark, Example, Prediction, read_image
from vlgpt import seeds
from vlgpt.document import ImagePart

NUM_EXAMPLES = {"best": 7, "worst": 7, "random": 6}
THUMBNAIL_PX = 200
MAX_TEXT = 600
PICTURE_KINDS = ("image", "reconstruction")


def pick(
    per_example: Mapping[str, float], ids: Sequence[str], *, higher_is_better: bool = True
) -> dict[str, list[str]]:
    """Best, worst and random ids, each at most once; without scores only random ones."""
    sign = -1 if higher_is_better else 1
    order = sorted((id for id in ids if id in per_example), key=lambda id: (sign * per_example[id], id))
    ranked = {
        "best": order,
        "worst": order[::-1],
        "random": sorted(ids, key=lambda id: seeds.address("report", id)),
    }
    taken: set[str] = set()
    picked: dict[str, list[str]] = {}
    for why, count in NUM_EXAMPLES.items():
        fresh = [id for id in ranked[why] if id not in taken][:count]
        taken.update(fresh)
        if fresh:
            picked[why] = fresh
    return picked


def view(benchmark: Benchmark, example: Example, prediction: Prediction) -> dict[str, Any]:
    """One example for people: the question with its pictures, the answer, the best possible answer."""
    document = example.prompt.document
    texts = ["[picture]" if isinstance(part, ImagePart) else part.text for part in document.parts]
    pictures = [("given", thumbnail(read_image(image))) for image in example.prompt.images[-1:]]
    shown: dict[str, Any] = {
        "id": example.id,
        "question": _shorten(" ".join(texts)),
        "answer": "",
        "truth": "",
    }
    ideal = None if example.truth is None else benchmark.ideal(example)
    if benchmark.kind in PICTURE_KINDS:
        if prediction.get("image"):
            pictures.append(("made", thumbnail(read_image(Path(prediction["image"])))))
        else:
            shown["answer"] = "(no picture)"
        if ideal is not None and benchmark.kind == "image":
            pictures.append(("true", thumbnail(read_image(ideal))))
    elif benchmark.kind == "rank":
        options = example.info["options"]
        best = np.argsort(-np.asarray(prediction["scores"]), kind="stable")[:3]
        shown["answer"] = " | ".join(options[i] for i in best)
        shown["truth"] = "" if ideal is None else options[int(np.argmax(ideal))]
    else:
        shown["answer"] = _shorten(prediction["text"])
        shown["truth"] = "" if ideal is None else _shorten(ideal)
    return {**shown, "pictures": pictures}


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as a data: address."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
