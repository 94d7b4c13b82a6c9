"""One slot of the stream -> one loaded sample, ready for the collator. Everything that can be bad is bad here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from vlgpt.batch import ImageKind
from vlgpt.data.assemble import Assembler, LengthMismatch
from vlgpt.data.mixture import Draws, Purpose
from vlgpt.data.sources import OpenSource, feature_dtype
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage, read_square
from vlgpt.settings import DataSettings
from vlgpt.shards import Sample
from vlgpt.tokens import TokenSequence


@dataclass(frozen=True)
class Place:
    """Where a sample is stored, and the key of the random choices made for it."""

    source: int
    shard: int
    sample: int
    key: int


@dataclass(frozen=True)
class LoadedSequence:
    """A rendered document with its images `(m, ...)` in reading order; None without images, or before they are read."""

    document: str
    source: int
    sequence: TokenSequence
    images: np.ndarray | None
    num_dropped_images: int


@dataclass(frozen=True)
class LoadedCondition:
    """One image with its caption, and the arrays that the stage asked for, without batch dimension ({} at first)."""

    document: str
    source: int
    caption: str
    image: int  # which of the document's images it is
    text: int | None  # which of its texts the caption is
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def image_kind(settings: DataSettings) -> ImageKind | None:
    """What a sequence's images are handed over as: visual embeddings, else patches, else pixels."""
    kinds: tuple[Literal["visual", "patches"], ...] = ("visual", "patches")
    for kind in kinds:
        if kind in settings.features:
            return kind
    return "pixels" if settings.pixels else None


class SequenceLoader:
    """Loads the slots of packed rows.

    Raises UserError when the data has images but the settings say neither which feature to read nor `pixels`, or when
    stored visual embeddings do not have N per image.
    """

    def __init__(
        self, sources: Sequence[OpenSource], *, settings: DataSettings, assemblers: Sequence[Assembler]
    ):
        self.sources, self.settings, self.assemblers = sources, settings, assemblers
        self.kind = image_kind(settings)
        is_feature = self.kind in settings.features
        self._dtype = feature_dtype(sources, str(self.kind)) if is_feature else np.dtype(np.uint8)
        if self.kind is None and (named := [source.name for source in sources if source.has_images]):
            raise UserError(
                f"source {named[0]!r} has images, but nothing says how to read them; add visual or patches to "
                "data.features, or set data.pixels to true"
            )
        for source in sources:
            if self.kind == "visual" and (spec := source.features["visual"].spec).shape[0] != self.num_visual:
                raise UserError(
                    f"source {source.name!r} stores {spec.shape[0]} visual embeddings per image, the model has "
                    f"{self.num_visual}; run python -m data_prep.features with this tokenizer"
                )

    @property
    def num_visual(self) -> int:
        return self.assemblers[0].tokenizer.num_visual

    @property
    def image_length(self) -> int:
        """Positions of an image with its two marks."""
        return self.assemblers[0].tokenizer.image_length

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as it travels to the device."""
        if self.kind in self.settings.features:
            return math.prod(self.sources[0].features[self.kind].spec.shape) * self._dtype.itemsize
        return 0 if self.kind is None else 3 * self.settings.image_size_px**2

    def load(self, place: Place) -> LoadedSequence:
        """A sample with its images. Raises BadSample."""
        return self.with_images(place, self.read(place))

    def read(self, place: Place) -> LoadedSequence:
        """A sample without its images. Raises BadSample."""
        source, assembler = self.sources[place.source], self.assemblers[place.source]
        sample = source.read(place.shard, place.sample, with_images=False)
        parts = source.lengths(place.shard, tokenizer=assembler.tokenizer).parts(place.sample)
        plan = assembler.plan(parts, Draws(place.key))
        try:
            sequence = assembler.render(plan, sample.document)
        except (LengthMismatch, IndexError) as error:
            raise source.bad("length_mismatch", place.shard, place.sample) from error
        return LoadedSequence(sample.document.id, place.source, sequence, None, plan.num_dropped_images)

    def with_images(self, place: Place, loaded: LoadedSequence) -> LoadedSequence:
        """What `read` gave for this place, with its images. Raises BadSample."""
        numbers = loaded.sequence.images
        return replace(loaded, images=self._images(place, numbers)) if numbers else loaded

    def _images(self, place: Place, numbers: tuple[int, ...]) -> np.ndarray:
        """Images of a sequence: -> (m, P, C) | (m, N, d) | (m, H, W, 3) uint8."""
        source, draws = self.sources[place.source], Draws(place.key)
        if self.kind == "pixels":
            sample = source.read(place.shard, place.sample, with_images=True)
            return np.stack([read_image(source, place, sample, number, self.settings) for number in numbers])
        assert self.kind is not None
        first = source.image_row(place.shard, place.sample)
        reader = source.features[self.kind]
        rows = []
        for number in numbers:
            view = draws.below(reader.spec.views, Purpose.VIEW + number)
            rows.append(reader.rows(place.shard, first + number, first + number + 1, view=view)[0])
        return np.stack(rows).astype(self._dtype, copy=False)


def chosen_image(document: Document, draws: Draws) -> int:
    """Which of its images a document gives to the image stages."""
    return draws.below(document.num_images, Purpose.IMAGE)


class ConditionLoader:
    """Loads samples of the image stages: an image, its caption, its features.

    Inputs (`patches`) are a random one of the stored views; targets (`image_condition`) are always view 0, the image as
    it is. A document with several images gives one of them, without text: its text is about all of them.
    """

    def __init__(self, sources: Sequence[OpenSource], *, settings: DataSettings):
        self.sources, self.settings = sources, settings

    def load(self, place: Place) -> LoadedCondition:
        """A sample with its arrays. Raises BadSample."""
        return self.with_images(place, self.read(place))

    def read(self, place: Place) -> LoadedCondition:
        """A sample without its arrays. Raises BadSample."""
        source, draws = self.sources[place.source], Draws(place.key)
        document = source.read(place.shard, place.sample, with_images=False).document
        if document.num_images == 0:
            raise source.bad("no_image", place.shard, place.sample)
        image = chosen_image(document, draws)
        texts = [part.text for part in document.parts if isinstance(part, TextPart)]
        text = draws.below(len(texts), Purpose.TEXT) if texts and document.num_images == 1 else None
        caption = "" if text is None else texts[text]
        return LoadedCondition(document.id, place.source, caption, image, text)

    def with_images(self, place: Place, loaded: LoadedCondition) -> LoadedCondition:
        """What `read` gave for this place, with its arrays. Raises BadSample."""
        source, draws = self.sources[place.source], Draws(place.key)
        image, text = loaded.image, loaded.text
        arrays: dict[str, np.ndarray] = {}
        for name, reader in source.features.items():
            if reader.spec.per == "image":
                row = source.image_row(place.shard, place.sample) + image
                view = (
                    draws.below(reader.spec.views, Purpose.VIEW + image) if name != "image_condition" else 0
                )
                arrays[name] = reader.rows(place.shard, row, row + 1, view=view)[0]
            elif loaded.caption and text is not None:
                row = source.text_row(place.shard, place.sample) + text
                arrays[name] = reader.rows(place.shard, row, row + 1, view=0)[0]
        if self.settings.pixels:
            sample = source.read(place.shard, place.sample, with_images=True)
            arrays["pixels"] = read_image(source, place, sample, image, self.settings)
        return replace(loaded, arrays=arrays)


def read_image(
    source: OpenSource, place: Place, sample: Sample, number: int, settings: DataSettings
) -> np.ndarray:
    """Image `number` of a sample: -> (H, W, 3) uint8. Raises BadSample."""
    try:
        return read_square(sample.images[number], size_px=settings.image_size_px, decoder=settings.decoder)
    except BadImage as error:
        raise source.bad(error.reason, place.shard, place.sample) from error
