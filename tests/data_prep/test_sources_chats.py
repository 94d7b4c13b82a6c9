"""LLaVA, SVIT and COCO: dialogues become chats, and every variant of their files gives the same ones."""

import json

import pytest

from tests.helpers.source_files import (
    ASSETS,
    asset,
    describe,
    open_source,
    picture,
    read_all,
    shown,
    write_pictures,
)
from tests.helpers.tars import write_tar
from vlgpt.errors import UserError

BUS = [
    ("user", 0),
    ("user", "What are the colors of the bus in the image?"),
    ("assistant", "The bus in the image is white and red."),
    ("user", "What feature can be seen on the back?"),
    ("assistant", "An advertisement."),
]
APPLE = [("user", 0), ("user", "What is on the table?"), ("assistant", "A red apple.")]
MAN = [("user", 1), ("user", "Who walks?"), ("assistant", "A man.")]


def test_llava_dialogue_keeps_the_place_of_its_image_token(tmp_path):
    write_pictures(tmp_path / "train2017", ["000000033471.jpg", "000000033472.jpg"])
    source = open_source("llava", ASSETS / "llava_instruct_150k.json", images=(tmp_path / "train2017",))
    above = open_source("llava", ASSETS / "llava_instruct_150k.json", images=(tmp_path,))
    first, second = read_all(source)
    assert [describe(item) for item in read_all(above)] == [describe(first), describe(second)]
    assert shown(first) == BUS
    assert shown(second) == [("user", "What is shown?"), ("user", 1), ("assistant", "A bus.")]
    assert first.document.id != second.document.id and second.document.info["record_id"] == "33472"


def test_llava_pictures_are_found_under_their_names_of_2014(tmp_path):
    write_pictures(tmp_path, [f"train2014/COCO_train2014_00000003347{n}.jpg" for n in (1, 2)])
    source = open_source("llava", ASSETS / "llava_instruct_150k.json", images=(tmp_path,))
    first, _ = read_all(source)
    assert shown(first) == BUS


@pytest.mark.parametrize(
    "turns, reason",
    [
        ([], "no_turns"),
        ("hello", "no_turns"),
        ([7], "bad_turn"),
        ([{"from": "human", "value": 3}], "bad_turn"),
        ([{"from": "system", "value": "x"}], "unknown_role"),
        ([{"from": "human", "value": "<image>\nQ"}], "no_reply"),
        ([{"from": "human", "value": " "}, {"from": "gpt", "value": "A"}], "empty_turn"),
        ([{"from": "human", "value": "<image><image>Q"}, {"from": "gpt", "value": "A"}], "image_tokens"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>"}], "image_tokens"),
    ],
)
def test_damaged_dialogues_are_dropped_by_reason(tmp_path, turns, reason):
    write_pictures(tmp_path, ["a.jpg"])
    records = [{"id": 1, "image": "a.jpg", "conversations": turns}]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    (item,) = read_all(open_source("llava", tmp_path / "chat.json"))
    assert item.reason == reason and item.key == "chat:0"


def test_dialogue_without_a_picture_stays_text_and_a_strange_name_never_leaves_the_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    (tmp_path / "in").mkdir()
    turns = [
        {"from": "gpt", "value": "ignored"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
    ]
    names = [None, "../secret.jpg", str(tmp_path / "secret.jpg"), "a\0b", "missing.jpg", "x" * 5000, 7]
    records = [{"id": n, "image": name, "conversations": turns} for n, name in enumerate(names)]
    (tmp_path / "in" / "chat.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n{broken\n\n[]\n")
    text, *dropped = read_all(open_source("llava", tmp_path / "in" / "chat.jsonl"))
    assert shown(text) == [("user", "Q"), ("assistant", "A")]
    outside = ["path_outside_folder"] * 3
    assert [item.reason for item in dropped] == [
        *(*outside, "missing_file", "missing_file", "bad_image_name", "bad_json", "bad_row")
    ]


def test_svit_original_and_llava_style_files_give_the_same_chats(tmp_path):
    write_pictures(tmp_path / "vg", ["VG_100K/2407890.jpg", "VG_100K_2/2407891.jpg"])
    apple, boxes, man = read_all(
        open_source("svit", ASSETS / "svit_conversation.json", images=(tmp_path / "vg",))
    )
    assert shown(apple) == APPLE and shown(man) == MAN
    assert (
        "<st>the apple<ed> [10,20,30,40]" in boxes.document.text and boxes.document.info["topic"] == "table"
    )
    styled = read_all(open_source("svit", ASSETS / "svit_core_150K.json", images=(tmp_path,)))
    assert [shown(item) for item in styled] == [APPLE, MAN]


def test_svit_pictures_may_lie_in_tars(tmp_path):
    names = ["VG_100K/2407890.jpg", "VG_100K_2/2407891.jpg"]
    tar = write_tar(tmp_path / "vg.tar", {name: picture(n) for n, name in enumerate(names)})
    items = read_all(open_source("svit", ASSETS / "svit_conversation.json", images=(tar,)))
    assert [shown(item)[0] for item in items] == [("user", 0), ("user", 0), ("user", 1)]


def test_coco_captions_make_the_chats_of_table_6(tmp_path):
    write_pictures(tmp_path, ["val2014/COCO_val2014_000000391895.jpg"])
    caption = "A man with a red helmet on a small moped on a dirt road."
    describe, draw = read_all(open_source("coco", ASSETS / "captions_val2014.json", images=(tmp_path,)))
    request = "Provide a brief description of the given image"
    assert shown(describe) == [("user", request), ("user", 0), ("assistant", caption)]
    request = f"Create an image that visually represents the description: {caption}"
    assert shown(draw) == [("user", request), ("assistant", "Here's the image:"), ("assistant", 0)]
    (pair,) = read_all(
        open_source("coco", ASSETS / "captions_val2014.json", images=(tmp_path,), direction="pair")
    )
    assert shown(pair) == [("plain", 0), ("plain", caption)]


def test_coco_pictures_are_found_under_their_names_of_2017_and_flat_folders(tmp_path):
    write_pictures(tmp_path / "a", ["val2017/000000391895.jpg"])
    write_pictures(tmp_path / "b", ["COCO_val2014_000000391895.jpg"])
    for folder in ("a", "b"):
        source = open_source("coco", ASSETS / "captions_val2014.json", images=(tmp_path / folder,))
        assert len([item for item in read_all(source) if hasattr(item, "document")]) == 2


def test_karpathy_train_includes_restval_and_never_the_test_split(tmp_path):
    write_pictures(tmp_path, [f"val2014/COCO_val2014_000000{n}.jpg" for n in (391895, 522418)])
    options = {"images": (tmp_path,), "direction": "caption"}
    items = read_all(open_source("coco", ASSETS / "dataset_coco.json", **options))
    assert [shown(item)[-1][1] for item in items] == ["A woman cuts a cake.", "Is this a cake?"]
    (test,) = read_all(open_source("coco", ASSETS / "dataset_coco.json", split="test", **options))
    lavis = read_all(open_source("coco", ASSETS / "coco_karpathy_test.json", **options))
    assert shown(test) == shown(lavis[0]) and shown(lavis[1])[-1] == ("assistant", "A moped.")


def test_coco_drops_damaged_captions_by_reason(tmp_path):
    content = asset("captions_val2014.json")
    content["annotations"] += [
        {"image_id": 1, "id": 2, "caption": "no such image"},
        {"image_id": 391895, "id": 3, "caption": " "},
        {"image_id": 391895, "id": 4, "caption": None},
        {"image_id": 391895, "id": 5, "caption": ["x"]},
        "text",
    ]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    write_pictures(tmp_path, ["COCO_val2014_000000391895.jpg"])
    good, *dropped = read_all(open_source("coco", tmp_path / "captions.json", direction="caption"))
    assert good.document.info["image_id"] == 391895
    reasons = ["no_image_name", "empty_caption", "no_caption", "bad_caption", "bad_row"]
    assert [item.reason for item in dropped] == reasons


@pytest.mark.parametrize("name", ["llava", "svit", "coco", "mmc4"])
def test_a_file_of_another_data_set_is_refused_in_one_line_that_names_its_keys(tmp_path, name):
    (tmp_path / "other.json").write_text('[{"question": 1, "answers": 2}]')
    with pytest.raises(UserError, match=r"other\.json.*(answers, question|question, answers)"):
        open_source(name, tmp_path / "other.json")
