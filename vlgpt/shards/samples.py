"""The rules for samples in tars that others wrote. The build and the loader read by them, so both see the same samples.

As in webdataset, a key is the path of a member up to the first dot of its base name, and the rest, in small letters,
is its field: `a/b.seg.png` is the field `seg.png` of the key `a/b`. A name that begins with a dot, as the companions
`._NAME` that a Mac adds, belongs to no sample. Beyond webdataset: members of a key may lie anywhere in the tar, `./`
and `/` before a key are cut, and links count as the files they name.

The image of a sample is its only field with an image's suffix and no dot; masks and the like have a dot (`seg.png`).
Without such a field an only `left.png` is taken, and its texts may be `left.txt`. Several are one drop,
`several_images`: no rule could say which one the caption is about.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.image_formats import IMAGE_SUFFIXES
from vlgpt.shards.tars import list_tar_members

IMAGES = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
TEXT_FIELDS = ("caption", "txt", "text", "cap")
FIELDS = ("image", "json", *TEXT_FIELDS)
CAPTION_NAMES = ("top_caption", "caption", "txt", "text", "TEXT", "cap")
"""Where captions are looked for, in this order: names in the JSON, and files."""
MAX_TEXT_BYTES = 1 << 20
REASONS = ("", "no_image", "several_images", "not_a_file", "duplicate_key")
KNOWN = (*IMAGES, *FIELDS[1:])
NAMES_SHOWN, NAMES_KEPT = 12, 100
NO_PLACE = -1
SURROGATE = re.compile("[\ud800-\udfff]")
VISIBLE = re.compile(
    "[^\\s\\x00-\\x1f\\x7f-\\x9f\\xad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f\\u2028-\\u202e"
    "\\u2060-\\u206f\\u2800\\u3164\\ufe00-\\ufe0f\\ufeff\\uffa0\\ufff9-\\ufffb\\U000e0000-\\U000e0fff]"
)
EDGES = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff\u200b\u2060"
"""Blanks of all widths, and byte-order marks: they are cut where a text begins and ends."""
Place = tuple[int, int]
"""Offset and size of a member's bytes."""


class BadText(ValueError):
    """Texts of a sample that give no caption: `reason` is one word to count by."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class TarSamples:
    """The n samples of one tar, in order of first appearance, judged by the names of their members alone."""

    keys: list[str]
    reasons: np.ndarray  # (n,) uint8, position in REASONS; 0: nothing is wrong
    places: np.ndarray  # (n, len(FIELDS), 2) int64: offset and size of every field, NO_PLACE without it
    problems: tuple[str, ...]
    """Of the tar itself, see `TarMembers`."""
    passed_over: dict[str, int]
    """Members that belong to no rule, by field or name."""

    def __len__(self) -> int:
        return len(self.keys)

    def reason(self, number: int) -> str:
        """Why a sample cannot be used, "" when its members are as they should be."""
        return REASONS[self.reasons[number]]

    def place(self, number: int, field: str) -> Place | None:
        """Offset and size of a field."""
        offset, size = self.places[number, FIELDS.index(field)].tolist()
        return None if offset == NO_PLACE else (offset, size)

    def texts(self, number: int) -> dict[str, Place]:
        """Offset and size of all fields but the image."""
        found = {field: self.place(number, field) for field in FIELDS[1:]}
        return {field: place for field, place in found.items() if place is not None}


def split_name(name: str) -> tuple[str, str] | None:
    """(key, field) of a member; None for a name that belongs to no sample."""
    folder, _, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    if not stem or not field:
        return None
    while folder.startswith(("./", "/")) or folder == ".":
        folder = folder[1:].lstrip("/")
    return (f"{folder}/{stem}" if folder else stem), field.lower()


def choose_fields(fields: Collection[str]) -> tuple[str, dict[str, str]]:
    """Which field of a sample is its image, which its texts: ("", one of FIELDS -> field), or the reason why there is
    no image.
    """
    images = [field for field in fields if _suffix(field) in IMAGES]
    images = [field for field in images if "." not in field] or images
    if len(images) != 1:
        return ("several_images" if images else "no_image"), {}
    chosen = {"image": images[0]}
    part, dot, _ = images[0].rpartition(".")
    for role in FIELDS[1:]:
        for field in (f"{part}{dot}{role}", role):
            if field in fields:
                chosen.setdefault(role, field)
    return "", chosen


def _suffix(field: str) -> str:
    return field.rpartition(".")[2]


def list_samples(tar: Path) -> TarSamples:
    """The samples of an uncompressed tar. Raises OSError when it cannot be read."""
    members = list_tar_members(tar)
    groups: dict[str, dict[str, Place | None]] = {}
    duplicates: list[str] = []
    passed_over: Counter[str] = Counter()
    files = zip(members.names, zip(members.offsets.tolist(), members.sizes.tolist()))
    for name, place in itertools.chain(files, ((name, None) for name in members.others)):
        split = split_name(name)
        if split is None:
            passed_over[".*" if name.rpartition("/")[2].startswith(".") else "no suffix"] += 1
        elif split[1] not in (fields := groups.setdefault(split[0], {})):
            fields[split[1]] = place
        elif _suffix(split[1]) in IMAGES:
            duplicates.append(split[0])
        else:
            passed_over[split[1]] += 1
    keys: list[str] = []
    reasons: list[str] = []
    chosen: list[dict[str, Place | None]] = []
    for key, fields in groups.items():
        if not any(_suffix(field) in KNOWN for field in fields):
            passed_over.update(fields.keys())
            continue
        reason, names = choose_fields(fields)
        if not reason:
            passed_over.update(fields.keys() - names.values())
            reason = "not_a_file" if fields[names["image"]] is None else ""
        keys.append(key)
        reasons.append(reason)
        chosen.append({role: fields[field] for role, field in names.items()})
    reasons += ["duplicate_key"] * len(duplicates)
    chosen += [{}] * len(duplicates)
    return TarSamples(
        keys=keys + duplicates,
        reasons=np.array([REASONS.index(reason) for reason in reasons], np.uint8),
        places=np.array(
            [[places.get(role) or (NO_PLACE, 0) for role in FIELDS] for places in chosen], np.int64
        ).reshape(-1, len(FIELDS), 2),
        problems=members.problems,
        passed_over=dict(passed_over.most_common(NAMES_KEPT)),
    )


@dataclass(frozen=True)
class SampleTexts:
    """What the texts of a sample say: `record` is its JSON, `files` are its other text fields."""

    record: dict[str, Any]
    files: dict[str, str]

    @staticmethod
    def parse(texts: Mapping[str, bytes]) -> SampleTexts:
        """From the bytes by FIELDS. Raises BadText(`text_too_long`, `text_not_utf8`, `bad_json`)."""
        found = {role: _decoded(data) for role, data in texts.items()}
        try:
            record = json.loads(found.pop("json", "{}"))
        except (ValueError, RecursionError) as error:
            raise BadText("bad_json") from error
        if not isinstance(record, dict):
            raise BadText("bad_json")
        return SampleTexts({name: value for name, value in record.items() if value is not None}, found)

    @property
    def values(self) -> dict[str, Any]:
        """Everything by name; what the JSON says goes before a file."""
        return {**self.files, **self.record}

    def caption(self) -> tuple[str, str]:
        """(one of FIELDS, the caption that it holds). Where a file says the same as the JSON, it is the file, which is
        read faster. Raises BadText(`no_caption`, and as `clean_text`).
        """
        for name in CAPTION_NAMES:
            if name in self.record:
                caption = clean_text(self.record[name], word="caption")
                return next((role for role, text in self.files.items() if text == caption), "json"), caption
            if name in self.files:
                return name, clean_text(self.files[name], word="caption")
        raise BadText("no_caption")


def read_texts(samples: TarSamples, number: int, read: Callable[[int, int], bytes]) -> SampleTexts:
    """The texts of a sample; `read` gives the bytes at an offset of some size. Raises BadText, see
    `SampleTexts.parse`.
    """
    places = samples.texts(number)
    if any(size > MAX_TEXT_BYTES for _, size in places.values()):
        raise BadText("text_too_long")
    return SampleTexts.parse({role: read(*place) for role, place in places.items()})


def _decoded(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise BadText("text_too_long")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadText("text_not_utf8") from error


def clean_text(value: object, *, word: str) -> str:
    """A caption or another text as it is kept; see `visible`. Every reader takes its texts through here.

    Raises BadText: `bad_` word for what is no text, or holds half a surrogate pair; `empty_` word when nothing is to be
    seen.
    """
    if not isinstance(value, str) or not (value.isascii() or SURROGATE.search(value) is None):
        raise BadText(f"bad_{word}")
    if not (text := visible(value)):
        raise BadText(f"empty_{word}")
    return text


def visible(text: str) -> str:
    """Without NULs, and without the blanks and byte-order marks around it; "" when nothing is to be seen."""
    return text.replace("\0", "").strip(EDGES) if VISIBLE.search(text) else ""


def caption_of(role: str, data: bytes) -> str:
    """The caption in a text of this role, one of FIELDS. Raises BadText, as `SampleTexts` does."""
    if role != "json":  # every sample of a training run comes through here
        return clean_text(_decoded(data), word="caption")
    return SampleTexts.parse({role: data}).caption()[1]


def pair_document(caption: str | None, *, key: str, source: str) -> Document:
    """The pair (image, caption), or the image alone."""
    parts = (ImagePart(0),) if caption is None else (ImagePart(0), TextPart(caption))
    return Document(key, source, parts)


def listed(counts: Mapping[str, int]) -> str:
    """`5 txt, 3 seg.png`, the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NAMES_SHOWN]
    return ", ".join(f"{count} {name}" for name, count in ranked) + ", ..." * (len(counts) > NAMES_SHOWN)


def names_found(texts: Iterable[SampleTexts], passed_over: Iterable[str]) -> str:
    """For people who wonder where their captions are: names in the JSON, other fields."""
    names = dict.fromkeys([*itertools.chain.from_iterable(text.record for text in texts), *passed_over])
    return ", ".join(list(names)[:NAMES_SHOWN]) + ", ..." * (len(names) > NAMES_SHOWN) or "none"
