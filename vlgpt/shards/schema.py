"""What a shard folder holds: samples, indexes, shard reports and feature specifications.

    NNNNN.tar          KEY.json (Document record), KEY.0.png, KEY.1.jpg, ... (images in document order)
    NNNNN.idx          ShardIndex: where every member lies, parts, roles and token lengths per sample
    NNNNN.json         ShardReport: counts, drops by reason, hashes
    manifest.json      every shard with counts and sha256, licence, build settings; `_SUCCESS` beside it
    features/NAME/     spec.json (FeatureSpec) and NNNNN.npy, one row per image or per text part

KEY is the shard number and the record's number inside the shard's input range, five digits each; it is never
built from input strings.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlgpt.document import ROLES, Document, TextPart, TextPlace, text_places
from vlgpt.errors import UserError

SCHEMA_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_RECORDS_PER_SHARD = 100_000
MAX_SHARDS = 100_000


class BadSample(Exception):
    """A sample that cannot be delivered: `reason` is one word to count by, `key` and `shard` say where it lies."""

    def __init__(self, reason: str, key: str, shard: str):
        super().__init__(f"shard {shard}, sample {key}: {reason}")
        self.reason, self.key, self.shard = reason, key, shard

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return BadSample, (self.reason, self.key, self.shard)


class UnstorableDocument(ValueError):
    """A document that has no JSON form: text that is no Unicode (lone surrogates), or info of other types."""


class TextTokenizer(Protocol):
    """What the writer needs of a tokenizer to store token lengths."""

    @property
    def fingerprint(self) -> str: ...

    def encode_text(self, text: str, place: TextPlace) -> list[int]:
        """Token ids of a text, which depend on where the text stands in the document."""


@dataclass(frozen=True)
class Sample:
    """One document with its encoded images, in document order."""

    document: Document
    images: tuple[bytes, ...]
    key: str


class StoredModel(BaseModel):
    """Base of everything stored as JSON: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(StoredModel):
    """One line of the manifest."""

    name: str
    num_samples: int
    num_images: int
    num_bytes: int
    sha256: str


class ShardReport(StoredModel):
    """`NNNNN.json`: what came in, what was written, what was dropped and why. `num_records == num_samples + drops`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    first_record: int = Field(ge=0)
    num_records: int = Field(ge=0)
    num_samples: int = Field(ge=0)
    num_images: int = Field(ge=0)
    dropped: dict[str, int]
    dropped_records: dict[str, tuple[int, ...]]
    """Record numbers inside the shard, by reason: what `--retry-failed` reads again."""
    dropped_images: dict[str, tuple[int, ...]] = {}
    """Images that written documents lost on the way: by reason, the record number of each."""
    num_bytes: int
    sha256: str
    first_key: str
    last_key: str
    build: str
    """Fingerprint of the settings and library versions that made this shard."""

    @model_validator(mode="after")
    def _counts_add_up(self) -> ShardReport:
        if self.num_records != self.num_samples + sum(self.dropped.values()):
            raise ValueError(
                f"shard {self.name}: {self.num_records} in, {self.num_samples} written, dropped "
                f"{self.dropped}"
            )
        if {reason: len(records) for reason, records in self.dropped_records.items()} != self.dropped:
            raise ValueError(f"shard {self.name}: dropped_records do not match the counts {self.dropped}")
        return self

    def record(self) -> ShardRecord:
        """The line of this shard in the manifest."""
        return ShardRecord(
            name=self.name,
            num_samples=self.num_samples,
            num_images=self.num_images,
            num_bytes=self.num_bytes,
            sha256=self.sha256,
        )


class FeatureSpec(StoredModel):
    """How a feature was computed. `shape` is the shape of one view; a row holds `views` of them."""

    name: Literal["patches", "image_condition", "text_condition", "visual"]
    encoder: str
    weights_hash: str
    layer: str
    preprocessing: str
    shape: tuple[int, ...]
    dtype: Literal["float16", "float32", "int8"]
    views: int
    per: Literal["image", "text"]

    @property
    def fingerprint(self) -> str:
        """Equal if and only if the features are interchangeable."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=16).hexdigest()


@dataclass
class ShardIndex:
    """The columns of `NNNNN.idx` for n samples, P parts and M tar members.

    Starts are cumulative: sample i owns parts `part_start[i]:part_start[i + 1]`, rows `image_start[i]:image_start[i +
    1]` of every per-image feature, rows `text_start[i]:text_start[i + 1]` of every per-text feature, and members
    `member_start[i]:member_start[i + 1]` (the record first, then its images in order).
    """

    keys: np.ndarray  # (n,) str
    part_start: np.ndarray  # (n + 1,) int64
    part_is_image: np.ndarray  # (P,) bool
    part_role: np.ndarray  # (P,) uint8, position in vlgpt.document.ROLES
    part_tokens: np.ndarray  # (P,) int32, 0 for images, -1 when no tokenizer was given
    image_start: np.ndarray  # (n + 1,) int64
    text_start: np.ndarray  # (n + 1,) int64
    member_start: np.ndarray  # (n + 1,) int64
    member_offset: np.ndarray  # (M,) int64, of the member's data in the tar
    member_size: np.ndarray  # (M,) int64
    member_crc: np.ndarray  # (M,) uint32, crc32 of the member's data
    member_suffix: np.ndarray  # (M,) str
    tokenizer: str  # fingerprint, "" without token lengths
    tar_sha256: str

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_images(self) -> int:
        return int(self.image_start[-1])

    @property
    def num_texts(self) -> int:
        return int(self.text_start[-1])

    def save_bytes(self) -> bytes:
        """The npz file as bytes, equal for equal content."""
        buffer = io.BytesIO()
        columns = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(buffer, **columns)  # type: ignore[arg-type]  # none is allow_pickle
        return buffer.getvalue()

    @staticmethod
    def load(path: Path | io.BytesIO) -> ShardIndex:
        """Raises FileNotFoundError, or UserError naming the file when it is damaged or from another schema."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                columns: dict[str, Any] = {name: archive[name] for name in archive.files}
            for name in ("tokenizer", "tar_sha256"):
                columns[name] = str(columns[name])
            return ShardIndex(**columns)
        except FileNotFoundError:
            raise
        except (
            *(OSError, ValueError, KeyError, TypeError, EOFError, IndexError, NotImplementedError),
            *(zipfile.BadZipFile, zlib.error),
        ) as error:
            raise UserError(
                f"index {path} is damaged ({error}); rebuild it: python -m data_prep.index DIR"
            ) from error


def part_columns(
    document: Document, *, tokenizer: TextTokenizer | None
) -> tuple[list[bool], list[int], list[int]]:
    """Per part of the document: is it an image, its role's position in ROLES, its number of tokens."""
    is_image, roles, tokens = [], [], []
    for part, place in zip(document.parts, text_places([part.role for part in document.parts])):
        is_image.append(not isinstance(part, TextPart))
        roles.append(ROLES.index(part.role))
        if not isinstance(part, TextPart):
            tokens.append(0)
        else:
            tokens.append(-1 if tokenizer is None else len(tokenizer.encode_text(part.text, place)))
    return is_image, roles, tokens
