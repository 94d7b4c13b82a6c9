"""What the demo's report shows of each benchmark: examples chosen by a hash of their names, never by their score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.word_f1 import words_of
from evaluation import benchmarks, manifest
from evaluation.core import Benchmark, Example, Prediction, read_image
from evaluation.score import read_predictions
from vlgpt import seeds
from vlgpt.decoding.api import ImageLike
from vlgpt.document import ImagePart
from vlgpt.files import JsonObject
from vlgpt.images import data_uri, png_bytes


@dataclass(frozen=True)
class Answered:
    """One benchmark's examples with what the model gave."""

    benchmark: Benchmark
    examples: tuple[Example, ...]
    predictions: Mapping[str, Prediction]

    @classmethod
    def read(cls, folder: Path, data: Path) -> Answered | None:
        """The predictions of one part of the suite; None when it was not run."""
        run = manifest.read(folder)
        if run is None or not (folder / "predictions.jsonl").is_file():
            return None
        benchmark = benchmarks.make(run["benchmark"], **run["options"])
        predictions = {record["id"]: record for record in read_predictions(folder, benchmark)}
        examples = tuple(e for e in benchmark.examples(data) if e.id in predictions)
        return cls(benchmark, examples, predictions)

    def choose(
        self, num: int, *, key: Callable[[Example], str], where: Callable[[Example], bool]
    ) -> list[Example]:
        """At most `num` examples in random order, one for each value of `key`."""
        order = sorted(filter(where, self.examples), key=lambda e: seeds.address("demo-report", e.id))
        first: dict[str, Example] = {}
        for example in order:
            first.setdefault(key(example), example)
        return list(first.values())[:num]

    def text(self, example: Example) -> str:
        """The clean answer in words."""
        return self.benchmark.clean(self.predictions[example.id]["text"])

    def picture(self, example: Example) -> str:
        """The drawn image as a data: URI, "" where the model gave none."""
        path = self.predictions[example.id]["image"]
        return as_uri(Path(path)) if path else ""


def as_uri(image: ImageLike) -> str:
    """Any image as a PNG data: URI."""
    return data_uri(png_bytes(read_image(image)))


def prompt_image(example: Example, number: int = 0) -> str:
    """An image of the prompt as a data: URI."""
    return as_uri(example.prompt.images[number])


def reconstructions(parts: Sequence[Answered | None], num: int) -> list[dict[str, str]]:
    """Rows of original, both conditions, z_v only, z_t only; `parts` in this order."""
    whole = parts[0]
    if whole is None:
        return []
    ids = set.intersection(*({e.id for e in part.examples} for part in parts if part is not None))
    chosen = whole.choose(num, key=lambda e: e.id.partition("/")[2], where=lambda e: e.id in ids)
    names = ("both", "image_only", "text_only")
    return [
        {"original": as_uri(example.truth)}
        | {name: part.picture(example) for name, part in zip(names, parts) if part is not None}
        for example in chosen
    ]


def drawings(answered: Answered, split: str, num: int) -> list[dict[str, str]]:
    """Caption, drawn image and the real one."""
    chosen = answered.choose(
        num, key=lambda e: e.info["caption"], where=lambda e: e.info["split"] == split and "@" not in e.id
    )
    return [
        {"caption": e.info["caption"], "drawn": answered.picture(e), "real": as_uri(e.truth)} for e in chosen
    ]


def captions(answered: Answered, split: str, num: int) -> list[JsonObject]:
    """Image, the written words (marked where the real caption has them), the real caption."""
    chosen = answered.choose(num, key=lambda e: e.truth, where=lambda e: e.info["split"] == split)
    rows = []
    for example in chosen:
        left = Counter(words_of(example.truth))
        words = []
        for word in answered.text(example).split():
            plain = (words_of(word) or [""])[0]
            words.append({"text": word, "is_right": left[plain] > 0})
            left[plain] -= 1
        rows.append({"picture": prompt_image(example), "words": words, "truth": example.truth})
    return rows


def questions(answered: Answered, num: int) -> list[JsonObject]:
    """Image, question, answer and truth, `num` of every family."""
    rows = []
    for family in dict.fromkeys(e.info["family"] for e in answered.examples):
        split = "seen" if family == "subcategory" else "unseen"
        chosen = answered.choose(
            num,
            key=lambda e: e.truth + e.info["picture"],
            where=lambda e, f=family, s=split: e.info["family"] == f and e.info["split"] == s,  # type: ignore[misc]
        )
        for example in chosen:
            text = answered.text(example)
            rows.append(
                {
                    "picture": prompt_image(example),
                    "question": example.info["question"],
                    "answer": text,
                    "truth": example.truth,
                    "is_right": text == example.truth,
                }
            )
    return rows


def edits(answered: Answered, family: str, num: int) -> list[dict[str, str]]:
    """Source, instruction, result and the real target."""
    chosen = answered.choose(num, key=lambda e: e.info["concept"], where=lambda e: e.info["family"] == family)
    return [
        {
            "source": prompt_image(example),
            "instruction": example.prompt.document.text,
            "result": answered.picture(example),
            "target": as_uri(example.truth),
        }
        for example in chosen
    ]


def label_pages(answered: Answered, shots: int, num: int) -> list[JsonObject]:
    """Few-shot prompts: the shown images with their words, the asked image, the answer; and without shots."""
    bare = {_query(e): e for e in answered.examples if e.info["shots"] == 0}
    chosen = answered.choose(num, key=_query, where=lambda e: e.info["shots"] == shots)
    return [
        {
            "attribute": example.info["attribute"],
            "shown": [
                {"picture": prompt_image(example, part.index), "word": word}
                for part, word in zip(_image_parts(example), example.info["words"])
            ],
            "picture": prompt_image(example, shots),
            "answer": answered.text(example),
            "without": answered.text(bare[_query(example)]) if _query(example) in bare else "",
            "truth": example.truth,
            "is_right": answered.text(example) == example.truth,
        }
        for example in chosen
    ]


def _query(example: Example) -> str:
    return example.id.partition("/")[2]


def _image_parts(example: Example) -> Iterable[ImagePart]:
    return (part for part in example.prompt.document.parts if isinstance(part, ImagePart))
