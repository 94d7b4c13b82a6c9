"""One rule for texts: every reader, and the loader on foreign tars, keeps the same words and gives the same reasons."""

import json

import pytest

from data_prep.build import main as build
from data_prep.check import main as check
from data_prep.sources import Dropped
from tests.helpers.source_files import open_source, picture, read_all, write_pictures, write_table, write_tar
from vlgpt.document import TextPart
from vlgpt.errors import UserError
from vlgpt.shards import ShardSet, manifest

TEXTS = {
    "plain": ("A fox.", "A fox."),
    "mark": ("\ufeffA fox.", "A fox."),
    "mark_at_the_end": ("A fox.\ufeff\n", "A fox."),
    "blanks": (" \u3000\u00a0A fox.\r\n\u200b", "A fox."),
    "nul": ("A\0 fox.\0\0", "A fox."),
    "joined": ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),
    "rtl": ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
    "none": (None, "no"),
    "empty": ("", "empty"),
    "blank": (" \u00a0\u3000\n", "empty"),
    "zero_width": ("\u200b\u200b\ufeff", "empty"),
    "zero_width_joiner": ("\u200d\u2060", "empty"),
    "nuls": ("\0\0", "empty"),
    "filler": ("\u3164\u2800", "empty"),
    "surrogate": ("half \ud83d", "bad"),
    "list": (["A fox."], "bad"),
    "number": (7, "bad"),
    "flag": (True, "bad"),
    "object": ({"en": "A fox."}, "bad"),
}
KINDS = ("no", "empty", "bad")
VALUES = [value for value, _ in TEXTS.values()]


def tar(folder):
    members = {}
    for name, value in zip(TEXTS, VALUES):
        members |= {f"{name}.jpg": picture(1), f"{name}.json": json.dumps({"caption": value}).encode()}
    return write_tar(folder / "00000.tar", members)


def folder_of(path):
    write_pictures(path, ["a.jpg"])
    rows = [json.dumps({"file_name": "a.jpg", "text": value}) for value in VALUES]
    (path / "metadata.jsonl").write_text("\n".join(rows))
    return path


def coco(path):
    write_pictures(path, ["a.jpg"])
    notes = [{"image_id": 1, "caption": value} for value in VALUES]
    (path / "c.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": notes}))
    return path / "c.json"


def corpus(path):
    (path / "a.jsonl").write_text("\n".join(json.dumps({"text": value}) for value in VALUES))
    return path / "a.jsonl"


READERS = {
    "img2dataset": (tar, {}, "caption"),
    "folder": (folder_of, {}, "caption"),
    "coco": (coco, {"direction": "pair"}, "caption"),
    "text": (corpus, {}, "text"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_keeps_the_same_words_and_counts_the_rest_under_the_same_names(tmp_path, name):
    write, options, word = READERS[name]
    expected = [f"{text}_{word}" if text in KINDS else text for _, text in TEXTS.values()]
    assert [found(item) for item in read_all(open_source(name, write(tmp_path), **options))] == expected


def found(item):
    return item.reason if isinstance(item, Dropped) else item.document.text


def test_tables_that_hold_strings_follow_the_rule(tmp_path):
    strings = {value: text for value, text in TEXTS.values() if value is None or isinstance(value, str)}
    strings.pop("half \ud83d")
    rows = [{"image": {"bytes": picture(1), "path": None}, "caption": value} for value in strings]
    table = write_table(tmp_path / "a.parquet", rows)
    expected = [f"{text}_caption" if text in KINDS else text for text in strings.values()]
    assert [found(item) for item in read_all(open_source("parquet", table))] == expected


def test_the_loader_keeps_the_words_of_the_build(tmp_path):
    shards = ShardSet.open(tar(tmp_path).parent)
    words = [shards.read(0, number).document.text for number in range(shards.num_samples)]
    assert words == [text for _, text in TEXTS.values() if text not in KINDS]
    assert shards.skipped == {"bad_caption": 5, "empty_caption": 6, "no_caption": 1}


def test_texts_of_files_follow_the_rule_too(tmp_path):
    files = {name: value.encode() for name, (value, text) in TEXTS.items() if isinstance(value, str) and text != "bad"}
    files |= {"cp1252": b"caf\xe9", "utf16": "A fox.".encode("utf-16")}
    members = {}
    for name, data in files.items():
        members |= {f"{name}.jpg": picture(1), f"{name}.txt": data}
    path = write_tar(tmp_path / "00000.tar", members)
    expected = [TEXTS[name][1] if name in TEXTS else "text_not_utf8" for name in files]
    expected = ["empty_caption" if text == "empty" else text for text in expected]
    items = read_all(open_source("img2dataset", path))
    assert [found(item) for item in items] == expected
    shards = ShardSet.open(tmp_path)
    words = [shards.read(0, number).document.text for number in range(shards.num_samples)]
    kept = [item.document for item in items if not isinstance(item, Dropped)]
    assert words == [part.text for document in kept for part in document.parts if isinstance(part, TextPart)]


def bad_build(tmp_path, *options):
    folder_of(tmp_path / "in")
    command = ["folder", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--shard-size", "10"]
    return build([*command, "--num-workers", "0", *options])


def test_bad_records_are_named_in_the_message_the_report_and_by_check(tmp_path, capsys):
    assert bad_build(tmp_path) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "12 of 19 records are bad (empty_caption 6, bad_caption 5, no_caption 1)" in message
    first = "no_caption (metadata.jsonl:7), empty_caption (metadata.jsonl:8: found ''), empty_caption (metadata"
    assert first.replace(".jsonl", "") in message.replace(".jsonl", "")
    assert f"python -m data_prep.check --bad {tmp_path / 'out'}" in message
    report = manifest.read_report(tmp_path / "out", 1)
    names = report.dropped_names["bad_caption"]
    assert len(names) == 5 and "found list" in names[1] and "found int" in names[2]
    assert check(["--bad", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and "00000: input record 7: no_caption: metadata" in lines[0]


def test_names_of_bad_records_outlive_retries_and_filters(tmp_path):
    options = "--max-bad-fraction", "1", "--min-text-chars", "100"
    assert bad_build(tmp_path, *options) == 0
    reports = [manifest.read_report(tmp_path / "out", shard) for shard in (0, 1)]
    assert bad_build(tmp_path, *options, "--retry-failed") == 0
    assert [manifest.read_report(tmp_path / "out", shard) for shard in (0, 1)] == reports
    for report in reports:
        assert {reason: len(names) for reason, names in report.dropped_names.items()} == report.dropped


def test_check_names_what_is_left_out_of_foreign_tars(tmp_path, capsys):
    tar(tmp_path)
    assert check(["--bad", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and "00000.tar: bad_caption: list" in lines
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither"):
        check(["--bad", str(tmp_path / "empty")])
