"""Tables that hold the images themselves: columns are found or named, every row is read or counted."""

import datetime
import decimal
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import main
from data_prep.sources import Dropped
from data_prep.sources import records as record_files
from data_prep.sources.img2dataset import Img2datasetSource
from tests.helpers.source_files import open_source, picture, read_all, shown, write_table
from vlgpt.errors import UserError
from vlgpt.shards import ShardSet


def image(number: int) -> dict:
    return {"bytes": picture(number), "path": f"{number}.jpg"}


def rows(count: int) -> list[dict]:
    return [{"image": image(number), "text": f"caption {number}", "id": number} for number in range(count)]


def reasons(items) -> list[str]:
    return [getattr(item, "reason", "") for item in items]


def test_rows_as_push_to_hub_writes_them_become_pairs(tmp_path):
    write_table(tmp_path / "data" / "train-00000-of-00002.parquet", rows(3))
    write_table(tmp_path / "data" / "train-00001-of-00002.parquet", rows(2))
    (tmp_path / "README.md").write_text("a card")
    items = read_all(open_source("parquet", tmp_path))
    assert [shown(item) for item in items[:3]] == [
        [("plain", number), ("plain", f"caption {number}")] for number in range(3)
    ]
    assert items[4].document.id == "data/train-00001-of-00002:1" and items[4].document.info == {"id": 1}
    arguments = ["parquet", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--num-workers", "0"]) == 0
    assert ShardSet.open(tmp_path / "out").num_samples == 5


@pytest.mark.parametrize("new_writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_of_save_to_disk_give_the_same_pairs(tmp_path, new_writer):
    table = pa.Table.from_pylist(rows(5))
    path = tmp_path / "train" / "data-00000-of-00001.arrow"
    path.parent.mkdir()
    with pa.OSFile(str(path), "wb") as file, new_writer(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (tmp_path / "train" / "state.json").write_text("{}")
    items = read_all(open_source("parquet", tmp_path))
    assert [shown(item)[0] for item in items] == [("plain", number) for number in range(5)]
    path.write_bytes(path.read_bytes()[:-9])
    record_files.table_layout.cache_clear()
    if new_writer is pa.ipc.new_file:
        with pytest.raises(UserError, match="is no Parquet or Arrow table, or is cut"):
            open_source("parquet", tmp_path)


def test_lists_of_images_stand_before_the_text_and_a_list_of_captions_makes_a_pair_of_each(tmp_path):
    table = [
        {"images": [image(0), image(1)], "caption": ["a", "b"]},
        {"images": [], "caption": ["c"]},
        {"images": [image(2)], "caption": []},
        {"images": None, "caption": None},
        {"images": [image(3)], "caption": [None, "d", " "]},
    ]
    write_table(tmp_path / "a.parquet", table)
    items = read_all(open_source("parquet", tmp_path))
    assert [shown(item) for item in items] == [
        [("plain", 0), ("plain", 1), ("plain", "a")],
        [("plain", 0), ("plain", 1), ("plain", "b")],
        ["no_image"],
        ["no_caption"],
        ["no_image"],
        ["no_caption"],
        [("plain", 3), ("plain", "d")],
        ["empty_caption"],
    ]
    assert [item.key if isinstance(item, Dropped) else item.document.id for item in items][:3] == [
        *["a:0:0", "a:0:1", "a:1"]
    ]
    without = read_all(open_source("parquet", tmp_path, require_caption=False))
    assert shown(without[3]) == [("plain", 2)]


@pytest.mark.parametrize(
    "column", [pa.array([picture(0)], pa.large_binary()), pa.array([[picture(0)]]), pa.array([image(0)])]
)
def test_images_are_known_by_the_type_of_their_column(tmp_path, column):
    table = pa.table({"foto": column, "Text": pa.array(["a"]).dictionary_encode(), "emb": [[0.5]]})
    pq.write_table(table, tmp_path / "a.parquet")
    (item,) = read_all(open_source("parquet", tmp_path))
    assert shown(item) == [("plain", 0), ("plain", "a")] and item.document.info == {}


def test_other_columns_are_kept_as_json_and_serve_the_filters(tmp_path):
    row = {
        "image": image(0),
        "text": "a",
        "when": datetime.date(2020, 1, 2),
        "price": decimal.Decimal("1.20"),
    }
    row |= {"id": "000123", "big": 2**62, "score": float("nan"), "AESTHETIC_SCORE": 6.5, "URL": "http://x"}
    write_table(tmp_path / "a.parquet", [row])
    (item,) = read_all(open_source("parquet", tmp_path))
    info = item.document.info
    assert json.loads(json.dumps(info, allow_nan=False)) == info
    wanted = {
        "id": "000123",
        "big": 2**62,
        "score": None,
        "aesthetic": 6.5,
        "url": "http://x",
        "price": "1.20",
    }
    assert {name: info[name] for name in wanted} == wanted and info["when"] == "2020-01-02"


def test_a_date_that_python_does_not_have_costs_its_row_only(tmp_path):
    when = pa.array([0, 2**62], pa.timestamp("ms"))
    table = pa.table({"image": [image(0), image(1)], "text": ["a", "b"], "when": when})
    pq.write_table(table, tmp_path / "a.parquet")
    assert reasons(read_all(open_source("parquet", tmp_path))) == ["", "bad_row"]


@pytest.mark.parametrize(
    "row, options, words",
    [
        (
            {"before": image(0), "after": image(1), "text": "a"},
            {},
            "images in before, after: .*--image-column",
        ),
        ({"url": "http://x", "text": "a"}, {}, "holds no images; found url .string.*img2dataset"),
        ({"image": image(0), "label": 3}, {}, "found image .*label .int64.*--text-column"),
        ({"image": image(0), "text": "a"}, {"text_column": "title"}, "no title; found image, text"),
        (
            {"image": image(0), "n": 3, "text": "a"},
            {"text_column": "n"},
            "n holds no text, but int64.*can: text",
        ),
        ({"image": image(0), "n": 3, "text": "a"}, {"image_column": "n"}, "n holds no images.*can: image"),
        ({"image": image(0), "turns": [{"from": "human"}]}, {"text_column": "turns"}, "turns holds no text"),
    ],
)
def test_columns_that_are_not_clear_must_be_named(tmp_path, row, options, words):
    write_table(tmp_path / "a.parquet", [row])
    with pytest.raises(UserError, match=words):
        open_source("parquet", tmp_path, **options)


def test_a_column_twice_and_files_of_different_columns_are_refused(tmp_path):
    table = pa.table(
        [pa.array([image(0)]), pa.array(["a"]), pa.array(["b"])], names=["image", "text", "text"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet names the column 'text' twice"):
        open_source("parquet", tmp_path)
    write_table(tmp_path / "two" / "a.parquet", rows(1))
    write_table(tmp_path / "two" / "b.parquet", [{"image": image(0), "caption": "a"}])
    with pytest.raises(UserError, match=r"b\.parquet.*no text; found caption, image"):
        open_source("parquet", tmp_path / "two")


def test_a_row_group_shorter_than_its_stated_size_is_reported(tmp_path, monkeypatch):
    write_table(tmp_path / "a.parquet", rows(4))
    source = open_source("parquet", tmp_path)
    real = record_files._batches
    monkeypatch.setattr(
        record_files,
        "_batches",
        lambda path, group, columns, count: (
            batch.slice(0, 1) for batch in real(path, group, columns, count)
        ),
    )
    with pytest.raises(UserError, match=r"row group 0, ends 1 rows before its stated size"):
        list(source.read(0, 4))


@pytest.mark.parametrize(
    "name, data, wanted",
    [
        ("a.parquet", [{"URL": "u", "TEXT": "t", "similarity": 0.3}], ["URL", "TEXT", '["similarity"]']),
        ("a.parquet", [{"url": "u", "re_caption": "l", "key": "0"}], ["url", "re_caption"]),
        ("a.parquet", [{"image_url": "u", "id": 3}], ["image_url"]),
        ("a.csv", "image_url,alt_text,w\nhttp://x,a,1\n", ["image_url", "alt_text"]),
        ("a.tsv", "A cat\thttp://x\n", ["url", "caption"]),
        ("a.tsv", "http://x\tA cat\n", ["url", "caption"]),
        ("a.txt", "http://x\n", ["url"]),
    ],
)
def test_printed_download_commands_name_columns_that_exist(tmp_path, name, data, wanted):
    path = tmp_path / name
    if name == "a.parquet":
        write_table(path, data)
    else:
        path.write_text(data)
    with pytest.raises(UserError) as error:
        Img2datasetSource([path])
    flags = r"--(?:url_col|caption_col|save_additional_columns) '?([^\s']+)"
    assert re.findall(flags, str(error.value)) == wanted
    if titled := re.search(r"printf '(.*)\\n'", str(error.value)):
        place = data.strip().split("\t").index("http://x")
        assert titled[1].split("\\t")[place] == "url"


def test_the_other_sources_name_the_one_that_reads_images_in_tables(tmp_path):
    write_table(tmp_path / "a.parquet", rows(1))
    with pytest.raises(UserError, match=r"holds images \(in image\): read it with the source parquet"):
        open_source("img2dataset", tmp_path)
    with pytest.raises(UserError, match=r"a\.parquet holds the images too, the source parquet reads it"):
        open_source("folder", tmp_path)
    write_table(tmp_path / "b.parquet", [{"n": 3}])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match=r"holds neither images nor URLs of images \(columns: n\)"):
        open_source("img2dataset", tmp_path)
