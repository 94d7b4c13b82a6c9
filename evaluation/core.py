"""The interface of every benchmark: examples out, predictions in.

    examples -> prompt (a Document) -> Responder -> predictions.jsonl -> clean -> score

Nothing here imports torch: scoring saved predictions needs neither a model nor a GPU. A benchmark is one file
in `evaluation/benchmarks` with a class that derives from `Benchmark`; `evaluation/run.py` feeds it to a
`Responder` (`evaluation/responders.py`), `evaluation/score.py` scores what came back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from PIL import Image

from evaluation import prompts
from vlgpt.document import Document, Part, join
from vlgpt.errors import UserError
from vlgpt.images import BadImage, decode_image

try:
    import orjson
except ImportError:  # the `eval` extra has it
    orjson = None  # type: ignore[assignment]


class DataNotFound(UserError):
    """An official file is not there: `run_all` leaves the benchmark out and says so."""


ImageSource = Path | bytes | Image.Image
Kind = Literal["text", "rank", "image", "reconstruction"]
Prediction = dict[str, Any]
"""One line of predictions.jsonl: {"id", and "text" | "scores" | "image" (path beside predictions.jsonl)}."""


def read_image(source: ImageSource) -> Image.Image:
    """An RGB picture from a path, bytes or a picture. Raises UserError for a missing or unreadable file."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Path) and not source.is_file():
        raise UserError(f"picture {source} not found; check --data (docs/evaluation.md lists the folders)")
    try:
        return decode_image(source.read_bytes() if isinstance(source, Path) else source)
    except BadImage as error:
        raise UserError(
            f"picture {source if isinstance(source, Path) else '(bytes)'} cannot be read: {error}"
        ) from error


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """While millions of records are made, the collector walks through all of them again and again, for nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: Path) -> Any:
    """A JSON file. Raises UserError that says what is missing or where it is broken."""
    if not path.is_file():
        raise DataNotFound(f"{path} not found; docs/evaluation.md says where to get it")
    try:
        with no_garbage_collection():
            return _parse_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); download it again"
        ) from error


def _parse_json(content: bytes) -> Any:
    """With orjson where it is installed (VQAv2's annotations have 190 MB); what that refuses, json decides."""
    if orjson is not None:
        with contextlib.suppress(ValueError):
            return orjson.loads(content)
    return json.loads(content)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: `vlgpt.decoding.api.Prompt`, but without torch and with pictures as paths."""

    document: Document
    images: tuple[ImageSource, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if self.document.num_images != len(self.images):
            raise ValueError(
                f"prompt {self.id!r} has {self.document.num_images} places for {len(self.images)} pictures"
            )


NO_PROMPT = Prompt(Document("", "", ()))
"""Stands in `Benchmark.truths`, where nobody is asked anything."""


@dataclass(frozen=True)
class Example:
    """One question of a benchmark. `truth` is whatever its `score` needs; `info` is shown in reports."""

    id: str
    prompt: Prompt
    truth: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How replies are decoded: the names of `vlgpt.decoding.api.DecodeSettings`, and how pictures are drawn."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    images: Literal["free", "never", "force"] = "never"
    max_images: int = 1
    visual_guidance: float = 1.0
    seed: int = 0
    guidance: float | None = None
    """Classifier-free guidance of the picture decoder; 1 = none, None = the decoder's own."""
    image_scale: float | None = None
    """Weight of z_v beside z_t in the picture decoder; None = the decoder's own."""
    use: Literal["both", "image", "text"] = "both"
    """Which predicted conditions the picture decoder reads (paper, Table 4)."""

    def replace(self, **changes: Any) -> Decoding:
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            names = ", ".join(f.name for f in dataclasses.fields(self))
            raise UserError(f"decoding has no {', '.join(unknown)}; valid: {names}")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Scores:
    """Results of one benchmark.

    metrics: {name: {"value": float, "n": int, "chance"?: float}}; per_example: the primary metric by id (for
    paired bootstrap and for picking examples); breakdown: {group: {type: {"value", "n"}}}; notes: protocol
    facts found only while scoring (such as which tokenizer ran).
    """

    metrics: dict[str, dict[str, float]]
    per_example: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def metric(value: float, n: int, *, chance: float | None = None) -> dict[str, float]:
    """One entry of `Scores.metrics`. Raises ValueError for a value that is not finite."""
    if not np.isfinite(value):
        raise ValueError(
            f"a metric over {n} examples came out as {value}; the predictions or the data are broken"
        )
    result: dict[str, float] = {"value": float(value), "n": int(n)}
    if chance is not None:
        result["chance"] = float(chance)
    return result


def mean_by(per_example: Mapping[str, float], group_of: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Mean of a per-example score in each group: {group: {"value", "n"}}."""
    groups: dict[str, list[float]] = {}
    for id, value in per_example.items():
        groups.setdefault(str(group_of[id]), []).append(value)
    return {name: metric(float(np.mean(values)), len(values)) for name, values in sorted(groups.items())}


@dataclass(frozen=True)
class SecondQuestion:
    """A choice between texts by likelihood; a prediction keeps the first text's share under `key`."""

    prompt: Prompt
    candidates: tuple[str, ...]
    key: str


class Responder(Protocol):
    """Who answers: a model, or a fake that tests a benchmark."""

    identity: Mapping[str, Any]
    """What goes into the manifest: export path and hash, template."""

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]: ...

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        """(num_candidates,) scores, higher is better."""

    def draw(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        """A picture for every prompt; None where the model gave none."""

    def reconstruct(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        """Each prompt's only picture through tokenizer and detokenizer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One benchmark: where its examples are, how they are asked, and how answers are scored.

    Subclasses are frozen dataclasses; their fields are the options of `--option name=value`, and the manifest
    records them.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "text"
    primary: ClassVar[str]
    """The metric that the paper's tables show."""
    higher_is_better: ClassVar[bool] = True
    default_decoding: ClassVar[Decoding] = Decoding()
    answer_options: ClassVar[tuple[str, ...]] = ()
    """Options that change predictions, not only their scores (those that change prompts need no entry)."""

    split: str = "val"
    prompt: str = ""
    """Row of the prompt file."""
    prompt_file: str = "vlgpt"

    @property
    def template(self) -> prompts.PromptTemplate:
        """The prompt's template. Raises UserError for an unknown row."""
        rows = prompts.load(self.prompt_file)
        if self.prompt not in rows:
            raise UserError(f"prompt {self.prompt!r} is not in {self.prompt_file}; valid: {', '.join(rows)}")
        return rows[self.prompt]

    @property
    def second_template(self) -> prompts.PromptTemplate | None:
        """The template of the second question, where one is asked."""
        return None

    @property
    def decoding(self) -> Decoding:
        """Decode settings; whether [IMG] is forced follows from the prompt."""
        if self.kind != "image":
            return self.default_decoding
        return self.default_decoding.replace(images="force" if self.template.gives_image_token else "free")

    @abstractmethod
    def examples(self, data: Path) -> Sequence[Example]:
        """All examples in a fixed order, from the official files below `data`. Pictures stay paths."""

    def truths(self, data: Path) -> Sequence[Example]:
        """`examples(data)` for scoring; a large benchmark leaves the prompts out."""
        return self.examples(data)

    def loaded(self, data: Path) -> Sequence[Example]:
        """`examples(data)`, or the same list again while `remembering` it (large files are read once)."""
        remembered = getattr(self, "_remembered", None)
        return remembered[1] if remembered is not None and remembered[0] == data else self.examples(data)

    @contextlib.contextmanager
    def remembering(self, data: Path, examples: Sequence[Example]) -> Iterator[None]:
        """Within this context `loaded(data)` gives `examples`."""
        object.__setattr__(self, "_remembered", (data, examples))
        try:
            yield
        finally:
            object.__delattr__(self, "_remembered")

    @abstractmethod
    def score(self, predictions: Mapping[str, Prediction], data: Path) -> Scores:
        """Score predictions by id; ids were checked before, so with `--partial` some may be missing."""

    def ideal_choice(self, example: Example) -> np.ndarray:
        """(num_candidates,) scores of a perfect responder for the second question."""
        raise NotImplementedError(f"benchmark {self.name} asks no second question")

    @abstractmethod
    def ideal(self, example: Example) -> Any:
        """What a perfect responder gives: a text, (num_candidates,) scores, or a picture, by `kind`."""

    def pool(self, data: Path) -> Sequence[Example]:
        """Training examples to take demonstrations from. Raises UserError where there is no few-shot form."""
        raise UserError(f"benchmark {self.name} has no few-shot form; leave --shots out")

    def demonstration(self, example: Example, *, has_image: bool = True) -> tuple[Part, ...]:
        """An example with its answer, as parts that stand before the question."""
        raise UserError(f"benchmark {self.name} has no few-shot form; leave --shots out")

    def second_question(self, example: Example) -> SecondQuestion | None:
        """A choice that is asked about every example besides its open question; None: nothing more is asked."""
        return None

    def candidates(self, example: Example) -> Sequence[str]:
        """The texts to rank (`kind == "rank"` only)."""
        raise NotImplementedError(f"benchmark {self.name} does not rank candidates")

    def clean(self, text: str) -> str:
        """A reply -> the answer that is scored and submitted."""
        return text.strip()

    def from_submission(self, records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
        """The official submission format -> predictions. Raises UserError when there is none."""
        raise UserError(f"benchmark {self.name} has no official submission format; give predictions.jsonl")

    def submission(self, predictions: Mapping[str, Prediction], data: Path) -> list[dict[str, Any]] | None:
        """The official submission file's content, checked; None when the benchmark has none."""
        return None

    def extra_files(self, examples: Sequence[Example]) -> dict[str, str]:
        """More files to write beside the predictions, {name: content} (such as a list of prompts)."""
        return {}

    def options(self) -> dict[str, Any]:
        """The fields of this benchmark, JSON-ready: they define the protocol."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def make_prompt(self, id: str, *, images: tuple[ImageSource, ...] = (), **values: str) -> Prompt:
        """The prompt of one example: its template filled with `values`."""
        parts = prompts.merge_text(self.template.parts("prompt", has_image=True, **values))
        return Prompt(Document(id, self.name, parts), images, id)


def with_demonstrations(
    prompt: Prompt, demonstrations: Sequence[tuple[tuple[Part, ...], tuple[ImageSource, ...]]]
) -> Prompt:
    """Put demonstrations (their parts and pictures) before a prompt; pictures are numbered anew."""
    document = prompt.document
    pieces = [*(parts for parts, _ in demonstrations), document.parts]
    joined = join(document.id, document.source, pieces, document.info)
    joined = dataclasses.replace(joined, parts=prompts.merge_text(joined.parts))
    images = tuple(image for _, sources in demonstrations for image in sources) + prompt.images
    return Prompt(joined, images, prompt.id)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
