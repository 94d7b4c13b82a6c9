"""Folder, images and text: exactly the records that are there, in a fixed order, in any pieces."""

import json

import pytest

from data_prep.sources import Dropped, Record
from data_prep.sources.base import convert, mapping
from data_prep.sources.folder import FolderSource
from data_prep.sources.images import ImagesSource
from data_prep.sources.inputs import inside
from data_prep.sources.records import Concatenation, open_rows
from data_prep.sources.text import TextSource
from tests.helpers.corpus import picture
from vlgpt.errors import UserError


def everything(source) -> list:
    return list(source.read(0, len(source)))


def rows(source, start: int, stop: int) -> list:
    """(key, columns) of every row; what is no object is dropped."""
    return list(convert(source.read(start, stop), lambda raw: (raw.key, mapping(raw.value))))


def assert_any_pieces_give_the_same(source) -> None:
    whole = everything(source)
    assert len(whole) == len(source)
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            assert list(source.read(start, stop)) == whole[start:stop]


def test_json_lines_of_any_shape(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"a": 1}',
        b"",
        b'{"a": "\xc3\xa9\\n"}\r',
        b"  ",
        b"nonsense",
        b"[1]",
        b'{"a": "\xff"}',
        b'{"a": 9}',
        b"7",
    ]
    path.write_bytes(b"\n".join(lines))
    table = open_rows(path)
    assert rows(table, 0, len(table)) == [
        *[("a:0", {"a": 1}), ("a:1", {"a": "é\n"}), Dropped("bad_json", "a:2")],
        *[Dropped("bad_row", "a:3"), Dropped("text_not_utf8", "a:4"), ("a:5", {"a": 9})],
        Dropped("bad_row", "a:6"),
    ]
    path.write_bytes(b"[2]\n" + path.read_bytes() + b"\n\r\n \n")
    table = open_rows(path)
    assert [rows(table, number, number + 1)[0] for number in (0, 1)] == [
        *[Dropped("bad_row", "a:0"), ("a:1", {"a": 1})],
    ]
    assert len(table) == 8
    path.write_bytes(b"")
    assert len(open_rows(path)) == 0


def test_line_places_survive_chunk_borders(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "pad": "x" * (n * 7 % 50)}) + "\n" for n in range(200)))
    monkeypatch.setattr("data_prep.sources.records.CHUNK_BYTES", 13)
    table = open_rows(path)
    assert [row[1]["n"] for row in rows(table, 0, len(table))] == list(range(200))


def test_a_huge_line_is_dropped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.records.MAX_RECORD_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 200}) + "\n" + json.dumps({"text": "ok"}))
    assert [type(row) for row in TextSource([tmp_path / "a.jsonl"]).read(0, 2)] == [Dropped, Record]


def test_csv_with_quotes_line_breaks_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    text = '\ufefffile_name,text\n1.jpg,"a, ""b""\nsecond line"\n\n2.jpg,plain\nonly one\n3.jpg,é\n'
    path.write_text(text, encoding="utf-8")
    table = open_rows(path)
    found = rows(table, 0, len(table))
    assert found[0] == ("a.csv:0", {"file_name": "1.jpg", "text": 'a, "b"\nsecond line'})
    assert found[1] == ("a.csv:1", {"file_name": "2.jpg", "text": "plain"})
    assert found[2] == Dropped("bad_row", "a.csv:2")
    assert found[3] == ("a.csv:3", {"file_name": "3.jpg", "text": "é"})
    assert len(found) == 4


def test_several_tables_are_one_list(tmp_path):
    for name, count in (("a", 2), ("b", 0), ("c", 3)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"n": f"{name}{n}"}) + "\n" for n in range(count))
        )
    table = Concatenation([open_rows(tmp_path / f"{name}.jsonl") for name in "abc"])
    assert [row[1]["n"] for row in rows(table, 1, 4)] == ["a1", "c0", "c1"]


def test_imagefolder_jsonl_and_csv(tmp_path):
    for folder in ("train", "train/deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(picture(1, "PNG"))
    (tmp_path / "train" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "1.png", "text": " a dog ", "similarity": 0.3, "url": "http://x"})
        + "\n"
        + json.dumps({"file_name": "deep/1.png", "text": "b"})
    )
    (tmp_path / "train" / "deep" / "metadata.csv").write_text("file_name,text,aesthetic\n1.png,c,6.5\n")
    source = FolderSource([tmp_path])
    records = everything(source)
    assert [record.document.text for record in records] == ["c", "a dog", "b"]
    assert records[1].document.info == {"similarity": 0.3, "url": "http://x"}
    assert records[0].document.info == {"aesthetic": 6.5}
    assert all(record.images[0].is_file() for record in records)
    assert_any_pieces_give_the_same(source)


def test_a_table_of_another_name_and_other_columns(tmp_path):
    (tmp_path / "mine.tsv").write_text("path\tcaption\nx.jpg\thello\n\ty\n")
    source = FolderSource([tmp_path / "mine.tsv"], file_column="path", text_column="caption")
    first, second = everything(source)
    assert (first.document.text, first.images) == ("hello", (tmp_path / "x.jpg",))
    assert second == Dropped("no_file_name", "mine.tsv:1")
    with pytest.raises(UserError, match=r"metadata\.jsonl or metadata\.csv"):
        FolderSource([tmp_path])
    with pytest.raises(UserError, match=r"\.jsonl, \.csv or \.tsv, found '\.txt'"):
        FolderSource([tmp_path / "x.txt"])


def test_names_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    for name in ("../x", "/etc/passwd", "a/../../x", "link/../../x", "..", "//x", "a\0b"):
        assert inside(tmp_path / "in", name) is None, name
    for name, path in (("a/b.jpg", "a/b.jpg"), ("link/x", "link/x"), ("./a/../b", "b"), ("link/../x", "x")):
        assert inside(tmp_path / "in", name) == tmp_path / "in" / path, "links are the user's own"


def test_images_are_found_at_any_depth_in_a_fixed_order(tmp_path):
    for name in ("b.JPG", "a/z.png", "a/y.webp", "notes.txt", "c.tiff"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    source = ImagesSource([tmp_path])
    assert [record.document.id for record in everything(source)] == ["a/y.webp", "a/z.png", "b.JPG", "c.tiff"]
    assert all(record.document.text == "" for record in everything(source))
    assert_any_pieces_give_the_same(source)
    with pytest.raises(UserError, match="found no file"):
        ImagesSource([tmp_path / "a" / "nothing"] if (tmp_path / "a" / "nothing").mkdir() is None else [])


def test_text_needs_text(tmp_path):
    rows = [{"text": " one "}, {"text": ""}, {"text": 3}, {"other": "x"}, {"text": "two", "url": "u"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = TextSource([tmp_path])
    shown = [item.document.text if isinstance(item, Record) else item.reason for item in everything(source)]
    assert shown == ["one", "no_text", "no_text", "no_text", "two"]
    assert everything(source)[4].document.info == {"url": "u"}
    assert_any_pieces_give_the_same(source)
    with pytest.raises(UserError, match=r"needs \.jsonl files"):
        TextSource([tmp_path / "x"] if (tmp_path / "x").mkdir() is None else [])
