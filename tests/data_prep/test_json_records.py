"""JSON records are found by their byte ranges: any piece of any file, however it is packed."""

import gzip
import json
import zipfile

import pytest

from data_prep.sources import Dropped, inputs
from data_prep.sources import records as record_files
from data_prep.sources.inputs import find_files, split_range
from data_prep.sources.records import JsonRecords, RawRecord
from vlgpt.errors import UserError

VALUES = [{"n": n, "text": 'ü\n]}"[' * (n % 7) + "x" * (n * 13 % 101)} for n in range(60)]


def write(path, *, indent=None, ascii_only=True):
    if ".jsonl" in path.name:
        text = "\n\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in VALUES)
    else:
        text = json.dumps(VALUES, indent=indent, ensure_ascii=ascii_only)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside", text)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.zip", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("indent, ascii_only", [(None, True), (1, False)])
def test_any_range_gives_the_same_records(tmp_path, monkeypatch, name, indent, ascii_only):
    monkeypatch.setattr(record_files, "BLOCK_BYTES", 37)
    records = JsonRecords([write(tmp_path / name, indent=indent, ascii_only=ascii_only)], source="test")
    assert len(records) == 60
    for start in (0, 1, 17, 59):
        found = [item.value for item in records.read(start, 60)]
        assert found == VALUES[start:]
    assert [item.key for item in records.read(3, 5)] == ["a:3", "a:4"]


def test_values_that_hold_several_records_are_counted_part_by_part(tmp_path):
    lists = [[1, 2, 3], [], [4], [5, 6]]
    (tmp_path / "a.json").write_text(json.dumps([{"list": items} for items in lists]))
    (tmp_path / "b.jsonl").write_text('{"list": [7, 8]}\n{broken\n')
    count = lambda value: max(1, len(value["list"]))  # noqa: E731
    records = JsonRecords([tmp_path], source="test", kind="parts", count=count)
    assert len(records) == 3 + 1 + 1 + 2 + 2 + 1
    whole = list(records.read(0, len(records)))
    found = [item.reason if isinstance(item, Dropped) else (item.key, item.part) for item in whole]
    assert found[:4] == [("a:0:0", 0), ("a:0:1", 1), ("a:0:2", 2), ("a:1", 0)]
    assert found[-3:] == [("b:0:0", 0), ("b:0:1", 1), "bad_json"]
    for number in range(len(records)):
        assert list(records.read(number, number + 1)) == [whole[number]]


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"[" * 100_000, "bad_json"),
        (b'{"a": "\xff"}', "text_not_utf8"),
        (b'\xef\xbb\xbf{"a": 1}', ""),
        (b'{"a": 1} x', "bad_json"),
        (b"nonsense", "bad_json"),
    ],
)
def test_a_damaged_line_is_dropped_and_its_neighbours_are_kept(tmp_path, text, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 0}\n' + text + b'\r\n{"a": 2}\n')
    first, second, third = JsonRecords([tmp_path / "a.jsonl"], source="test").read(0, 3)
    assert (first.value, third.value) == ({"a": 0}, {"a": 2})
    assert isinstance(second, RawRecord) if not reason else second == Dropped(reason, "a:1")


@pytest.mark.parametrize("data", [b'[{"a": 1}, {"a": ', b'[{"a": 1} nonsense]', b'[{"a": "\xff"}]', b"["])
def test_a_damaged_list_is_refused_in_one_line_that_names_the_file(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.json"):
        JsonRecords([tmp_path / "a.json"], source="test")


def test_damaged_archives_are_refused_in_one_line_that_names_the_file(tmp_path):
    write(tmp_path / "a.jsonl.gz")
    write(tmp_path / "b.jsonl.zip")
    with zipfile.ZipFile(tmp_path / "c.jsonl.zip", "w") as archive:
        archive.writestr("one", "{}")
        archive.writestr("two", "{}")
    for name in ("a.jsonl.gz", "b.jsonl.zip"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    for name in ("a.jsonl.gz", "b.jsonl.zip", "c.jsonl.zip"):
        with pytest.raises(UserError, match=name):
            JsonRecords([tmp_path / name], source="test")


def test_offsets_of_large_files_are_kept_and_found_again_and_forgotten_when_the_file_changes(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(inputs, "SMALL_BYTES", 0)
    path = write(tmp_path / "a.json")
    assert len(JsonRecords([path], source="test")) == 60
    kept = sorted((tmp_path / inputs.INDEX_FOLDER).iterdir())
    assert len(kept) == 3
    monkeypatch.setattr(record_files, "BLOCK_BYTES", 0)  # a second pass over the file would find nothing
    records = JsonRecords([path], source="test")
    assert [item.value for item in records.read(0, 60)] == VALUES
    monkeypatch.undo()
    monkeypatch.setattr(inputs, "SMALL_BYTES", 0)
    kept[0].write_bytes(b"damaged")
    assert len(JsonRecords([path], source="test")) == 60
    path.write_text('[{"new": 1}]')
    assert len(JsonRecords([path], source="test")) == 1


def test_files_are_read_in_a_fixed_order_and_never_share_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/a.jsonl", ".hidden.jsonl", ".vlgpt-index/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [file.name for file in find_files([tmp_path], (".jsonl",), source="test")] == ["a", "b", "sub/a"]
    with pytest.raises(UserError, match="same ids"):
        find_files([tmp_path / "a.jsonl", tmp_path / "sub"], (".jsonl",), source="test")
    with pytest.raises(UserError, match=r"no \.parquet"):
        find_files([tmp_path], (".parquet",), source="test")


def test_split_range_covers_every_number_once():
    starts = [0, 3, 3, 10, 11]
    for start in range(12):
        for stop in range(start, 12):
            numbers = [
                starts[p] + n for p, first, end in split_range(starts, start, stop) for n in range(first, end)
            ]
            assert numbers == list(range(start, stop))


def test_suffixes_match_in_any_case_and_hidden_places_are_left_out(tmp_path):
    for name in (
        "b/a.JSONL",
        ".hidden/x.jsonl",
        "b/.y.jsonl",
        "a.jsonl.gz",
        "b/.vlgpt-index/z.jsonl",
        "c.json.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"{}\n") if path.suffix == ".gz" else b"{}\n")
    found = find_files([tmp_path], (".jsonl", ".jsonl.gz"), source="test")
    assert [(file.name, file.path.name) for file in found] == [("a", "a.jsonl.gz"), ("b/a", "a.JSONL")]
    assert len(JsonRecords([tmp_path], source="test")) == 2
