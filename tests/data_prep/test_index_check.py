"""`index` changes token lengths and nothing else; `check` names every damage; its page is safe to open."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import pre_tokenizers

from data_prep import check, index
from data_prep.report import ShownPart
from tests.helpers.builds import build, write_imagefolder
from tests.helpers.corpus import encode, picture, pixels
from tests.helpers.html_pages import inert
from tests.helpers.small_data import feature_spec, word_level
from tests.helpers.tars import write_tar
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import run_command
from vlgpt.shards import ShardSet, ShardWriter, write_manifest
from vlgpt.shards.features import write_feature_rows, write_spec
from vlgpt.tokens import DocumentTokenizer

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</article><h1>",
    "{{ 7 * 7 }}",
    "\u202ertl\x00",
)


@pytest.fixture(scope="session")
def built(tmp_path_factory, word_tokenizer) -> Path:
    """A small sealed data set of two shards with token lengths."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"picture number {number} " * (number + 1) for number in range(9)]
    files = [(f"{n}.png", picture(n, "PNG"), {"text": text}) for n, text in enumerate(texts)]
    write_imagefolder(folder / "in", files)
    options = ("--shard-size", 5, "--tokenizer", word_tokenizer)
    assert build("folder", folder / "in", folder / "out", *options) == 0
    return folder / "out"


@pytest.fixture
def data(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "data"))


@pytest.fixture
def letter_tokenizer(tmp_path) -> Path:
    """Another tokenizer: one token per letter."""
    word_level([], pre_tokenizers.Split("", "isolated")).save_pretrained(tmp_path / "letters")
    return tmp_path / "letters"


def tars(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.tar")}


def test_reindexing_stores_the_lengths_of_the_new_tokenizer_and_touches_no_tar(data, letter_tokenizer):
    before, old = tars(data), ShardSet.open(data).index(0)
    assert index.main([str(data), "--tokenizer", str(letter_tokenizer)]) == 0
    assert tars(data) == before
    shards, tokenizer = ShardSet.open(data), DocumentTokenizer.load(letter_tokenizer)
    for shard, record in enumerate(shards.shards):
        new = shards.index(shard)
        assert new.tokenizer == tokenizer.fingerprint
        texts = [shards.read(shard, sample).document.text for sample in range(record.num_samples)]
        assert new.part_tokens[~new.part_is_image].tolist() == [
            len(tokenizer.encode_text(text)) for text in texts
        ]
    assert new.part_tokens.max() > old.part_tokens.max()
    assert shards.manifest.build["tokenizer"] == tokenizer.fingerprint
    assert check.main([str(data)]) == 0


def test_reindexing_twice_writes_once(data, letter_tokenizer, capsys):
    for written in (2, 0):
        assert index.main([str(data), "--tokenizer", str(letter_tokenizer)]) == 0
        assert f"{written} of 2 indexes written" in capsys.readouterr().err


def test_tasks_and_workers_share_the_shards_and_a_task_that_is_none_of_them_is_refused(
    data, letter_tokenizer, capsys
):
    command = [str(data), "--tokenizer", str(letter_tokenizer), "--num-tasks", "2"]
    assert run_command(lambda: index.main([*command, "--task-index", "7"])) == 2
    assert "--task-index must be between 0 and 1, found 7" in capsys.readouterr().err
    for task in ("0", "1"):
        assert index.main([*command, "--task-index", task]) == 0
        assert "1 of 1 indexes written" in capsys.readouterr().err
    assert index.main([str(data), "--tokenizer", str(letter_tokenizer), "--num-workers", "2"]) == 0
    assert "0 of 2 indexes written" in capsys.readouterr().err


def test_a_reindexed_folder_is_still_the_same_build(data, built, letter_tokenizer):
    assert index.main([str(data), "--tokenizer", str(letter_tokenizer)]) == 0
    options = ("--shard-size", 5, "--tokenizer", letter_tokenizer, "--name", "out")
    assert build("folder", built.parent / "in", data, *options) == 0


def test_a_damaged_index_is_made_anew(data, word_tokenizer):
    whole = (data / "00001.idx").read_bytes()
    (data / "00001.idx").write_bytes(whole[: len(whole) // 2])
    assert check.main([str(data)]) == 1
    assert index.main([str(data), "--tokenizer", str(word_tokenizer)]) == 0
    assert (data / "00001.idx").read_bytes() == whole
    assert check.main([str(data)]) == 0


def test_foreign_tars_get_token_lengths_too(tmp_path, word_tokenizer):
    write_tar(tmp_path / "f.tar", {"a.jpg": b"x", "a.txt": b"picture of a dog"})
    assert index.main([str(tmp_path), "--tokenizer", str(word_tokenizer)]) == 0
    assert ShardSet.open(tmp_path).index(0).part_tokens.tolist() == [0, 4]


# --- check ---


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_index(data: Path, change) -> None:
    found = ShardSet.open(data).index(1)
    change(found)
    (data / "00001.idx").write_bytes(found.save_bytes())


DAMAGES = {
    "flipped bit": (lambda d: flip(d / "00001.tar", 3000), "00001: the tar's sha256"),
    "cut tar": (
        lambda d: (d / "00001.tar").write_bytes((d / "00001.tar").read_bytes()[:5000]),
        "00001: its tar",
    ),
    "missing tar": (lambda d: (d / "00000.tar").unlink(), "00000: its tar"),
    "missing index": (lambda d: (d / "00000.idx").unlink(), "00000: its tar, index or report"),
    "missing report": (lambda d: (d / "00000.json").unlink(), "00000: its tar, index or report"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), "manifest:"),
    "unsealed": (lambda d: (d / "_SUCCESS").unlink(), "manifest: _SUCCESS is missing"),
    "stray tar": (
        lambda d: shutil.copy(d / "00000.tar", d / "00007.tar"),
        "00007: a tar that the manifest does not",
    ),
    "wrong total": (
        lambda d: edit(d / "manifest.json", lambda m: m.update(num_samples=3)),
        "manifest: num_samples",
    ),
    "wrong drops": (
        lambda d: edit(d / "manifest.json", lambda m: m.update(dropped={"x": 1})),
        "manifest: records in",
    ),
    "other report": (
        lambda d: edit(d / "00001.json", lambda r: r.update(sha256="0" * 64)),
        "00001: report and manifest",
    ),
    "index of another tar": (
        lambda d: shutil.copy(d / "00000.idx", d / "00001.idx"),
        "00001: the index belongs to",
    ),
    "moved member": (
        lambda d: rewrite_index(d, lambda i: i.member_offset.__setitem__(2, i.member_offset[2] + 512)),
        "00001: members do not lie end to end",
    ),
    "wrong role": (
        lambda d: rewrite_index(d, lambda i: i.part_role.__setitem__(0, 2)),
        "00001: sample 0000100000: the index has other parts",
    ),
    "wrong checksum": (
        lambda d: rewrite_index(d, lambda i: i.member_crc.__setitem__(1, 7)),
        "00001: sample 0000100000: checksum of 0000100000.0.jpg",
    ),
    "wrong starts": (
        lambda d: rewrite_index(d, lambda i: i.image_start.__setitem__(-1, 99)),
        "00001: index column image_start is inconsistent",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named_and_the_exit_code_is_1(data, capsys, damage):
    assert check.main([str(data)]) == 0
    capsys.readouterr()
    harm, message = DAMAGES[damage]
    harm(data)
    assert check.main([str(data)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
    assert any(line.startswith(f"DAMAGED {data}/{message}") for line in lines), lines


def test_a_picture_that_does_not_decode_is_found_on_demand(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add(Document("x", "s", (ImagePart(0),)), [("png", b"no picture")])
    writer.close()
    write_manifest(tmp_path, name="x", licence="", versions={}, build={}, num_shards=1)
    assert check.main([str(tmp_path)]) == 0
    assert check.main([str(tmp_path), "--decode"]) == 1


def test_features_of_another_build_are_damage(data, capsys):
    spec = feature_spec(shape=(2,))
    write_spec(data, spec)
    for number, record in enumerate(ShardSet.open(data).shards):
        rows = np.zeros((record.num_images, 1, 2))
        write_feature_rows(data, spec, record.name, rows, tar_sha256=record.sha256 if number else "another")
    assert check.main([str(data)]) == 1
    assert "feature visual: feature 'visual' of shard 00000" in capsys.readouterr().out


def test_statistics_are_right(built, capsys):
    assert check.main([str(built)]) == 0
    shown = capsys.readouterr().out
    assert "9 documents, 9 images, 2 shards" in shown and "documents by number of images: 1: 9" in shown
    assert "parts by role: plain 18" in shown and "members: jpg 9, json 9" in shown
    lengths = [3 * (number + 1) for number in range(9)]
    assert f"tokens per text part: mean {np.mean(lengths):.0f}" in shown and f"max {max(lengths)}" in shown


# --- the page ---


@pytest.fixture
def hostile(tmp_path) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    writer = ShardWriter(folder, 0)
    image = encode(Image.fromarray(pixels(0)), "PNG")
    for text in HOSTILE:
        writer.add(Document(text, text, (ImagePart(0), TextPart(text))), [("png", image)])
    writer.add(Document("svg", "s", (ImagePart(0),)), [("png", b"<svg onload=alert(1)>")])
    chat = (ImagePart(0, "user"), TextPart("what picture ?", "user"), TextPart("answer", "assistant"))
    writer.add(Document("chat", "s", chat), [("png", image)])
    writer.close()
    write_manifest(folder, name=HOSTILE[0], licence="", versions={}, build={}, num_shards=1)
    return folder


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_no_caption_becomes_markup(hostile, tmp_path, word_tokenizer, with_tokenizer):
    options = ["--tokenizer", str(word_tokenizer), "--template", "short"] if with_tokenizer else []
    assert check.main([str(hostile), "--html", str(tmp_path / "page.html"), *options]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = inert(text)
    known = "html head meta title style body h1 p article h2 span img br"
    assert set(page.tags) <= set(known.split())
    assert page.tags.count("article") == 7 and page.tags.count("h1") == 1 and page.tags.count("img") == 6
    assert "default-src 'none'" in text and "49" not in re.sub(r"base64,\S+", "", text)


def test_the_page_shows_order_roles_and_what_is_predicted(hostile, tmp_path):
    assert check.main([str(hostile), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    chat = text[text.index("what picture ?") - 400 : text.index("what picture ?") + 400]
    assert re.search(r'class="text {2,}">what picture', chat), "the user's words are no target"
    assert re.search(r'class="text target ">answer', chat), "the answer is one"
    assert chat.index("what picture") < chat.index("answer")


def test_line_breaks_at_the_start_of_a_part_are_visible_and_begin_a_line():
    found = [
        (part.marks, part.begins_line, part.shown_text)
        for part in map(text_part, ("a\n b", "\n\nc", " \n d"))
    ]
    assert found == [("", False, "a\n b"), ("↵↵", True, "c"), (" ↵ ", True, "d")]
    assert text_part(" e").shown_text == " e"


def text_part(text: str) -> ShownPart:
    return ShownPart("plain", True, text=text)
