"""The interface of every benchmark: examples out, predictions in.

    examples -> prompt (a Document) -> Responder -> predictions.jsonl -> clean -> score

Nothing here imports torch: scoring saved predictions needs neither a model nor a GPU. A benchmark is one file with
a class that derives from `Benchmark` (docs/extending.md); `evaluation/run.py` feeds it to a
`Responder` (`evaluation/responders.py`), `evaluation/score.py` scores what came back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from PIL import Image

from evaluation import prompts
from vlgpt.decoding.api import DecodeSettings, ImageLike, Prompt
from vlgpt.document import Document, Part
from vlgpt.errors import UserError
from vlgpt.images import BadImage, decode_image

try:
    import orjson
except ImportError:  # the `eval` extra has it
    orjson = None  # type: ignore[assignment]

Kind = Literal["text", "rank", "image", "reconstruction"]
IMAGE_KINDS: tuple[Kind, ...] = ("image", "reconstruction")
JsonObject: TypeAlias = dict[str, Any]
Record: TypeAlias = Mapping[str, Any]
"""A JSON object that is only read."""
Prediction: TypeAlias = JsonObject
"""One line of predictions.jsonl: {"id", and "text" | "scores" | "image" (path beside predictions.jsonl)}."""
Predictions: TypeAlias = Mapping[str, Prediction]
"""Predictions by example id."""
Metric: TypeAlias = dict[str, float]
"""{"value", "n", "chance"?}."""


class DataNotFound(UserError):
    """An official file is not there: `run_all` leaves the benchmark out and says so."""


def find_file(data: Path, *names: str) -> Path:
    """The first of these files that exists, in its folder or directly in `data`. Raises DataNotFound."""
    for path in (*(data / name for name in names), *(data / Path(name).name for name in names)):
        if path.is_file():
            return path
    raise DataNotFound(f"{names[0]} not found below {data}; docs/evaluation.md says where to get it")


def has_file(data: Path, *names: str) -> bool:
    """Whether `find_file` finds one."""
    return any((data / name).is_file() or (data / Path(name).name).is_file() for name in names)


def find_folder(data: Path, *names: str) -> Path:
    """The first of these folders that exists; else the first name, so that an error about an image shows it."""
    return next((data / name for name in names if (data / name).is_dir()), data / names[0])


def read_image(source: ImageLike) -> Image.Image:
    """An RGB image from a path, bytes or an image. Raises UserError for a missing or unreadable file."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, Path | bytes):
        raise TypeError(
            f"an image of a benchmark is {type(source).__name__}; wanted a path, bytes or an image"
        )
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"image {source} not found; check --data (docs/evaluation.md lists the folders)")
    try:
        return decode_image(source.read_bytes() if isinstance(source, Path) else source)
    except BadImage as error:
        raise UserError(
            f"image {source if isinstance(source, Path) else '(bytes)'} cannot be read: {error}"
        ) from error


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off: it would walk through millions of live records again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: Path) -> Any:
    """A JSON file. Raises DataNotFound when it is missing, UserError that names the line where it is broken."""
    if not path.is_file():
        raise DataNotFound(f"{path} not found; docs/evaluation.md says where to get it")
    content = path.read_bytes()
    try:
        with no_garbage_collection():
            # VQAv2's annotations have 190 MB, which orjson reads several times faster. What it refuses, json decides.
            if orjson is not None:
                with contextlib.suppress(ValueError):
                    return orjson.loads(content)
            return json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); download it again"
        ) from error


NO_PROMPT = Prompt(Document("", "", ()))
"""Stands in `Benchmark.truths`, where no model is asked."""


@dataclass(frozen=True)
class Example:
    """One question of a benchmark. `truth` is whatever its `score` needs; `info` is shown in reports."""

    id: str
    prompt: Prompt
    truth: Any = None
    info: Record = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Results of one benchmark.

    metrics: by name; per_example: the primary metric by id (for paired bootstrap and for picking examples);
    breakdown: {group: {type: metric}}; notes: protocol facts found only while scoring, such as which CLIP judged.
    """

    metrics: dict[str, Metric]
    per_example: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, dict[str, Metric]] = field(default_factory=dict)
    notes: JsonObject = field(default_factory=dict)


def metric(value: float, n: int, *, chance: float | None = None) -> Metric:
    """One entry of `Scores.metrics`. Raises ValueError for a value that is not finite."""
    if not np.isfinite(value):
        raise ValueError(
            f"a metric over {n} examples came out as {value}; the predictions or the data are broken"
        )
    result: Metric = {"value": float(value), "n": int(n)}
    if chance is not None:
        result["chance"] = float(chance)
    return result


def mean_by(per_example: Mapping[str, float], group_of: Mapping[str, str]) -> dict[str, Metric]:
    """Mean of a per-example score in each group, groups in alphabetical order."""
    groups: dict[str, list[float]] = {}
    for id, value in per_example.items():
        groups.setdefault(str(group_of[id]), []).append(value)
    return {name: metric(float(np.mean(values)), len(values)) for name, values in sorted(groups.items())}


@dataclass(frozen=True)
class SecondQuestion:
    """A choice between texts by likelihood; a prediction keeps the first text's share under `key`.

    `is_first_right` is what a perfect responder knows, None where the truth is not public.
    """

    prompt: Prompt
    candidates: tuple[str, ...]
    key: str
    is_first_right: bool | None


class Responder(Protocol):
    """Who answers: a model, or a fake that tests a benchmark. `identity` goes into the manifest."""

    identity: Record

    def generate(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[str]:
        """One reply for every prompt."""

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        """(num_candidates,) scores, higher is better."""

    def draw(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """An image for every prompt; None where the model gave none."""

    def reconstruct(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """Each prompt's only image through tokenizer and detokenizer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One benchmark: where its examples are, how they are asked, and how answers are scored.

    Subclasses are frozen dataclasses; their fields are the options of `--option name=value`, and the manifest
    records them. A subclass must have `name`, `primary`, `examples`, `ideal` and `score`; everything else has a
    default.

    Class variables: `primary` is the metric that the paper's tables show. `train_split` is the split of few-shot
    demonstrations, "" for a benchmark without them. `submission_keys` are the names of id and answer in the
    official submission file, where that is a list of such objects. `answer_options` are options that change
    predictions, not only their scores (those that change prompts need no entry).
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "text"
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    default_decoding: ClassVar[DecodeSettings] = DecodeSettings()
    answer_options: ClassVar[tuple[str, ...]] = ()
    train_split: ClassVar[str] = ""
    submission_keys: ClassVar[tuple[str, str] | None] = None
    has_integer_ids: ClassVar[bool] = False

    split: str = "val"
    prompt: str = ""
    prompt_file: str = "vlgpt"

    # What every benchmark defines.

    @abstractmethod
    def examples(self, data: Path) -> Sequence[Example]:
        """All examples in a fixed order, from the official files below `data`. Images stay paths."""

    @abstractmethod
    def ideal(self, example: Example) -> Any:
        """What a perfect responder gives: a text, (num_candidates,) scores, or an image, by `kind`."""

    @abstractmethod
    def score(self, examples: Sequence[Example], predictions: Predictions, data: Path) -> Scores:
        """Score the answered examples, in the benchmark's order."""

    # What some benchmarks change.

    def truths(self, data: Path) -> Sequence[Example]:
        """`examples(data)` for scoring; a large benchmark leaves the prompts out."""
        return self.examples(data)

    def clean(self, text: str) -> str:
        """A reply -> the answer that is scored and submitted."""
        return text.strip()

    def candidates(self, example: Example) -> Sequence[str]:
        """The texts to rank (`kind == "rank"` only)."""
        raise NotImplementedError(f"benchmark {self.name} does not rank candidates")

    def pool(self, data: Path) -> Sequence[Example]:
        """Training examples to take demonstrations from. Raises UserError where there is no few-shot form."""
        if not self.train_split:
            raise UserError(f"benchmark {self.name} has no few-shot form; leave --shots out")
        return replace(self, split=self.train_split).examples(data)

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        """An example with its answer, as parts that stand before the question."""
        raise UserError(f"benchmark {self.name} has no few-shot form; leave --shots out")

    @property
    def second_template(self) -> prompts.PromptTemplate | None:
        """The template of the second question, where one is asked."""
        return None

    def second_question(self, example: Example) -> SecondQuestion | None:
        """A choice that is asked about every example besides its open question; None: nothing more is asked."""
        return None

    def from_submission(self, records: Iterable[Record]) -> list[Prediction]:
        """The official submission format -> predictions. Raises UserError when there is none."""
        if self.submission_keys is None:
            raise UserError(
                f"benchmark {self.name} has no official submission format; give predictions.jsonl"
            )
        id, answer = self.submission_keys
        return [{"id": str(record[id]), "text": record[answer]} for record in records]

    def submission(self, predictions: Predictions, data: Path) -> list[JsonObject] | None:
        """The official submission file's content; None when the benchmark has none."""
        if self.submission_keys is None:
            return None
        id_key, answer_key = self.submission_keys
        read_id = int if self.has_integer_ids else str
        return [{id_key: read_id(id), answer_key: text} for id, text in self.answers(predictions).items()]

    def extra_files(self, examples: Sequence[Example]) -> dict[str, str]:
        """More files to write beside the predictions, {name: content} (such as a list of prompts)."""
        return {}

    @property
    def template(self) -> prompts.PromptTemplate:
        """The template of the row `prompt` of `prompt_file`. Raises UserError for an unknown row."""
        rows = prompts.load(self.prompt_file)
        if self.prompt not in rows:
            raise UserError(f"prompt {self.prompt!r} is not in {self.prompt_file}; valid: {', '.join(rows)}")
        return rows[self.prompt]

    @property
    def decoding(self) -> DecodeSettings:
        """Decode settings; whether [IMG] is forbidden, free or forced follows from kind and prompt."""
        if self.kind != "image":
            return replace(self.default_decoding, images="never")
        return replace(self.default_decoding, images="force" if self.template.gives_image_token else "free")

    # What benchmarks use.

    def make_prompt(self, id: str, *, images: tuple[ImageLike, ...] = (), **values: str) -> Prompt:
        """The prompt of one example: its template filled with `values`."""
        parts = prompts.merge_text(self.template.parts("prompt", has_image=True, **values))
        return Prompt(Document(id, self.name, parts), images, id)

    def answers(self, predictions: Predictions) -> dict[str, str]:
        """Cleaned answers by id. Raises UserError where a prediction has no text."""
        if without := [id for id, record in predictions.items() if not isinstance(record.get("text"), str)]:
            raise UserError(f"{self.name}: predictions without a text answer: {', '.join(without[:10])}")
        return {id: self.clean(record["text"]) for id, record in predictions.items()}

    def options(self) -> JsonObject:
        """The fields of this benchmark, JSON-ready: they define the protocol."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
