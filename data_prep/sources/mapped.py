"""Records of any JSON or Parquet file by a mapping: ten lines of YAML say which fields make a document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_prep.sources.base import (
    BadRecord,
    ConvertingSource,
    ImageOpener,
    Info,
    Numbered,
    Record,
    mapping,
    numbers,
    text,
)
from data_prep.sources.img2dataset_shards import FILTER_COLUMNS
from data_prep.sources.join import ImageFinder, image_reference
from data_prep.sources.json_source import open_records
from data_prep.sources.records import RawRecord
from vlgpt.config import parse_yaml, validate
from vlgpt.document import Document, ImagePart, Part, Role, TextPart
from vlgpt.errors import UserError


class MappedPart(BaseModel):
    """One part of a document: the image or images of a field, the text of a field, or fixed words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str | None = Field(
        None, description="field with an image's name, with the image, or with a list of these"
    )
    text: str | None = Field(None, description="field with text")
    words: str | None = Field(None, description="the text itself, for every record")
    role: Role = Field("plain", description="who says it")

    @model_validator(mode="after")
    def _one_of_them(self) -> MappedPart:
        if sum(value is not None for value in (self.image, self.text, self.words)) != 1:
            raise ValueError("a part has either image, text or words")
        return self


class Recipe(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    licence: str = Field("unknown", description="of the data, for the manifest")
    parts: tuple[MappedPart, ...] = Field(min_length=1, description="in reading order")


class MappedSource(ConvertingSource[RawRecord]):
    """JSON, JSON Lines or Parquet files by a mapping in YAML: `licence`, and `parts` in reading order, each with
    `image: FIELD`, `text: FIELD` or `words: "fixed text"`, and in chats `role: user` or `role: assistant`. All fields
    must be there. Numbers under LAION's and img2dataset's names and a `url` serve the filters.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        *,
        mapping: Annotated[Path, "YAML file with `licence` and `parts`"],
        images: Annotated[
            tuple[Path, ...] | None, "folders, tars or zip files with the images; else beside the input"
        ] = None,
    ):
        if not mapping.is_file():
            raise UserError(f"--mapping {mapping} does not exist")
        recipe = validate(Recipe, parse_yaml(mapping.read_text(encoding="utf-8")), where=str(mapping))
        self.recipe = recipe.model_dump(exclude_none=True)
        self.licence, self._parts = recipe.licence, recipe.parts
        fields = {
            name: (name,) for part in recipe.parts for name in (part.image, part.text) if name is not None
        }
        opened = open_records(inputs, fields, source="mapped", what=f"file for {mapping}")
        self.records: Numbered[RawRecord] = opened
        self._images = ImageFinder(images or sorted({file.path.parent for file in opened.files}))

    def make(self, raw: RawRecord) -> Record:
        """The parts that the mapping names. Raises BadRecord when one is not there, BadImage when no image is found."""
        value = mapping(raw.value)
        parts: list[Part] = []
        openers: list[ImageOpener] = []
        for part in self._parts:
            if part.image is None:
                words = part.words if part.text is None else text(value, part.text, word="text")
                parts.append(TextPart(words or "", part.role))
                continue
            found = value.get(part.image)
            images = found if isinstance(found, list) else [found]
            if found is None or not images:
                raise BadRecord("no_image", part.image)
            for image in map(image_reference, images):
                parts.append(ImagePart(len(openers), part.role))
                openers.append(self._images.open(image))
        info: Info = numbers(value, FILTER_COLUMNS)
        if isinstance(value.get("url"), str):
            info["url"] = value["url"]
        return Record(Document(raw.key, "mapped", tuple(parts), info), tuple(openers))
