"""The next batches of a run as the model will see them: every position with role, segment, target and loss weight.

Tokens, targets and segments are read from the very `Batch` that training would get; the documents are only asked for
what a batch does not hold, the roles and the images, and both must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from vlgpt.batch import Batch, ConditionBatch, to_device
from vlgpt.data.loader import Loader
from vlgpt.data.mixture import Draws
from vlgpt.data.samples import Place, chosen_image
from vlgpt.data.stream import Position, Report, RowMaker, advance, rows_of_rank
from vlgpt.data.workers import WorkerGuard
from vlgpt.images import BadImage, decode_image, thumbnail
from vlgpt.shards import BadSample
from vlgpt.tokens import DocumentTokenizer, Span

THUMBNAIL_PX = 128
SPACES = ("\u2581", "\u0120", " ")
"""How vocabularies write the space in front of a word."""
INCOMPLETE = "\ufffd"
ELLIPSIS = "\u2026"
MAX_TOKENS_OF_CHARACTER = 8


@dataclass(frozen=True)
class LossWeights:
    """What a target of each kind weighs in the loss (settings of the language stage)."""

    text: float = 1.0
    visual: float = 1.0
    first_visual: float = 1.0

    def of_slots(self, num_visual: int) -> list[float]:
        """Weights of the visual embeddings of an image: slot 1 against the others, mean 1, times `visual`."""
        slots = [self.first_visual, *[1.0] * (num_visual - 1)]
        return [self.visual * slot * num_visual / sum(slots) for slot in slots]


@dataclass(frozen=True)
class TokenView:
    """One position."""

    position: int
    token: str
    token_id: int
    role: str
    is_target: bool
    is_visual: bool
    weight: float


@dataclass(frozen=True)
class SegmentView:
    """One packed sequence, or the padding (number 0)."""

    number: int
    source: str = ""
    document: str = ""
    key: str = ""
    note: str = ""  # what was cut or left out
    tokens: tuple[TokenView, ...] = ()
    images: tuple[Image.Image | None, ...] = ()  # in reading order; None when it cannot be decoded


@dataclass(frozen=True)
class RowView:
    """One row of a batch."""

    batch: int
    row: int
    segments: tuple[SegmentView, ...]


@dataclass(frozen=True)
class SampleView:
    """One sample of an image stage."""

    batch: int
    source: str
    document: str
    caption: str
    is_valid: bool
    image: Image.Image | None
    tensors: dict[str, str]  # name -> shape and range


@dataclass
class Inspection:
    """What a person looks at, and what they should be warned of."""

    rows: list[RowView] = field(default_factory=list)
    samples: list[SampleView] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect(
    loader: Loader, *, num_batches: int = 1, weights: LossWeights | None = None, masked_share: float = 0.9
) -> Inspection:
    """The next batches of this loader from its position; the position stays.

    Warns of batches without a target, of rows in which more than `masked_share` of the filled positions are no targets,
    of images left out, of documents cut, and of bad samples. Raises UserError as the loader does.
    """
    found, position = Inspection(), loader.position
    guard = WorkerGuard()
    for number in range(num_batches):
        rows = rows_of_rank(
            position,
            loader.maker,
            micro_batch=loader.micro_batch,
            rank=loader.rank,
            world_size=loader.world_size,
        )
        batch, report = loader.maker.finish(loader.maker.draft(rows, guard), guard)
        position = advance(position, loader.micro_batch * loader.world_size, loader.maker)
        _warn_of_bad(found, loader, number, report)
        if isinstance(batch, Batch):
            views = _row_views(loader, batch, rows, number, weights or LossWeights())
            found.rows += views
            _warn_of_rows(found, batch, views, number, masked_share)
        else:
            found.samples += _sample_views(loader, batch, rows, number)
    return found


# --- packed rows


def _row_views(
    loader: Loader, batch: Batch, rows: Sequence[Position | None], number: int, weights: LossWeights
) -> list[RowView]:
    views = []
    for r, row in enumerate(rows):
        segments = []
        loaded = iter(_documents(loader, row)) if row is not None else iter(())
        for segment in range(1, len(batch.documents[r]) + 1):
            source, key, spans, images, note = next(loaded)
            at = (batch.segment_ids[r] == segment).nonzero()[:, 0]
            tokens = _token_views(loader, batch, r, at, spans, weights)
            document = batch.documents[r][segment - 1]
            segments.append(SegmentView(segment, source, document, key, note, tokens, images))
        padding = (batch.segment_ids[r] == 0).nonzero()[:, 0]
        if len(padding):
            segments.append(SegmentView(0, note=f"padding, {len(padding)} positions"))
        views.append(RowView(number, r, tuple(segments)))
    return views


Found = tuple[str, str, list[Span], tuple["Image.Image | None", ...], str]


def _documents(loader: Loader, row: Position) -> Iterator[Found]:
    """(source, key, spans, images, note) of every document of a row that can be read, as the batch has it."""
    maker = loader.maker
    assert isinstance(maker, RowMaker)
    for place in maker.places(row):
        try:
            maker.loader.load(place)
        except BadSample:
            continue
        source, assembler = loader.sources[place.source], maker.loader.assemblers[place.source]
        sample = source.read(place.shard, place.sample, with_images=True)
        parts = source.lengths(place.shard, tokenizer=assembler.tokenizer).parts(place.sample)
        plan = assembler.plan(parts, Draws(place.key))
        spans = assembler.spans(plan, sample.document)
        pictures = tuple(_thumbnail(sample.images[span.image]) for span in spans if span.image is not None)
        notes = []
        if plan.num_dropped_images:
            notes.append(
                f"{plan.num_dropped_images} images left out (max_images {source.settings.max_images})"
            )
        if len(plan.parts) + plan.num_dropped_images < len(parts.lengths) or plan.last_tokens is not None:
            notes.append("cut to the length of a row")
        yield source.name, sample.key, spans, pictures, "; ".join(notes)


def _token_views(
    loader: Loader, batch: Batch, r: int, at: torch.Tensor, spans: Sequence[Span], weights: LossWeights
) -> tuple[TokenView, ...]:
    tokenizer = loader.tokenizer
    assert tokenizer is not None
    ids = batch.token_ids[r, at].tolist()
    if ids != [token for span in spans for token in span.ids]:
        raise AssertionError(
            f"row {r}: the batch and the rendering of its documents differ: a bug of the loader"
        )
    roles = [span.role for span in spans for _ in span.ids]
    texts = [text for span in spans for text in token_texts(tokenizer, span.ids)]
    slot_weights = weights.of_slots(batch.num_visual)
    views, slot = [], 0
    for position, token_id, role, text in zip(at.tolist(), ids, roles, texts):
        is_target, is_visual = bool(batch.is_target[r, position]), bool(batch.is_visual[r, position])
        weight = (slot_weights[slot] if is_visual else weights.text) if is_target else 0.0
        slot = slot + 1 if is_visual else 0
        token = f"v{slot}" if is_visual else text
        views.append(TokenView(position, token, token_id, role, is_target, is_visual, weight))
    return tuple(views)


def token_texts(tokenizer: DocumentTokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as a person reads them: spaces as middle dots, other white space escaped.

    A character that several tokens write stands at the last of them; the others show an ellipsis.
    """
    found: list[str] = []
    started: list[int] = []  # the tokens of a character that is not yet whole, and what of them is shown
    shown = 0
    special = set(tokenizer.text_tokenizer.all_special_ids)
    for token_id in ids:
        piece = str(tokenizer.text_tokenizer.convert_ids_to_tokens(token_id))
        if token_id in special or piece.startswith("["):
            found.append(piece)
            started, shown = [], 0
            continue
        has_space = not started and piece[:1] in SPACES
        started.append(token_id)
        text = tokenizer.text_tokenizer.decode(started, clean_up_tokenization_spaces=False)
        whole = text.rstrip(INCOMPLETE)
        new = whole[shown:]
        # Some tokenizers drop the space in front of what they decode.
        new = f" {new}" if has_space and not new.startswith(" ") else new
        is_whole = whole == text or len(started) > MAX_TOKENS_OF_CHARACTER
        found.append(_visible(new) + ("" if whole == text else ELLIPSIS))
        started, shown = ([], 0) if is_whole else (started, len(whole))
    return found


def _visible(text: str) -> str:
    """White space that can be seen."""
    return "".join(
        "\u00b7" if letter == " " else repr(letter)[1:-1] if letter.isspace() else letter for letter in text
    )


# --- samples of image stages


def _sample_views(
    loader: Loader, batch: ConditionBatch, rows: Sequence[Position | None], number: int
) -> list[SampleView]:
    views = []
    for b, row in enumerate(rows):
        if row is None:
            continue
        (place,) = loader.maker.places(row)
        names = ("pixels", "patches", "image_condition", "text_condition")
        tensors = {n: _describe(getattr(batch, n)[b]) for n in names if getattr(batch, n) is not None}
        views.append(
            SampleView(
                batch=number,
                source=loader.source_names[place.source],
                document=batch.documents[b],
                caption=batch.captions[b],
                is_valid=bool(batch.is_valid[b]),
                image=_picture(loader, place) if bool(batch.is_valid[b]) else None,
                tensors=tensors,
            )
        )
    return views


def _picture(loader: Loader, place: Place) -> Image.Image | None:
    sample = loader.sources[place.source].read(place.shard, place.sample, with_images=True)
    return _thumbnail(sample.images[chosen_image(sample.document, Draws(place.key))])


def _describe(values: torch.Tensor) -> str:
    floats = to_device(values, "cpu", torch.float32)
    shape = " x ".join(str(size) for size in values.shape)
    return (
        f"{shape}, mean {floats.mean():.3f}, std {floats.std():.3f}, {floats.min():.2f} to {floats.max():.2f}"
    )


def _thumbnail(data: bytes) -> Image.Image | None:
    try:
        return thumbnail(decode_image(data, min_size_px=THUMBNAIL_PX), THUMBNAIL_PX)
    except BadImage:
        return None


# --- warnings


def _warn_of_bad(found: Inspection, loader: Loader, number: int, report: Report) -> None:
    for _, bad in report.outcomes:
        if bad is not None:
            name = loader.source_names[bad.source]
            found.warnings.append(
                f"batch {number}: sample {bad.key} of shard {bad.shard} ({name}) is masked: {bad.reason}"
            )
    for (source, reason), count in sorted(report.rejected.items()):
        name = loader.source_names[source]
        found.warnings.append(
            f"window at batch {number}: {count} documents of {name} gave no sequence, others stand there: {reason}"
        )


def _warn_of_rows(
    found: Inspection, batch: Batch, views: Sequence[RowView], number: int, masked_share: float
) -> None:
    if not bool(batch.is_target.any()):
        found.warnings.append(f"batch {number} has no target: it trains nothing")
    filled = batch.segment_ids > 0
    for r, view in enumerate(views):
        num_filled, num_targets = int(filled[r].sum()), int(batch.is_target[r].sum())
        if num_filled and 1 - num_targets / num_filled > masked_share:
            found.warnings.append(
                f"batch {number}, row {r}: {100 * (1 - num_targets / num_filled):.0f} % of {num_filled} positions "
                f"are no targets (more than {100 * masked_share:.0f} %)"
            )
        for segment in view.segments:
            if segment.number and segment.note:
                found.warnings.append(f"batch {number}, row {r}, {segment.document}: {segment.note}")
