"""Laws of `vlgpt inspect`: it shows the batch that training gets, and nothing from the data can act on the viewer."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from tests.helpers.html_pages import inert
from tests.helpers.small_data import NUM_VISUAL, chat, make_tokenizer, page, pair, word_level, write_dataset
from vlgpt.data.inspect import Inspection, LossWeights, inspect, token_texts
from vlgpt.data.inspect_page import to_html, to_text
from vlgpt.data.loader import Loader
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.tokens import DocumentTokenizer

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    for name, make in (("pairs", pair), ("pages", page), ("chats", chat)):
        write_dataset(folder / name, [make(n) for n in range(40)], shard_sizes=[40], tokenizer=TOKENIZER)
    return folder


def loader(root: Path, *names: str, kind: str = "packed", max_images: int = 2, **options: Any) -> Loader:
    sources = tuple(SourceSettings(name=n, path=str(root / n), max_images=max_images) for n in names)
    chosen = DataSettings(sources=sources, sequence_length=64, pixels=True, image_size_px=8, **options)
    return Loader(chosen, kind=kind, micro_batch=3, tokenizer=TOKENIZER)  # type: ignore[arg-type]


def test_what_is_shown_is_the_batch_that_training_gets(root: Path) -> None:
    made = loader(root, "pairs", "pages", "chats", num_workers=0)
    found = inspect(made, num_batches=4, weights=LossWeights(text=2.0, visual=3.0, first_visual=5.0))
    batches = list(islice(made, 4))
    assert len(found.rows) == 12
    slots = [
        3 * 5 * NUM_VISUAL / (5 + NUM_VISUAL - 1),
        *[3 * NUM_VISUAL / (5 + NUM_VISUAL - 1)] * (NUM_VISUAL - 1),
    ]
    for view in found.rows:
        batch = batches[view.batch]
        names = [segment.document for segment in view.segments if segment.number]
        assert tuple(names) == batch.documents[view.row]
        for segment in view.segments:
            assert len(segment.images) == sum(t.token == "[IMG]" for t in segment.tokens)
            for token in segment.tokens:
                at = (view.row, token.position)
                assert batch.segment_ids[at] == segment.number
                assert batch.token_ids[at] == token.token_id
                assert batch.is_target[at] == token.is_target
                assert batch.is_visual[at] == token.is_visual
                slot = int(token.token[1:]) - 1 if token.is_visual else 0
                wanted = (slots[slot] if token.is_visual else 2.0) if token.is_target else 0.0
                assert token.weight == pytest.approx(wanted)
        assert (
            sum(len(segment.tokens) for segment in view.segments) == (batch.segment_ids[view.row] > 0).sum()
        )


def test_inspecting_moves_nothing(root: Path) -> None:
    made, other = (loader(root, "pairs", num_workers=0) for _ in range(2))
    inspect(made, num_batches=3)
    assert next(iter(made)).documents == next(iter(other)).documents
    assert made.state_dict()["position"] == {"epoch": 0, "window": 0, "row": 0, "redrawn": {}}


def test_roles_are_those_of_the_chat(root: Path) -> None:
    found = inspect(loader(root, "chats"), num_batches=2)
    for view in found.rows:
        for segment in view.segments:
            for token in segment.tokens:
                assert token.is_target <= (token.role in ("assistant", "end"))
            if segment.number:
                assert {t.role for t in segment.tokens} >= {"start", "header", "user", "assistant"}


def test_warnings_name_what_is_wrong(root: Path, tmp_path: Path) -> None:
    found = inspect(loader(root, "pages", max_images=1), num_batches=3)
    assert any("images left out (max_images 1)" in warning for warning in found.warnings)
    found = inspect(loader(root, "chats"), num_batches=3, masked_share=0.2)
    assert any("are no targets (more than 20 %)" in warning for warning in found.warnings)
    assert any("cut to the length of a row" in warning for warning in found.warnings)
    write_dataset(
        tmp_path / "bad",
        [pair(n) for n in range(4)],
        shard_sizes=[4],
        tokenizer=TOKENIZER,
        make_picture=lambda number: ("png", b"nothing"),
    )
    found = inspect(loader(tmp_path, "bad"))
    assert "batch 0 has no target: it trains nothing" in found.warnings
    assert any("is masked: not_an_image" in warning for warning in found.warnings)


NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></title><svg onload=alert(1)>",
    "\x1b[2Jcleared \x07 bell",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("kind", ["packed", "conditions"])
def test_captions_cannot_act_on_the_page_or_the_terminal(tmp_path: Path, kind: str) -> None:
    text_tokenizer = word_level(NASTY, pre_tokenizers.Split("|", "removed"))
    tokenizer = DocumentTokenizer(text_tokenizer, num_visual=2, template="short")
    documents = [Document(text, text, (ImagePart(0), TextPart("|" + text))) for text in NASTY]
    write_dataset(tmp_path / "nasty", documents, shard_sizes=[len(NASTY)], tokenizer=tokenizer)
    source = SourceSettings(name=NASTY[0], path=str(tmp_path / "nasty"))
    chosen = DataSettings(sources=(source,), sequence_length=64, pixels=True, image_size_px=8)
    found = inspect(Loader(chosen, kind=kind, micro_batch=8, tokenizer=tokenizer))  # type: ignore[arg-type]
    html = to_html(found, title=NASTY[1])
    page = inert(html)
    assert "img" in page.tags and not {"a", "svg"} & set(page.tags)
    assert "&lt;script&gt;" in html
    text = to_text(found, has_colour=False)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert all("\x1b[2J" not in to_text(found, has_colour=True, is_full=full) for full in (True, False))


def test_text_marks_targets_and_full_text_has_a_line_per_position(root: Path) -> None:
    found = inspect(loader(root, "chats"))
    compact, full = to_text(found, has_colour=False), to_text(found, has_colour=False, is_full=True)
    assert re.search(r"assistant .*w\d+\*", compact)
    assert not re.search(r"user .*w\d+\*", compact)
    num_tokens = sum(len(segment.tokens) for row in found.rows for segment in row.segments)
    assert len(re.findall(r"^ {4} *\d+ +\d+ ", full, flags=re.M)) == num_tokens
    assert "\u2580" in to_text(found)  # pictures stand between the tokens


def test_image_stages_are_shown_with_pictures_and_captions(root: Path) -> None:
    found = inspect(loader(root, "pairs", kind="conditions"))
    assert [sample.caption for sample in found.samples] == [
        pair(int(sample.document[5:])).text for sample in found.samples
    ]
    assert all(sample.image is not None and "pixels" in sample.tensors for sample in found.samples)
    assert to_html(found).count("<img ") == 3
    assert "w" in to_text(found, has_colour=False)


def test_an_empty_inspection_is_a_page() -> None:
    assert to_html(Inspection()).endswith("</html>\n")
    assert to_text(Inspection()) == "\n"


def test_tokens_are_shown_as_people_read_them() -> None:
    ids = [TOKENIZER.begin_image_id, TOKENIZER.eos_id, *TOKENIZER.encode_text("w7")]
    assert token_texts(TOKENIZER, ids) == ["[IMG]", "</s>", "w7"]


@pytest.mark.parametrize("has_byte_tokens", [False, True], ids=["byte-level", "byte-fallback"])
def test_characters_of_several_tokens_are_shown_as_characters(has_byte_tokens: bool) -> None:
    tokenizer = byte_tokenizer(has_byte_tokens=has_byte_tokens)
    ids = tokenizer.encode_text("gr\u00fcn a\u00a0\u4f60\n")
    mark = "\u2581" if has_byte_tokens else "\u00b7"
    text = "".join(token_texts(tokenizer, ids)).replace("\u2026", "").replace(mark, "\u00b7")
    assert text.lstrip("\u00b7") == "gr\u00fcn\u00b7a\\xa0\u4f60\\n"
    shown = token_texts(tokenizer, ids)
    assert shown.count("\u2026") == 4 and shown[shown.index("\u2026") + 1] == "\u00fc"
    broken = token_texts(tokenizer, ids[: ids.index(ids[shown.index("\u2026")]) + 1])
    assert broken[-1] == "\u2026", "a text that ends within a character"


def byte_tokenizer(*, has_byte_tokens: bool) -> DocumentTokenizer:
    """Byte-level BPE as GPT-2's, or letters with bytes for the rest as LLaMA's; no merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if has_byte_tokens:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"grna"]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    return DocumentTokenizer(fast, num_visual=2, template="short")
