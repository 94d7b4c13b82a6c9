"""A small stand-in for the emoji shards: drawings whose colour is the skin tone, whose pattern is the concept and
whose hat is the gender, written as data_prep would write them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.processes import ROOT
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.images import png_bytes
from vlgpt.seeds import address
from vlgpt.shards import ShardWriter, write_manifest

JOBS = ROOT / "demo" / "jobs.yaml"
SIZE_PX = 36
TONES = {"none": (250, 200, 40), "light": (250, 220, 200), "medium": (190, 130, 80), "dark": (90, 50, 30)}
GENDERS = {"man": (0, 0, 200), "woman": (200, 0, 120), "person": (0, 150, 0)}
STYLES = ("noto", "twemoji")
NUM_ROLES = 8
HARMFUL = '<script>alert("x")</script> & co'


@dataclass(frozen=True)
class Drawing:
    info: dict[str, Any]
    data: bytes


def drawing(role: int, gender: str, tone: str, style: str) -> Drawing:
    """One picture and its attributes; gender and tone are empty for objects."""
    rng = np.random.default_rng(address("test drawing", role, gender == ""))
    cells = rng.integers(0, 2, (6, 6)).astype(bool)
    pixels = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    pixels[6:30, 6:30][cells.repeat(4, 0).repeat(4, 1)] = TONES.get(tone, (40 + 20 * role, 90, 160))
    if gender:
        pixels[:5, {"man": 2, "woman": 12, "person": 24}[gender] :][:, :10] = GENDERS[gender]
    if style == "twemoji":
        pixels[33:] = (120, 120, 120)
    base = f"{role:02}-{gender or 'object'}"
    name = f"{gender} doing task{role}" if gender else f"flag of land{role}" if role % 2 else f"object{role}"
    name = HARMFUL if base == "06-object" else name
    labels = {"category": "people" if gender else "things", "subcategory": f"group{role % 3}", "style": style}
    labels |= {"tone": tone, "gender": gender} if gender else {}
    info = {
        "id": f"{style}/{base}-{tone or 'plain'}",
        "base": base,
        "caption": f"{name}, {tone} skin tone" if tone not in ("", "none") else name,
        "name": name,
        "category": labels["category"],
        "subcategory": labels["subcategory"],
        "tone": tone,
        "gender": gender,
        "role": f"role{role}" if gender else "",
        "style": style,
        "labels": labels,
        "flag": not gender and bool(role % 2),
    }
    info["split"] = split_of(role, gender, tone, style)
    return Drawing(info, png_bytes(Image.fromarray(pixels)))


def split_of(role: int, gender: str, tone: str, style: str) -> str:
    if role >= 6:
        return "unseen"
    if role % 2 and tone == "medium" and gender == "man":
        return "combination"
    return (
        "seen" if style == STYLES[role % 2] and gender in ("woman", "") and tone in ("light", "") else "train"
    )


def catalogue() -> list[Drawing]:
    people = itertools.product(range(NUM_ROLES), GENDERS, TONES, STYLES)
    objects = itertools.product(range(NUM_ROLES), [""], [""], STYLES)
    return [drawing(*attributes) for attributes in (*people, *objects)]


def user(text: str) -> TextPart:
    return TextPart(text, "user")


def chat(
    kind: str, family: str, parts: tuple, drawings: tuple[Drawing, ...], **info: Any
) -> tuple[Document, list]:
    id = "/".join([kind, family, *(d.info["id"] for d in drawings), *map(str, info.values())])
    if kind == "edit":
        info |= {"source": drawings[0].info, "target": drawings[1].info}
    else:
        info |= {"picture": drawings[0].info}
    document = Document(id, "emoji", parts, {"kind": kind, "family": family, **info})
    return document, [("png", d.data) for d in drawings]


def question(one: Drawing, family: str, text: str, answer: str, **info: Any) -> tuple[Document, list]:
    parts = (ImagePart(0, "user"), user(text), TextPart(answer, "assistant"))
    return chat("question", family, parts, (one,), answer=answer, **info)


def edit(source: Drawing, target: Drawing, family: str) -> tuple[Document, list]:
    wanted = target.info[family]
    parts = (
        ImagePart(0, "user"),
        user(f"Make it {wanted}."),
        TextPart("Here:", "assistant"),
        ImagePart(1, "assistant"),
    )
    return chat("edit", family, parts, (source, target), wanted=wanted)


def held_out(drawings: list[Drawing], everything: list[Drawing]) -> list[tuple[Document, list]]:
    """All chats of one split."""
    chats = []
    for one in drawings:
        for family, answer in one.info["labels"].items():
            chats.append(question(one, family, f"What {family}?", answer))
        chats.append(question(one, "flag", "Is this a flag?", "yes" if one.info["flag"] else "no"))
        chats.append(question(one, "is_a", f"Is this {one.info['name']}?", "yes", level="yes"))
        chats.append(question(one, "is_a", "Is this a banana?", "no", level="easy"))
        describe = (user("Describe"), ImagePart(0, "user"), TextPart(one.info["caption"] + ".", "assistant"))
        chats.append(chat("describe", "caption", describe, (one,)))
        draw = (
            user(f"Draw {one.info['caption']}."),
            TextPart("Here:", "assistant"),
            ImagePart(0, "assistant"),
        )
        chats.append(chat("draw", "caption", draw, (one,)))
    ids = {one.info["id"] for one in drawings}
    return chats + [item for item in edits(everything, "tone") if item[0].info["target"]["id"] in ids]


def edits(everything: list[Drawing], family: str) -> list[tuple[Document, list]]:
    """All pairs that differ in one attribute only."""
    fixed = [key for key in ("role", "gender", "tone", "style") if key != family]
    pairs = itertools.permutations([d for d in everything if d.info["role"]], 2)
    return [edit(a, b, family) for a, b in pairs if all(a.info[key] == b.info[key] for key in fixed)]


def write_folder(folder: Path, records: list[tuple[Document, list]]) -> None:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, 0)
    for document, images in records:
        writer.add(document, images)
    writer.close()
    write_manifest(folder, name=folder.name, licence="test", versions={}, build={}, num_shards=1)


def write_data(data: Path) -> None:
    """Every folder that the emoji benchmarks read."""
    everything = catalogue()
    by_split: dict[str, list[Drawing]] = {}
    for one in everything:
        by_split.setdefault(one.info["split"], []).append(one)
    for split, drawings in by_split.items():
        pairs = [(ImagePart(0), TextPart(d.info["caption"])) for d in drawings]
        documents = [Document(d.info["id"], "emoji", parts, d.info) for d, parts in zip(drawings, pairs)]
        write_folder(
            data / f"pairs-{split}", [(doc, [("png", d.data)]) for doc, d in zip(documents, drawings)]
        )
        if split != "train":
            write_folder(data / f"instructions-{split}", held_out(drawings, everything))
    gender = edits(everything, "gender")
    is_target = [d.info["source"]["split"] == "train" != d.info["target"]["split"] for d, _ in gender]
    write_folder(data / "instructions-target", [item for item, chosen in zip(gender, is_target) if chosen])
