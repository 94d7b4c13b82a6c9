"""Malformed input is counted under its reason, odd input looks as it should, and nothing ever crashes."""

import io
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageFile

from data_prep.sources import Dropped
from data_prep.sources.text import TextSource
from tests.helpers.builds import build, documents
from tests.helpers.corpus import (
    PER_KIND,
    claims,
    damaged_pictures,
    deep_png,
    encode,
    long_animation,
    picture,
    pixels,
    write_corpus,
)
from tests.helpers.processes import environment
from vlgpt.image_formats import FORMATS
from vlgpt.images import BadImage, decode_image, open_image
from vlgpt.shards import ShardSet


def test_every_malformed_record_is_counted_and_no_good_one_is_lost(tmp_path):
    captions, expected = write_corpus(tmp_path / "in", num_good=120)
    assert sum(expected.values()) == 288 and len(damaged_pictures(0)) == 21, "36 kinds, 8 of each"
    options = ("--num-workers", 2, "--shard-size", 64, "--max-bad-fraction", 0.9)
    assert build("folder", tmp_path / "in", tmp_path / "out", *options) == 0
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.dropped == dict(sorted(expected.items()))
    assert shards.manifest.num_records == len(captions) + sum(expected.values())
    assert sorted(document.text for document in documents(shards)) == sorted(captions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "secret.jpg"]


def test_too_many_bad_records_end_the_build_unsealed(tmp_path, capsys):
    write_corpus(tmp_path / "in", num_good=10)
    assert build("folder", tmp_path / "in", tmp_path / "out") == 1
    assert "more than --max-bad-fraction 0.01" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    # the shards are there: only the judgement changes
    assert build("folder", tmp_path / "in", tmp_path / "out", "--max-bad-fraction", 1) == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


BOMBS = [
    (size, file_format)
    for size in ((20_000, 20_000), (8_000, 8_000), (1, 30_000), (60_000, 60_000))
    for file_format in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
]


@pytest.mark.parametrize(("size", "file_format"), BOMBS)
@pytest.mark.parametrize("fast", [False, True])
def test_bombs_are_refused_by_their_header(monkeypatch, size, file_format, fast):
    """Nothing is decoded and next to nothing allocated: refusing takes 0.1 to 0.6 ms."""
    import simplejpeg

    def refuse(*arguments, **options):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    data = claims(*size)[file_format]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"too_many_pixels|too_wide"):
        decode_image(data, fast=fast, min_size_px=256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 << 10, "kB of memory touched"


def test_the_size_of_a_webp_is_read_from_its_header():
    image = Image.fromarray(pixels(1, width=300, height=70))
    frames = [Image.fromarray(pixels(2, width=300, height=70))]
    for options in (
        {},
        {"lossless": True},
        {"save_all": True, "append_images": frames},
        {"exif": b"Exif\0\0"},
    ):
        data = encode(image, "WEBP", **options)
        assert open_image(data, max_pixels=300 * 70).size == (300, 70)
        with pytest.raises(BadImage, match="300 x 70, the limit is 20999"):
            open_image(data, max_pixels=300 * 70 - 1)


def test_of_a_hundred_thousand_frames_one_is_looked_at(monkeypatch):
    seeks = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "_seek", lambda self, *a, **k: (seeks.append(1), seek(self, *a, **k))[1]
    )
    data = long_animation(100_000)
    assert len(data) > 2_000_000 and decode_image(data).size == (8, 8)
    assert len(seeks) <= 2


def test_a_caption_of_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.seek(100 << 20)
        file.write(b'"}\n{"text": "good"}\n')
    tracemalloc.start()
    source = TextSource([path])
    long, good = source.read(0, len(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert long == Dropped("record_too_long", "a:0") and good.document.text == "good"
    assert peak < 70 << 20


def test_every_kind_of_damage_is_a_bad_image_with_fast_decoding_too():
    for number in range(PER_KIND):
        for kind, (data, reason) in damaged_pictures(number).items():
            for fast in (False, True):
                with pytest.raises(BadImage) as caught:
                    decode_image(data, fast=fast, min_size_px=16)
                assert caught.value.reason == reason, kind


def test_no_flipped_bit_in_png_data_passes_as_a_picture():
    """Pillow alone shows a wrong picture for about one flip in six."""
    data = encode(Image.fromarray(pixels(1)), "PNG")
    start, stop = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for position in range(start, stop, 7):
        flipped = bytearray(data)
        flipped[position] ^= 4
        with pytest.raises(BadImage):
            decode_image(bytes(flipped))


# --- odd but valid ---


def mean_error(data: bytes, wanted: np.ndarray, **options) -> float:
    found = np.asarray(decode_image(data, **options)).astype(float)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).mean())


def rotations() -> list[tuple[int, np.ndarray]]:
    """EXIF orientation -> how to store a picture so that a viewer shows it upright."""
    upright = pixels(3)
    return [
        *[(1, upright), (2, upright[:, ::-1]), (3, upright[::-1, ::-1]), (4, upright[::-1])],
        *[
            (5, upright.transpose(1, 0, 2)),
            (6, np.rot90(upright)),
            (7, np.rot90(upright, 2).transpose(1, 0, 2)),
        ],
        (8, np.rot90(upright, -1)),
    ]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("orientation", "stored"), rotations())
def test_pictures_are_turned_upright(orientation, stored, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=95)
    assert mean_error(data, pixels(3), fast=fast) <= 2
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert mean_error(data, pixels(3)) == 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_of_every_kind_is_scaled(channels):
    """Grey, grey with alpha, RGB, RGB with alpha: written by hand, so that no decoder judges itself."""
    values = np.random.default_rng(0).integers(0, 65_536, (48, 64, channels)).astype(np.uint16)
    values[:24] //= 4  # dark: clipping at 255 would be far off
    colours = values[..., : 1 if channels < 3 else 3] / 257
    alpha = values[..., -1:] / 65_535 if channels in (2, 4) else 1.0
    wanted = np.broadcast_to(colours * alpha + 255 * (1 - alpha), (48, 64, 3))
    assert mean_error(deep_png(values), wanted) <= 2


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_white(file_format):
    grey = np.linspace(0, 30_000, 48 * 64).reshape(48, 64).astype(np.uint16)
    wanted = np.repeat((grey / 257)[..., None], 3, axis=-1)
    assert mean_error(encode(Image.fromarray(grey), file_format), wanted) <= 1


def test_transparency_lies_on_white():
    rgba = np.dstack([pixels(1), np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))])
    alpha = rgba[..., 3:] / 255
    wanted = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for file_format in ("PNG", "WEBP", "TIFF"):
        data = encode(
            Image.fromarray(rgba),
            file_format,
            **({"lossless": True, "exact": True} if file_format == "WEBP" else {}),
        )
        assert mean_error(data, wanted) <= 1, file_format
    grey = Image.fromarray(rgba).convert("LA")
    alpha = np.asarray(grey)[..., 1:] / 255
    wanted = np.repeat(np.asarray(grey)[..., :1] * alpha + 255 * (1 - alpha), 3, axis=-1)
    assert mean_error(encode(grey, "PNG"), wanted) <= 1


def test_palettes_with_and_without_transparency():
    palette = Image.fromarray(pixels(2)).quantize(32)
    shown = np.asarray(palette.convert("RGB"))
    assert mean_error(encode(palette, "PNG"), shown) == 0
    assert mean_error(encode(palette, "GIF"), shown) == 0
    wanted = shown.copy()
    wanted[np.asarray(palette) == 5] = 255
    assert mean_error(encode(palette, "PNG", transparency=5), wanted) == 0
    rgb = np.full((4, 4, 3), 10, np.uint8)
    rgb[0, 0] = (1, 2, 3)
    white = rgb.copy()
    white[0, 0] = 255
    assert mean_error(encode(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)), white) == 0


def test_cmyk_grey_and_bilevel_jpeg_tiff_and_png():
    rgb = pixels(4, width=640, height=480)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    assert mean_error(encode(cmyk, "JPEG", quality=100, subsampling=0), rgb) <= 2
    assert mean_error(encode(cmyk, "TIFF"), rgb) <= 2
    grey = Image.fromarray(rgb).convert("L")
    wanted = np.asarray(grey.convert("RGB"))
    for fast in (False, True):
        assert mean_error(encode(grey, "JPEG", quality=95), wanted, fast=fast) <= 2
    bilevel = grey.convert("1")
    assert mean_error(encode(bilevel, "PNG"), np.asarray(bilevel.convert("RGB"))) == 0


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(pixels(number)) for number in range(3)]
    first = pixels(0)
    for file_format, bound in (("GIF", 8), ("WEBP", 8), ("TIFF", 0), ("PNG", 0)):
        data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
        assert mean_error(data, first) <= bound
        assert mean_error(data, first) < mean_error(data, pixels(1)), file_format


def test_odd_jpegs_are_good():
    image = Image.fromarray(pixels(5))
    wanted = pixels(5)
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    for data in (
        encode(image, "JPEG", quality=95, progressive=True),
        encode(image, "JPEG", quality=95) + bytes(1 << 20),
        encode(image, "JPEG", quality=95, exif=exif),
        encode(image, "JPEG", quality=95, exif=b"Exif\0\0damaged"),
    ):
        assert mean_error(data, wanted) <= 2
        assert mean_error(data, wanted, fast=True) <= 2


def test_scaled_decoding_stays_above_the_size_asked_for():
    data = picture(1, width=1200, height=900)
    for fast in (False, True):
        image = decode_image(data, fast=fast, min_size_px=200)
        assert 200 <= min(image.size) < 450
        small = np.asarray(
            Image.fromarray(pixels(1, width=1200, height=900)).resize(image.size, Image.Resampling.BOX)
        )
        assert np.abs(np.asarray(image).astype(float) - small).mean() <= 2


def test_formats_that_run_programs_are_not_among_ours():
    assert set(FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF"}
    with pytest.raises(BadImage, match="not_an_image"):
        open_image(encode(Image.fromarray(pixels(0)), "PPM"))


def test_exif_and_comments_do_not_reach_the_shard(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "GPS 52.5 13.4 secret"
    (folder / "a.jpg").write_bytes(
        encode(Image.fromarray(pixels(0)), "JPEG", exif=exif, comment=b"secret comment")
    )
    for image_format in ("jpg", "png", "webp"):
        output = tmp_path / image_format
        assert build("images", folder, output, "--image-format", image_format) == 0
        sample = ShardSet.open(output).read(0, 0)
        assert b"secret" not in sample.images[0]
        assert Image.open(io.BytesIO(sample.images[0])).size == (64, 48)


def test_a_record_that_kills_its_process_is_dropped_and_the_rest_survives(tmp_path):
    """A source whose image number 7 dies of a segmentation fault when opened, in a process of its own."""
    script = tmp_path / "run.py"
    script.write_text(CRASHING_BUILD)
    command = [sys.executable, str(script), str(tmp_path / "out")]
    result = subprocess.run(command, timeout=600, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.dropped == {"decoder_crash": 1}
    assert shards.num_samples == 19
    assert int(result.stdout) < 1 << 21, "kB of the largest worker"


CRASHING_BUILD = """
import io, os, resource, signal, sys
from pathlib import Path
from PIL import Image
from data_prep.build import build
from data_prep.filters import FilterSettings
from data_prep.job import BuildJob
from data_prep.images import ImageSettings
from data_prep.sources import Record
from vlgpt.document import Document, ImagePart

def opener(number):
    def open_it():
        if number == 7:
            os.kill(os.getpid(), signal.SIGSEGV)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()
    return open_it

class Numbers:
    licence = "none"
    def __len__(self):
        return 20
    def read(self, start, stop):
        for number in range(start, stop):
            yield Record(Document(str(number), "n", (ImagePart(0),)), (opener(number),))

job = BuildJob(folder=Path(sys.argv[1]), source=Numbers(), source_name="numbers", source_options={}, inputs=(),
          images=ImageSettings(), filters=FilterSettings(), shard_size=6)
assert build(job, name="n", num_workers=2, max_bad_fraction=0.1) is not None
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
def test_fuzzed_pictures_never_crash_the_decoder():
    generator = np.random.default_rng(0)
    originals = [
        picture(number, name) for number in range(4) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    ]
    outcomes = {"good": 0, "bad": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(5000):
        data = bytearray(originals[number % len(originals)])
        for _ in range(int(generator.integers(1, 20))):
            data[int(generator.integers(len(data)))] = int(generator.integers(256))
        if generator.random() < 0.3:
            del data[int(generator.integers(len(data))) :]
        try:
            image = decode_image(bytes(data), fast=bool(number % 2))
            assert image.mode == "RGB" and max(image.size) <= 20_000
            outcomes["good"] += 1
        except BadImage:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "kB"
