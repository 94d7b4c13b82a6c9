"""Tables and JSON as people have them: every record is read right, or counted, or refused in words that help."""

import gzip
import json
import random
import zipfile

import pytest

from data_prep.build import main
from data_prep.check import check_folder
from data_prep.sources import Dropped, csv_rows, inputs, source_class
from data_prep.sources import records as record_files
from data_prep.sources.base import BadRecord, storable
from data_prep.sources.csv_rows import CsvFile, open_rows
from data_prep.sources.folder import FolderSource
from data_prep.sources.records import JsonRecords
from tests.helpers.corpus import picture
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError
from vlgpt.shards import ShardSet
from vlgpt.shards.schema import UnstorableDocument
from vlgpt.shards.writer import _record_bytes

HEADER = "file_name,text\n"
ROWS = [{"n": number, "text": f'é {number} ]}}"['} for number in range(6)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
LIST = json.dumps(ROWS, ensure_ascii=False)
BOM = "\ufeff"


def rows_of(path) -> list:
    """Every row as a list of its values, or the reason why there is none."""
    table = open_rows(path)
    items = list(table.read(0, len(table)))
    for number, item in enumerate(items):
        assert list(table.read(number, number + 1)) == [item], "any piece gives the same"
    return [item.reason if isinstance(item, Dropped) else list(item.value.values()) for item in items]


def write(path, data, packing=""):
    raw = data.encode() if isinstance(data, str) else data
    path = path.with_name(path.name + packing)
    if packing == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._inside", b"x")
            archive.writestr("inside", raw)
    else:
        path.write_bytes(gzip.compress(raw) if packing else raw)
    return path


@pytest.mark.parametrize("packing", ["", ".gz", ".zip"])
@pytest.mark.parametrize(
    "text, expected",
    [
        (f'{BOM}"file_name","text"\r\n"1.jpg","a, b"\r\n', [["1.jpg", "a, b"]]),
        ("file_name;text\n1.jpg;a, b\n", [["1.jpg", "a, b"]]),
        ("file_name\ttext\n1.jpg\ta, b\n", [["1.jpg", "a, b"]]),
        ("\r\rfile_name,text\r1.jpg,old\r2.jpg,mac\r", [["1.jpg", "old"], ["2.jpg", "mac"]]),
        (HEADER + '1.jpg,"two\n\nlines, here"\n2.jpg,b', [["1.jpg", "two\n\nlines, here"], ["2.jpg", "b"]]),
        (HEADER + '1.jpg,"big" sign\n2.jpg,a 5" disk\n', [["1.jpg", '"big" sign'], ["2.jpg", 'a 5" disk']]),
        (HEADER + '1.jpg,"open\n2.jpg,b\n', ["open_quote", ["2.jpg", "b"]]),
        (HEADER + '1.jpg,"open\n2.jpg,"b, c"\n', ["open_quote", ["2.jpg", "b, c"]]),
        (HEADER + '1.jpg,"open\n2.jpg,b"\n3.jpg,c\n', ["open_quote", ["2.jpg", 'b"'], ["3.jpg", "c"]]),
        (HEADER + '1.jpg,a\n2.jpg,"open', [["1.jpg", "a"], "open_quote"]),
        (HEADER + "1.jpg,a,b\n2.jpg\n\n3.jpg,c\n", ["bad_row", "bad_row", ["3.jpg", "c"]]),
        (HEADER + '1.jpg,"' + "long " * 40_000 + '"\n', [["1.jpg", "long " * 40_000]]),
        (HEADER + "1.jpg,nan\n000000391895,1e5\n", [["1.jpg", "nan"], ["000000391895", "1e5"]]),
        ("", []),
        (HEADER, []),
    ],
)
def test_rows_of_csv_files(tmp_path, text, expected, packing):
    assert rows_of(write(tmp_path / "a.csv", text, packing)) == expected


def test_one_stray_quote_costs_one_row_of_six_thousand(tmp_path):
    lines = [f"{number}.jpg,caption {number}" for number in range(6000)]
    lines[100] = '100.jpg,"unbalanced'
    rows = rows_of(write(tmp_path / "a.csv", HEADER + "\n".join(lines)))
    assert len(rows) == 6000 and rows.count("open_quote") == 1 and rows[101] == ["101.jpg", "caption 101"]


@pytest.mark.parametrize("seed", range(40))
def test_stray_quotes_anywhere_cost_no_row_but_their_own(tmp_path, seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr(csv_rows, "CHUNK_BYTES", draw.choice([1, 7, 1000]))
    whole = [lambda n: f"{n}.jpg,plain {n}", lambda n: f'{n}.jpg,"quoted, {n}"', lambda n: f'{n}.jpg,""']
    stray = [lambda n: f'{n}.jpg,"open {n}', lambda n: f'{n}.jpg,end {n}"', lambda n: f'{n}.jpg,"a" b {n}']
    is_stray = [draw.random() < 0.2 for _ in range(60)]
    lines = [draw.choice(stray if odd else whole)(number) for number, odd in enumerate(is_stray)]
    rows = rows_of(write(tmp_path / "a.csv", HEADER + "\n".join(lines)))
    assert len(rows) == 60
    for number, (row, odd) in enumerate(zip(rows, is_stray)):
        if not odd:
            caption = lines[number].partition(",")[2].strip('"')
            assert row == [f"{number}.jpg", caption], lines[number]
        else:
            assert row in ("open_quote", lines[number].split(","))


def test_places_of_rows_are_kept_beside_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "SMALL_BYTES", 0)
    path = write(tmp_path / "a.csv", HEADER + '1.jpg,"a\nb"\n2.jpg,c\n')
    first = rows_of(path)
    monkeypatch.setattr(CsvFile, "_scan", lambda self: pytest.fail("the file is scanned again"))
    assert rows_of(path) == first == [["1.jpg", "a\nb"], ["2.jpg", "c"]]


@pytest.mark.parametrize(
    "name, text",
    [
        ("lines.jsonl", "\n".join(LINES)),
        ("bom.jsonl", BOM + "\r\n\r\n".join(LINES)),
        ("old_mac.jsonl", "\r".join(LINES)),
        ("glued.jsonl", "".join(LINES)),
        ("commas.jsonl", ",\n".join(LINES) + ","),
        ("pretty.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("list.jsonl", LIST),
        ("pretty_list.jsonl", json.dumps(ROWS, indent=2)),
        ("a_list_a_line.jsonl", "\n".join(f"[{line}]" for line in LINES)),
        ("lines.json", "\n".join(LINES)),
        ("list.json", LIST),
        ("bom.json", BOM + json.dumps(ROWS, indent=4).replace("\n", "\r\n")),
        ("two_lists.json", json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:])),
        ("glued_lists.json", json.dumps(ROWS[:2]) + BOM + json.dumps(ROWS[2:])),
        ("nested.json", json.dumps([ROWS[:2], [ROWS[2:3], ROWS[3:]]])),
        ("trailing_comma.json", LIST[:-1] + ",]"),
        ("no_commas.json", "[" + " ".join(LINES) + "]"),
        ("objects.json", "\n\n".join(json.dumps(row, indent=2) for row in ROWS)),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zip"])
@pytest.mark.parametrize("block", [11, 1 << 20])
def test_json_in_any_layout_gives_the_same_records(tmp_path, monkeypatch, name, text, packing, block):
    if block > 1000 or name == "list.json":  # the layout is known by the first block
        monkeypatch.setattr(record_files, "BLOCK_BYTES", block)
    records = JsonRecords([write(tmp_path / name, text, packing)], source="test")
    assert len(records) == len(ROWS)
    for start in range(len(ROWS)):
        assert [item.value for item in records.read(start, len(ROWS))] == ROWS[start:]


@pytest.mark.parametrize(
    "text, reasons",
    [
        ('[{"a": 1}, {"a": %s}, {"a": 2}]' % ("9" * 5000), ["", "bad_json", ""]),
        ("[%s, 1, 2]" % ("9" * 5000), ["bad_json", "", ""]),
        ('[{"a": 1}, {"a": %s}, {"a": 2}]' % ("[" * 50_000 + "]" * 50_000), ["", "bad_json", ""]),
        ('[{"a": 1}, null, 5, "x]", {"a": 2}]', [""] * 5),
        ("[12345, 67890, [1], []]", [""] * 4),
    ],
)
def test_a_value_that_python_refuses_is_dropped_alone(tmp_path, monkeypatch, text, reasons):
    for block in (7, 1 << 24):
        monkeypatch.setattr(record_files, "BLOCK_BYTES", block)
        if block == 7 and len(text) > 10_000:
            continue
        records = JsonRecords([write(tmp_path / "a.json", text)], source="test")
        assert [getattr(item, "reason", "") for item in records.read(0, len(records))] == reasons


@pytest.mark.parametrize(
    "data, words",
    [
        (LIST[:-8].encode(), r"cut or no JSON.*at byte \d+"),
        (LIST[:-1].encode(), r"is cut: it ends at byte \d+ within a list"),
        (LIST.encode() + b"\n<!-- proxy -->", f"<!-- proxy -->' at byte {len(LIST.encode()) + 1}"),
        (LIST.encode() + b"]", "at byte"),
        ('[{"a": "é", "b": "'.encode() + b'\xff"}]', "not UTF-8 text at byte 19"),
        (LIST.encode("utf-16"), "UTF-16.*iconv"),
        (LIST.encode("utf-16-be"), "UTF-16.*iconv"),
        (b"// mine\n" + LIST.encode(), "begins with '// mine"),
        (b"", "is empty"),
        (b"[]", "is empty"),
        (b'{"data": ' + LIST.encode() + b"}", r"jq '\.\[\"data\"\]'"),
        (json.dumps({"a": ROWS[0], "b": ROWS[1]}).encode(), r"jq '\[\.\[\]\]'"),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_its_place(tmp_path, data, words):
    path = write(tmp_path / "a.json", data)
    with pytest.raises(UserError, match=rf"(?s)a\.json.*{words}"):
        source_class("llava")([path])


def folder(tmp_path, table, names, *, images=("0.jpg", "1.jpg")):
    for name in images:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    rows = "".join(f"{name},c{number}\n" for number, name in enumerate(names))
    write(tmp_path / table, HEADER + rows)
    return tmp_path


@pytest.mark.parametrize(
    "names, images",
    [
        (["a\\0.jpg"], ["a/0.jpg"]),
        (["caf\u00e9.jpg"], ["cafe\u0301.jpg"]),
        (["cafe\u0301.jpg"], ["caf\u00e9.jpg"]),
        (["./0.jpg"], ["0.jpg"]),
    ],
)
def test_file_names_of_other_systems_are_found(tmp_path, names, images):
    source = FolderSource([folder(tmp_path, "metadata.csv", names, images=images)])
    (record,) = source.read(0, 1)
    assert record.images[0].is_file() and record.document.id == names[0]


@pytest.mark.parametrize(
    "names, images, words",
    [
        (["images/0.jpg"], ["0.jpg"], "without the leading 'images'"),
        (["/home/me/0.jpg"], ["0.jpg"], "without the leading 'home/me'"),
        (["C:\\me\\0.jpg"], ["0.jpg"], "without the leading 'C:/me'"),
        (["A/0.JPG"], ["a/0.jpg"], "letters differ, the file is 'a/0.jpg'"),
        (["0.jpg"], ["images/0.jpg"], "it lies in 'images'"),
        (["../0.jpg", "/x/1.jpg"], [], "leads out of"),
    ],
)
def test_names_that_all_lead_nowhere_are_refused_with_the_reason(tmp_path, names, images, words):
    with pytest.raises(UserError, match=words):
        FolderSource([folder(tmp_path, "metadata.csv", names, images=images)])


def test_of_some_names_that_lead_nowhere_the_others_are_read(tmp_path):
    source = FolderSource([folder(tmp_path, "metadata.csv", ["0.jpg", "1.JPG", "9.jpg"])])
    items = list(source.read(0, 3))
    assert items[1] == Dropped("missing_file", "metadata.csv:1")
    assert items[2].images == (tmp_path / "9.jpg",), "the build finds that nothing is there"


@pytest.mark.parametrize(
    "table, data, words",
    [
        (
            "metadata.csv",
            "image,caption\n0.jpg,x\n",
            "no column 'file_name'; found 'image', 'caption'.*--file-column",
        ),
        ("metadata.csv", "File_Name,text\n0.jpg,x\n", "no column 'file_name'; found 'File_Name', 'text'"),
        (
            "metadata.jsonl",
            '{"file_name": "0.jpg", "cap": "x"}',
            "no column 'text'; found.*'cap'.*--text-column",
        ),
        ("metadata.csv", (HEADER + "0.jpg,x\n").encode("utf-16"), "UTF-16.*iconv"),
        ("metadata.csv", "file_name,text,text\n0.jpg,a,b\n", "names the column 'text' twice"),
        ("captions.csv", HEADER + "0.jpg,x\n", "given as --input itself: .*captions.csv"),
    ],
)
def test_tables_without_the_columns_are_refused_at_once(tmp_path, table, data, words):
    write(folder(tmp_path, "other.txt", []) / table, data)
    with pytest.raises(UserError, match=words):
        FolderSource([tmp_path])


def test_two_tables_for_one_folder_are_refused_by_their_names(tmp_path):
    folder(tmp_path, "metadata.csv", ["0.jpg"])
    write(tmp_path / "metadata.jsonl", '{"file_name": "0.jpg", "text": "c0"}')
    with pytest.raises(UserError, match=r"metadata\.csv and .*metadata\.jsonl describe the same images"):
        FolderSource([tmp_path])
    assert len(FolderSource([tmp_path / "metadata.csv"])) == 1
    with pytest.raises(UserError, match="given twice"):
        FolderSource([tmp_path / "metadata.csv", tmp_path / "metadata.csv"])


def test_stored_values_keep_their_text_and_are_json(tmp_path):
    folder(tmp_path, "metadata.csv", [])
    ids = ["000000391895", "12345678901234567891", "1e5", "1_000", "nan", "-Infinity"]
    rows = "".join(f"0.jpg,x,{value},0.25\n" for value in ids)
    write(tmp_path / "metadata.csv", f"file_name,text,image_id,similarity\n{rows}0.jpg,x,1,nan\n")
    start = '{"file_name": "0.jpg", "text": "x", "n": '
    lines = [start + 'NaN, "l": [1e999, {"a": -Infinity}], "id": 12345678901234567891}']
    lines.append(start + "[" * 900 + "]" * 900 + "}")
    write(tmp_path / "more.jsonl", "\n".join(lines))
    inputs_given = [str(tmp_path / name) for name in ("metadata.csv", "more.jsonl")]
    arguments = ["folder", "--input", *inputs_given, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--num-workers", "0", "--max-bad-fraction", "1"]) == 0
    shards = ShardSet.open(tmp_path / "out")
    found = [shards.read(0, sample).document.info for sample in range(8)]
    assert [info.get("image_id") for info in found[:7]] == [*ids, "1"]
    assert [info["similarity"] for info in found[:7]] == [0.25] * 6 + ["nan"]
    assert (found[7]["n"], found[7]["l"], found[7]["id"]) == (None, [None, {"a": None}], int(ids[1]))
    assert shards.manifest.dropped == {"bad_json": 1}
    assert not list(check_folder(tmp_path / "out"))


def test_no_document_is_stored_as_anything_but_json():
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(UnstorableDocument):
            _record_bytes(Document("a", "test", (TextPart("x"),), {"value": value}))
    assert storable([float("nan"), b"x", (1, "é"), {2: None}]) == [None, None, [1, "é"], {"2": None}]
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(BadRecord, match="bad_json"):
        storable(deep)
