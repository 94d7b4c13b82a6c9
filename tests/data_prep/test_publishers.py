"""What publishers write into their data for their own programs never reaches the model as words, nor do films and
images that a reader does not know become chats without images.
"""

import base64
import json
import zipfile

import pyarrow as pa
import pytest

from data_prep.build import main as build
from data_prep.sources import Dropped
from tests.helpers.source_files import (
    asset,
    describe,
    open_source,
    picture,
    read_all,
    shown,
    write_download,
    write_pictures,
    write_table,
)
from vlgpt.errors import UserError
from vlgpt.images import BadImage

MARK = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
URLS = [f"https://ex.org/{number}.jpg" for number in range(4)]


def contents(item):
    """Texts and numbers of images in reading order, or the reason."""
    return [item.reason] if isinstance(item, Dropped) else [part for _, part in shown(item)]


def obelics(folder, pages, *, suffix="parquet"):
    """All documents of pages, each a list of texts and numbers of images."""
    rows = [
        asset("obelics.json")
        | {
            "texts": [item if isinstance(item, str) else None for item in page],
            "images": [URLS[item] if isinstance(item, int) else None for item in page],
        }
        for page in pages
    ]
    path = folder / f"o.{suffix}"
    if suffix == "parquet":
        write_table(path, rows, rows_per_group=len(rows))
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    write_download(folder / "images", {url: picture(number) for number, url in enumerate(URLS)})
    return read_all(open_source("obelics", path, images=(folder / "images",)))


@pytest.mark.parametrize(
    "page, documents",
    [
        ([0, f"A.\n\n{MARK}\n\nB.", 1, f"C.\n\n{MARK}"], [[0, "A."], ["B.", 1, "C."]]),
        ([f"{MARK}", 0, "A."], [[0, "A."]]),
        ([0, f"A {MARK} {MARK}\n{MARK}B", 1], [[0, "A"], ["B", 1]]),
        ([0, MARK, 1], [[0], [1]]),
        ([0, f"A.\n\nB.{MARK}\n\nnews without image"], [[0, "A.", "\n\nB."], ["filtered:no_image"]]),
        ([0, "A\0.\n\n\u200b\n\nB."], [[0, "A.", "\n\nB."]]),
        ([MARK], [["no_image"]]),
    ],
)
def test_the_mark_of_obelics_ends_a_document_and_is_no_text(tmp_path, page, documents):
    before, *found, after = obelics(tmp_path, [[0], page, [1]])
    assert [shown(item) for item in (before, after)] == [[("plain", 0)], [("plain", 1)]]
    assert list(map(contents, found)) == documents
    if len(found) > 1:
        assert [item.key if hasattr(item, "key") else item.document.id for item in found] == ["o:1:0", "o:1:1"]


def test_marks_are_found_in_every_batch_of_a_table(tmp_path):
    pages = [[0, f"A {MARK} B", 1] if number % 7 == 0 else [0, "A"] for number in range(100)]
    parquet, arrow = [[describe(item) for item in obelics(tmp_path, pages, suffix=s)] for s in ("parquet", "arrow")]
    assert len(parquet) == 115 and parquet == arrow and MARK not in str(parquet)


def llava(folder, **record):
    """What becomes of one dialogue: parts, or the reason."""
    turns = [{"from": "human", "value": record.pop("ask", "Q")}, {"from": "gpt", "value": record.pop("reply", "A")}]
    write_pictures(folder, ["a.jpg", "b.jpg"])
    (folder / "chat.json").write_text(json.dumps([record | {"conversations": turns}]))
    (item,) = read_all(open_source("llava", folder / "chat.json"))
    return contents(item)


@pytest.mark.parametrize(
    "record, parts",
    [
        ({"images": ["a.jpg"]}, [0, "Q", "A"]),
        ({"images": ["a.jpg", "b.jpg"], "ask": "<image>Q<image>"}, [0, "Q", 1, "A"]),
        ({"images": "b.jpg", "image": None}, [1, "Q", "A"]),
        ({"image": "a.jpg", "images": "a.jpg"}, [0, "Q", "A"]),
        ({"image": "a.jpg", "images": ["b.jpg"]}, ["bad_image_name"]),
        ({"image": "a.jpg", "ask": "<Image>\nQ"}, [0, "Q", "A"]),
        ({"image": "a.jpg", "ask": "<img></img>\nQ"}, [0, "Q", "A"]),
        ({"image": "a.jpg", "ask": "<image_1>\nQ"}, ["image_tokens"]),
        ({"image": "a.jpg", "ask": "<|image_pad|>\nQ"}, ["image_tokens"]),
        ({"ask": "<ImageHere>\nQ"}, ["image_tokens"]),
        ({"video": "a.mp4"}, ["other_media"]),
        ({"videos": ["a.mp4"], "ask": "<video>Q"}, ["other_media"]),
        ({"audio": "a.wav"}, ["other_media"]),
        ({"clip": "a.MP4"}, ["other_media"]),
        ({"image": "a.jpg", "sound": "a.wav"}, ["other_media"]),
        ({"ask": "<video>\nQ"}, ["other_media"]),
        ({"ask": "<|audio|>\nQ"}, ["other_media"]),
        ({"ask": "<speech> Q"}, ["other_media"]),
        ({"image": "a.jpg", "ask": "<image><video>Q"}, ["other_media"]),
        ({"image_path": "a.jpg"}, ["unknown_image_field"]),
        ({"img": ["a.jpg"]}, ["unknown_image_field"]),
        ({"file": "a.jpg"}, ["unknown_image_field"]),
        ({"image_bytes": {"bytes": "AAAA"}}, ["unknown_image_field"]),
        ({"video": None, "images": [], "image_path": "", "num_images": 0, "id": 7, "source": "flan"}, ["Q", "A"]),
        ({"image": "a.jpg", "image_source": "coco", "model": "x"}, [0, "Q", "A"]),
        ({"ask": "What is a <b>video</b> in <p>HTML</p>?"}, ["What is a <b>video</b> in <p>HTML</p>?", "A"]),
        ({"ask": "\ufeff Q\0 "}, ["Q", "A"]),
        ({"ask": "\u200b"}, ["empty_turn"]),
        ({"reply": 3}, ["bad_turn"]),
        ({"reply": "cut \ud83d"}, ["bad_turn"]),
    ],
)
def test_media_of_dialogues_are_read_or_dropped_under_a_reason(tmp_path, record, parts):
    assert llava(tmp_path, **record) == parts


@pytest.mark.parametrize("source", ["coco", "llava"])
@pytest.mark.parametrize("given", ["000000000009.jpg", "COCO_train2014_000000000009.jpg"])
@pytest.mark.parametrize(
    "kept",
    [
        *("000000000009.jpg", "train2017/000000000009.jpg", "val2017/000000000009.jpg"),
        *("COCO_train2014_000000000009.jpg", "train2014/COCO_train2014_000000000009.jpg"),
    ],
)
def test_coco_images_have_the_names_of_both_years_and_lie_in_folders_or_not(tmp_path, source, given, kept):
    write_pictures(tmp_path / "coco", [kept])
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    content = {
        "coco": {"images": [{"id": 9, "file_name": given}], "annotations": [{"image_id": 9, "caption": "A."}]},
        "llava": [{"image": f"coco/{given}", "conversations": turns}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content[source]))
    for item in read_all(open_source(source, tmp_path / "x.json", images=(tmp_path / "coco",))):
        assert ("user", 0) in shown(item) or ("assistant", 0) in shown(item)


@pytest.mark.parametrize("form", ["{}", "data:image/jpeg;base64,{}", "lines", "crlf"])
def test_base64_of_mmc4_may_be_broken_into_lines(tmp_path, form):
    letters = base64.b64encode(picture(3)).decode()
    broken = {"lines": "\n", "crlf": "\r\n"}.get(form)
    text = broken.join(letters[n : n + 76] for n in range(0, len(letters), 76)) if broken else form.format(letters)
    record = asset("mmc4.jsonl")
    record["image_info"] = [record["image_info"][0] | {"image_base64": text, "matched_sim": 0.5}]
    del record["similarity_matrix"]
    (tmp_path / "shard.jsonl").write_text(json.dumps(record))
    (page,) = read_all(open_source("mmc4", tmp_path / "shard.jsonl"))
    assert 3 in contents(page)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_images_of_dialogues_may_lie_in_one_zip_file(tmp_path, method):
    """As those of LLaVA-Pretrain, 558k."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        for number in range(3):
            archive.writestr(f"0000{number}/0000{number}5.jpg", picture(number))
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    names = ["00001/000015.jpg", "00002/000025.jpg", "00003/000035.jpg"]
    records = [{"id": name[6:12], "image": name, "conversations": turns} for name in names]
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))
    for images in ((tmp_path / "images.zip",), (tmp_path,)):
        source = open_source("llava", tmp_path / "blip_laion_cc_sbu_558k.json", images=images)
        first, second, missing = source.read(0, 3)
        assert missing.reason == "missing_file"
        if method == zipfile.ZIP_BZIP2:
            with pytest.raises(BadImage, match="unreadable_file"):
                first.images[0]()
        else:
            assert [contents(first), contents(second)] == [[1, "Q", "A"], [2, "Q", "A"]]
    (tmp_path / "cut.zip").write_bytes((tmp_path / "images.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cut\.zip"):
        open_source("llava", tmp_path / "blip_laion_cc_sbu_558k.json", images=(tmp_path / "cut.zip",))


def held(number):
    return {"bytes": picture(number), "path": f"{number}.jpg"}


def test_dialogues_of_finevision_and_onevision_lie_in_tables_with_their_images(tmp_path):
    pairs = [{"user": "Q", "assistant": "A"}, {"user": "R", "assistant": "B"}]
    ratings = {"source": "x", "relevance_ratings": [5, 4], "image_correspondence_ratings": [5, 4], "relevance_min": 4}
    fine = [{"images": [held(1), held(2)], "texts": pairs} | ratings, {"images": [], "texts": pairs[:1]} | ratings]
    found = read_all(open_source("llava", write_table(tmp_path / "fine" / "train-0.parquet", fine)))
    assert list(map(contents, found)) == [[1, 2, "Q", "A", "R", "B"], ["Q", "A"]]
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    text = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    one = [
        {"id": "0", "image": held(3), "conversations": turns, "data_source": "chartqa"},
        {"id": "1", "image": None, "conversations": text, "data_source": "magpie"},
        {"id": "2", "image": None, "conversations": turns, "data_source": "magpie"},
    ]
    found = read_all(open_source("llava", write_table(tmp_path / "one" / "train-0.parquet", one).parent))
    assert list(map(contents, found)) == [[3, "Q", "A"], ["Q", "A"], ["image_tokens"]]


RECIPES = {
    "draw": "parts: [{text: input_prompt, role: user}, {image: output_image, role: assistant}]",
    "edit": """
licence: Apache-2.0
parts:
- {image: input_image, role: user}
- {text: input_prompt, role: user}
- {words: "Here is the edited image:", role: assistant}
- {image: output_image, role: assistant}
""",
}


def mapped(folder, recipe, records):
    write_pictures(folder, ["in/0.png", "in/1.png", "out/2.png"])
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "data.json").write_text(json.dumps(records))
    return open_source("mapped", folder / "data.json", mapping=folder / "recipe.yaml")


def test_a_mapping_makes_documents_of_any_records(tmp_path):
    record = {"input_prompt": " A fox. ", "output_image": "out/2.png", "input_image": ["in/0.png", "in/1.png"]}
    damaged = [{"input_prompt": "x"}, {"output_image": "out/2.png"}, record | {"output_image": 7}]
    damaged += [record | {"output_image": "out/9.png"}, record | {"input_prompt": ["x"]}]
    draw = read_all(mapped(tmp_path, RECIPES["draw"], [record, *damaged]))
    assert shown(draw[0]) == [("user", "A fox."), ("assistant", 2)]
    reasons = ["no_image", "no_text", "bad_image_name", "missing_file", "bad_text"]
    assert [item.reason for item in draw[1:]] == reasons
    source = mapped(tmp_path, RECIPES["edit"], [record])
    words = [("assistant", "Here is the edited image:"), ("assistant", 2)]
    assert shown(read_all(source)[0]) == [("user", 0), ("user", 1), ("user", "A fox."), *words]
    assert source.licence == "Apache-2.0"
    table = write_table(tmp_path / "t" / "a.parquet", [{"p": "A fox.", "i": held(3)}])
    (tmp_path / "r.yaml").write_text("parts: [{image: i}, {text: p}]")
    (pair,) = read_all(open_source("mapped", table, mapping=tmp_path / "r.yaml"))
    assert shown(pair) == [("plain", 3), ("plain", "A fox.")]


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("parts: []", "parts"),
        ("parts: [{image: a, text: b}]", "either image, text or words"),
        ("parts: [{picture: a}]", "picture"),
        ("parts: [{image: a, role: system}]", "role"),
        ("parts: [{image: nothing}]", "nothing"),
        ("- x", "recipe"),
        (": :", "YAML"),
    ],
)
def test_a_wrong_mapping_is_refused_in_one_line(tmp_path, recipe, message):
    with pytest.raises(UserError, match=message) as error:
        mapped(tmp_path, recipe, [{"a": "in/0.png"}])
    assert "\n" not in str(error.value)


def test_another_mapping_is_another_data_set(tmp_path, capsys):
    record = {"input_prompt": "A fox.", "output_image": "out/2.png"}
    mapped(tmp_path, RECIPES["draw"], [record])
    command = ["mapped", "--input", str(tmp_path / "data.json"), "--mapping", str(tmp_path / "recipe.yaml")]
    command += ["--output", str(tmp_path / "shards"), "--num-workers", "0"]
    assert build(command) == 0 and build(command) == 0
    (tmp_path / "recipe.yaml").write_text("parts: [{text: input_prompt}, {image: output_image}]")
    with pytest.raises(UserError, match=r"is being built with recipe.parts"):
        build(command)
