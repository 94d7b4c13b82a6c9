"""MMC4 and OBELICS: pages keep their order, pictures are joined by name or URL, what is lost is counted."""

import base64
import itertools
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import Dropped
from data_prep.sources.assignment import best_assignment
from data_prep.sources.matching import match_images
from data_prep.urls import main as urls_main
from tests.helpers.builds import build
from tests.helpers.source_files import (
    asset,
    open_source,
    picture,
    read_all,
    shown,
    write_download,
    write_pictures,
    write_table,
)
from tests.helpers.tars import write_tar
from vlgpt.errors import UserError
from vlgpt.shards import ShardSet

NAMES = ["b9040a0dbb22.jpg", "db1c21bc8474.jpg"]
PAGE = [
    ("plain", "First sentence."),
    ("plain", 1),
    ("plain", "Press the lock switch."),
    ("plain", 0),
    ("plain", "All doors lock."),
]
OBELICS_PAGE = [("plain", 0), ("plain", "A paragraph."), ("plain", "\n\nAnother."), ("plain", 1)]


def mmc4_file(folder, *records, name="docs_no_face_shard_0_v3"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records or [asset("mmc4.jsonl")]))
    return path


def mmc4_layout(folder, kind):
    """(input, --images) with the pictures of the page kept in this way."""
    record = asset("mmc4.jsonl")
    data = {name: picture(number) for number, name in enumerate(NAMES)}
    if kind == "base64":
        for entry in record["image_info"]:
            entry["image_base64"] = base64.b64encode(data[entry["image_name"]]).decode()
        return mmc4_file(folder, record), None
    path = mmc4_file(folder)
    if kind == "folder beside":
        write_pictures(folder, NAMES)
    elif kind == "tar beside":
        write_tar(folder / f"{path.stem}.tar", data)
    elif kind == "zip and folder":
        with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)
        path = path.with_name(f"{path.name}.zip")
        write_pictures(folder / "images", NAMES)
        return path, (folder / "images",)
    elif kind == "tars":
        for number, name in enumerate(NAMES):
            write_tar(folder / "images" / f"{number}.tar", {f"sub/{name}": data[name]})
        return path, (folder / "images",)
    elif kind == "img2dataset":
        urls = {f"http://example.org/9{number}.jpg": picture(number) for number in (1, 0)}
        return path, (write_download(folder / "images", urls),)
    return path, None


@pytest.mark.parametrize(
    "kind", ["base64", "folder beside", "tar beside", "zip and folder", "tars", "img2dataset"]
)
def test_mmc4_pages_are_the_same_however_their_pictures_are_kept(tmp_path, kind):
    path, images = mmc4_layout(tmp_path / "in", kind)
    (page,) = read_all(open_source("mmc4", path, images=images))
    assert shown(page) == PAGE
    assert page.document.info["similarities"] == [0.3235, 0.2769]
    assert page.document.info["image_urls"] == ["http://example.org/91.jpg", "http://example.org/90.jpg"]
    assert page.document.info["url"] == "http://example.org/p.html" and page.lost == ()


def test_mmc4_matches_anew_among_the_pictures_at_hand_and_counts_the_others(tmp_path):
    path = mmc4_file(tmp_path)
    write_pictures(tmp_path, NAMES[:1])
    (anew,) = read_all(open_source("mmc4", path))
    assert [text for _, text in shown(anew)] == ["First sentence.", 0, *[text for _, text in PAGE[2::2]]]
    assert anew.lost == ("missing_file",) and anew.document.info["similarities"] == [0.3176]
    (stored,) = read_all(open_source("mmc4", path, matching="stored"))
    assert stored.document.info["similarities"] == [0.2769]


def test_mmc4_drops_pairs_below_the_threshold_and_damaged_pages_by_reason(tmp_path):
    def changed(**fields):
        return asset("mmc4.jsonl") | fields

    far = [{"image_name": "no.jpg", "matched_text_index": 9, "matched_sim": 0.5}]
    records = [
        changed(),
        changed(similarity_matrix=[[0.1, 0.2, 0.1], [0.1, 0.5, 0.1]]),
        changed(similarity_matrix=[[0.1, 0.2, 0.1], [0.1, 0.1, 0.1]]),
        changed(similarity_matrix=[[0.1, 0.2]]),
        changed(similarity_matrix=[[0.1, float("nan"), 1], [1, 2, 3]]),
        changed(similarity_matrix="x"),
        changed(text_list="x"),
        changed(image_info=None),
        changed(image_info=[]),
        changed(image_info=[{"image_name": "no.jpg"}]),
        changed(image_info=far),
        changed(image_info=[{"image_base64": "?"}]),
        [],
    ]
    path = mmc4_file(tmp_path, *records)
    write_pictures(tmp_path, NAMES)
    good, one, *dropped = read_all(open_source("mmc4", path))
    assert shown(good) == PAGE and [part for _, part in shown(one)].count(1) == 1
    assert one.document.info["similarities"] == [0.5]
    assert [item.reason for item in dropped] == [
        "filtered:pair_similarity",
        *["bad_matrix"] * 3,
        "bad_text",
        "bad_image_info",
        "no_image",
        "missing_file",
        "missing_file",
        "bad_base64",
        "bad_row",
    ]
    (tmp_path / "no.jpg").write_bytes(picture(2))
    (item,) = open_source("mmc4", path, matching="stored").read(10, 11)
    assert item == Dropped("bad_match", "docs_no_face_shard_0_v3:10")


def test_assignment_is_the_best_one_among_all():
    random = np.random.default_rng(0)
    for shape in itertools.product(range(1, 5), range(1, 6)):
        for decimals in (3, 0):
            scores = random.normal(size=shape).round(decimals)
            pairs = best_assignment(scores)
            rows, columns = zip(*pairs)
            assert len(set(rows)) == len(set(columns)) == len(pairs) == min(shape)
            small = scores if shape[0] <= shape[1] else scores.T
            choices = itertools.permutations(range(small.shape[1]), small.shape[0])
            best = max(small[range(small.shape[0]), list(choice)].sum() for choice in choices)
            assert np.isclose(scores[list(rows), list(columns)].sum(), best)


def test_recomputed_matches_of_a_whole_page_are_the_published_ones():
    record = asset("mmc4.jsonl")
    both = [match_images(record, [0, 1], matching=matching) for matching in ("recomputed", "stored")]
    assert both[0] == both[1]


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_obelics_pages_are_joined_by_url_in_their_order(tmp_path, has_table, suffix):
    page = write_obelics(tmp_path / f"train.{suffix}", [asset("obelics.json")] * 3)
    urls = {
        "https://ex.org/0.jpg": None,
        "https://ex.org/1.jpg": picture(0),
        "https://ex.org/2.jpg": picture(1),
    }
    write_download(tmp_path / "images", urls, has_table=has_table)
    items = read_all(open_source("obelics", page, images=(tmp_path / "images",)))
    assert [shown(item) for item in items] == [OBELICS_PAGE] * 3
    assert items[0].document.info["url"] == "https://ex.org/p"
    assert items[0].document.info["image_urls"] == ["https://ex.org/1.jpg", "https://ex.org/2.jpg"]


def write_obelics(path, rows):
    if path.suffix == ".parquet":
        return write_table(path, rows)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=1)
    return path


def test_obelics_drops_damaged_pages_by_reason_and_counts_lost_pictures(tmp_path):
    row = asset("obelics.json")
    rows = [
        row,
        row | {"texts": ["a"]},
        row | {"texts": ["both", "b", None]},
        row | {"images": [None, None, None]},
        row | {"general_metadata": "{"},
        row | {"general_metadata": None},
        row | {"images": [None], "texts": ["only text"]},
        row | {"images": ["https://ex.org/gone.jpg"], "texts": [None]},
        row | {"texts": None},
    ]
    page = write_table(tmp_path / "train.parquet", rows)
    write_download(tmp_path / "images", {"https://ex.org/2.jpg": picture(1)})
    items = read_all(open_source("obelics", page, images=(tmp_path / "images",)))
    assert shown(items[0]) == [("plain", "A paragraph."), ("plain", "\n\nAnother."), ("plain", 1)]
    assert items[0].lost == ("missing_file",)
    assert [getattr(item, "reason", "") for item in items[1:]] == [
        "unequal_lengths",
        *["bad_alignment"] * 2,
        "bad_metadata",
        "",
        "no_image",
        "missing_file",
        "bad_row",
    ]


def test_pages_go_through_the_build_and_lost_pictures_are_counted(tmp_path):
    rows = [asset("obelics.json")] * 2
    page = write_table(tmp_path / "train.parquet", rows)
    urls = {"https://ex.org/1.jpg": picture(3)[:-200], "https://ex.org/2.jpg": picture(1)}
    write_download(tmp_path / "images", urls)
    assert build("obelics", page, tmp_path / "out", "--images", tmp_path / "images") == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.num_samples == 2 and shards.shards[0].num_images == 2
    document = shards.read(0, 0).document
    assert document.info["image_urls"] == ["https://ex.org/2.jpg"]


@pytest.mark.parametrize("name", ["mmc4", "obelics"])
def test_urls_without_pictures_are_answered_with_the_commands_that_fetch_them(tmp_path, name, capsys):
    if name == "mmc4":
        path, urls = mmc4_file(tmp_path), ["http://example.org/90.jpg", "http://example.org/91.jpg"]
    else:
        path = write_table(tmp_path / "train.parquet", [asset("obelics.json")] * 2)
        urls = ["https://ex.org/1.jpg", "https://ex.org/2.jpg"]
    with pytest.raises(UserError) as error:
        open_source(name, path)
    message = str(error.value)
    assert f"python -m data_prep.urls {name} --input {path}" in message
    assert "-m venv" in message and "--resize_mode keep_ratio" in message
    assert urls_main([name, "--input", str(path), "--output", str(tmp_path / "urls")]) == 0
    (table,) = (tmp_path / "urls").iterdir()
    assert pq.read_table(table)["url"].to_pylist() == urls
    assert f"--url_list {tmp_path / 'urls'}" in capsys.readouterr().out.replace("\n", "")


def test_a_table_of_another_data_set_is_refused_in_one_line_that_names_its_columns(tmp_path):
    page = write_table(tmp_path / "x.parquet", [{"question": 1}])
    (tmp_path / "cut.parquet").write_bytes(page.read_bytes()[:-10])
    for name in ("obelics", "magicbrush", "instructpix2pix", "img2dataset"):
        with pytest.raises(UserError, match=r"x\.parquet.*question"):
            open_source(name, page)
        with pytest.raises(UserError, match=r"cut\.parquet"):
            open_source(name, tmp_path / "cut.parquet")
