"""Each filter drops what it names, and only that, under its own reason."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.filters import FilterSettings, RecordFilter
from data_prep.images import (
    ENTRY_BYTES,
    ImagePreparer,
    ImageSettings,
    _perceptual_hash_array,
    perceptual_hash,
)
from data_prep.sources import Record
from tests.helpers.corpus import encode, picture
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage, decode_image


def record(text: str = "a dog", *, images: int = 1, name: str = "x", **info) -> Record:
    parts = [part for number in range(images) for part in (ImagePart(number), TextPart(text))]
    return Record(Document(name, "s", tuple(parts), info), (b"",) * images)


def reason(item: Record, **settings) -> str | None:
    return RecordFilter(FilterSettings(**settings)).reason(item)


def test_without_settings_everything_stays():
    assert reason(record("", images=40, similarity=-1, nsfw=1)) is None


@pytest.mark.parametrize(
    ("setting", "kept", "dropped", "name"),
    [
        ({"min_text_chars": 5}, {"text": "abcde"}, {"text": "abcd"}, "text_too_short"),
        ({"max_text_chars": 5}, {"text": "abcde"}, {"text": "abcdef"}, "text_too_long"),
        ({"min_similarity": 0.24}, {"similarity": 0.24}, {"similarity": 0.239}, "similarity"),
        ({"min_aesthetic": 6}, {"aesthetic": 6.5}, {"aesthetic": 5.9}, "aesthetic"),
        ({"max_watermark": 0.8}, {"watermark": 0.8}, {"watermark": 0.81}, "watermark"),
        ({"max_nsfw": 0.5}, {"nsfw": 0}, {"nsfw": 0.9}, "nsfw"),
        ({"min_similarity": 0.2}, {"similarity": 1}, {"text": "no number"}, "no_similarity"),
        ({"min_similarity": 0.2}, {"similarity": 1}, {"similarity": float("nan")}, "no_similarity"),
        ({"max_nsfw": 0.5}, {"nsfw": 0.1}, {"nsfw": True}, "no_nsfw"),
    ],
)
def test_thresholds_keep_their_own_side(setting, kept, dropped, name):
    assert reason(record(**kept), **setting) is None
    assert reason(record(**dropped), **setting) == f"filtered:{name}"


def test_opt_out_knows_urls_domains_and_subdomains(tmp_path: Path):
    (tmp_path / "list").write_text("https://a.org/1.jpg\nb.org\n\n")
    listed = {"opt_out": tmp_path / "list"}
    assert reason(record(url="https://a.org/1.jpg"), **listed) == "filtered:opt_out"
    assert reason(record(url="https://a.org/2.jpg"), **listed) is None
    assert reason(record(url="http://img.b.org:80/x"), **listed) == "filtered:opt_out"
    assert reason(record(url="http://notb.org/x"), **listed) is None
    assert reason(record(image_urls=["http://c.org/x", "http://b.org"]), **listed) == "filtered:opt_out"
    with pytest.raises(UserError, match="nowhere cannot be read"):
        RecordFilter(FilterSettings(opt_out=tmp_path / "nowhere"))


def test_excluded_documents_are_left_out(tmp_path: Path):
    (tmp_path / "list").write_text("x\n")
    assert reason(record(), exclude=tmp_path / "list") == "filtered:excluded"
    assert reason(record(name="y"), exclude=tmp_path / "list") is None


def test_single_image_documents_are_thinned_to_the_share_asked_for():
    judge = RecordFilter(FilterSettings(drop_single_image=0.8))
    dropped = sum(judge.reason(record(name=str(number))) is not None for number in range(3000))
    assert abs(dropped / 3000 - 0.8) < 0.03
    assert all(judge.reason(record(name=str(number), images=2)) is None for number in range(200))
    assert judge.reason(record(name="7")) == judge.reason(record(name="7"))


def test_documents_are_cut_before_the_image_that_is_too_many():
    cropped = RecordFilter(FilterSettings(max_images=2)).crop(record(images=5))
    assert cropped.document.num_images == len(cropped.images) == 2
    assert cropped.document.text == "a dog a dog"


@pytest.mark.parametrize(
    ("settings", "size", "name"),
    [
        ({"min_side_px": 50}, (49, 200), "min_side"),
        ({"max_side_px": 100}, (101, 60), "max_side"),
        ({"max_aspect": 2.0}, (201, 100), "aspect"),
        ({"min_file_bytes": 50_000}, (60, 60), "file_bytes"),
    ],
)
def test_pictures_are_filtered_by_their_header(settings, size, name):
    width, height = size
    with pytest.raises(BadImage) as caught:
        ImagePreparer(ImageSettings(**settings)).prepare(picture(0, width=width, height=height))
    assert caught.value.reason == f"filtered:{name}"
    good = {"min_side": (50, 200), "max_side": (100, 60), "aspect": (200, 100)}.get(name)
    if good:
        ImagePreparer(ImageSettings(**settings)).prepare(picture(0, width=good[0], height=good[1]))


def blobs(number: int) -> Image.Image:
    """Coarse random colours, smoothed: structure in all low frequencies, as photographs have."""
    grid = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((300, 225), Image.Resampling.BICUBIC)


def distance(first: int, second: int) -> int:
    return bin(first ^ second).count("1")


def test_perceptual_hash_survives_encoding_and_size_and_tells_pictures_apart():
    original = [perceptual_hash(blobs(number)) for number in range(30)]
    smaller = [blobs(number).resize((150, 112), Image.Resampling.BOX) for number in range(30)]
    changed = [perceptual_hash(decode_image(encode(image, "JPEG", quality=60))) for image in smaller]
    assert max(distance(a, b) for a, b in zip(original, changed)) <= 6
    assert min(distance(original[a], original[b]) for a in range(30) for b in range(a)) >= 12


IMAGEHASH = [
    "c0a7ecd64252ecba",
    "8bb89da0c4b67e98",
    "e00f4be69332a37c",
    "874f7762f5c06d08",
    "d4ce515df1e1425c",
    "d1ca7898f882f4cb",
    "dd31d94cc748a81f",
    "a44b73c51ce9de24",
    "ce399ca5a4ade123",
    "9c4352fc36a9d568",
    "99e042d7bfc12077",
    "fb161e0bc49d903d",
    "bc013e78ef8ea066",
    "c1a051feb968a2f3",
    "d1b89a36b2cc32d3",
    "c46816967fce5634",
    "fc01e13a27c86b6d",
    "a2f25513a1e4dd53",
    "d8be18d9514e721d",
    "ddf84e847cd2542a",
]


def test_perceptual_hash_agrees_with_imagehash():
    for number, theirs in enumerate(IMAGEHASH):
        image = blobs(number).resize((90 + number, 120))
        assert distance(perceptual_hash(image), int(theirs, 16)) <= 2


def test_the_fast_hash_is_at_most_a_few_bits_away():
    for number in range(100):
        image = blobs(number).resize((300 + number, 256))
        assert distance(perceptual_hash(image), _perceptual_hash_array(np.asarray(image))) <= 2


def test_prepared_pictures_are_kept_within_a_budget_of_bytes():
    budget = 20_000
    preparer = ImagePreparer(ImageSettings(), cache_bytes=budget)
    first = picture(0)
    prepared = preparer.prepare(first)
    assert preparer.prepare(first) is prepared, "the same file is not prepared twice"
    for number in range(1, 60):
        preparer.prepare(picture(number))
        held = sum(len(stored.data) + ENTRY_BYTES for stored in preparer._cache.values())
        assert held <= budget
    assert len(preparer._cache) >= 3
    again = preparer.prepare(first)
    assert again is not prepared and again == prepared
