"""The whole way of stage 3: five instruction sources -> shards -> mixture by size -> rows whose targets are answers."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.source_files import (
    ASSETS,
    asset,
    image_bytes,
    open_source,
    picture,
    read_all,
    write_pictures,
    write_table,
)
from tests.helpers.tiny_unified import NUM_VISUAL, new_document_tokenizer
from vlgpt.data.loader import Loader
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.shards import ShardWriter, write_manifest

SIZES = {"llava": 160, "svit": 400, "coco": 120, "instructpix2pix": 90, "magicbrush": 30}
TOKENIZER = new_document_tokenizer(template="short")


def sources(folder: Path) -> dict:
    """The five sources over the records in tests/assets, with pictures."""
    write_pictures(folder / "train2017", ["000000033471.jpg", "000000033472.jpg"])
    write_pictures(folder / "vg", ["VG_100K/2407890.jpg", "VG_100K_2/2407891.jpg"])
    write_pictures(folder / "coco", ["val2014/COCO_val2014_000000391895.jpg"])
    shutil.copytree(ASSETS / "instructpix2pix", folder / "pix")
    for seed in ("2223667", "3120932"):
        for number in (0, 1):
            (folder / "pix" / "0000000" / f"{seed}_{number}.jpg").write_bytes(picture(number))
    rows = asset("magicbrush.json")
    for row in rows:
        row |= {"source_img": {"bytes": picture(1)}, "target_img": {"bytes": picture(2)}}
    write_table(folder / "magicbrush" / "train.parquet", rows)
    images = {name: (folder / name,) for name in ("train2017", "vg", "coco")}
    return {
        "llava": open_source("llava", ASSETS / "llava_instruct_150k.json", images=images["train2017"]),
        "svit": open_source("svit", ASSETS / "svit_conversation.json", images=images["vg"]),
        "coco": open_source("coco", ASSETS / "captions_val2014.json", images=images["coco"]),
        "instructpix2pix": open_source("instructpix2pix", folder / "pix", split="all"),
        "magicbrush": open_source("magicbrush", folder / "magicbrush"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict[str, Document]]:
    """Shards of every source with as many records as `SIZES` says, and all documents by id."""
    folder = tmp_path_factory.mktemp("instructions")
    documents: dict[str, Document] = {}
    for name, source in sources(folder / "in").items():
        records = [item for item in read_all(source) if hasattr(item, "document")]
        (folder / name).mkdir()
        writer = ShardWriter(folder / name, 0, tokenizer=TOKENIZER)
        for number in range(SIZES[name]):
            record = records[number % len(records)]
            document = replace(record.document, id=f"{name}/{number}")
            writer.add(document, [("jpg", image_bytes(image)) for image in record.images])
            documents[document.id] = document
        writer.close()
        write_manifest(folder / name, name=name, licence="none", versions={}, build={}, num_shards=1)
    return folder, documents


@pytest.fixture(scope="module")
def read(data):
    """Batches of two epochs and the loader's statistics after them."""
    folder, _ = data
    chosen = DataSettings(
        sources=tuple(SourceSettings(name=name, path=str(folder / name), weight="size") for name in SIZES),
        sequence_length=256,
        pixels=True,
        image_size_px=8,
        num_workers=0,
    )
    loader = Loader(chosen, kind="packed", micro_batch=8, tokenizer=TOKENIZER)
    batches = []
    while sum(loader.statistics()["samples"].values()) < 2 * sum(SIZES.values()):
        batches.append(next(loader))
    statistics = loader.statistics()
    loader.close()
    return batches, statistics


def test_the_realised_mixture_is_logged_and_follows_the_sizes(read):
    _, statistics = read
    total = sum(SIZES.values())
    assert sum(statistics["mixture"].values()) == pytest.approx(1.0)
    for name, size in SIZES.items():
        assert statistics["mixture"][name] == pytest.approx(size / total, abs=0.04), name
    assert sum(statistics["tokens"].values()) > 0 and statistics["bad"] == {}


def test_targets_of_every_source_are_the_answers_with_their_end_and_their_pictures(data, read):
    _, documents = data
    visual_targets: Counter[str] = Counter()
    kinds = set()
    for batch in read[0]:
        for row, names in enumerate(batch.documents):
            for segment, name in enumerate(names, 1):
                inside = batch.segment_ids[row] == segment
                is_target, is_visual = batch.is_target[row][inside], batch.is_visual[row][inside]
                parts = documents[name].parts
                answers = [part for part in parts if part.role == "assistant"]
                num_images = sum(isinstance(part, ImagePart) for part in answers)
                words = [i for p in answers if isinstance(p, TextPart) for i in TOKENIZER.encode_text(p.text)]
                ends = sum(
                    part.role == "assistant" and (at + 1 == len(parts) or parts[at + 1].role == "user")
                    for at, part in enumerate(parts)
                )
                assert int((is_target & is_visual).sum()) == NUM_VISUAL * num_images, name
                assert int((is_target & ~is_visual).sum()) == len(words) + ends + 2 * num_images, name
                ids = batch.token_ids[row][inside][is_target & ~is_visual].tolist()
                special = (TOKENIZER.begin_image_id, TOKENIZER.end_image_id, TOKENIZER.eos_id)
                assert [i for i in ids if i not in special] == words, name
                source = name.partition("/")[0]
                visual_targets[source] += num_images
                kinds.add((source, num_images))
    assert visual_targets["llava"] == visual_targets["svit"] == 0
    assert {("coco", 0), ("coco", 1), ("instructpix2pix", 1), ("magicbrush", 1), ("magicbrush", 2)} <= kinds
