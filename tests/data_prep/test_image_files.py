"""What image files people have: every one is stored as it looks, dropped under a reason, or listed as passed over."""

import logging
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build, main
from data_prep.filters import FilterSettings
from data_prep.images import ImagePreparer, ImageSettings
from data_prep.job import BuildJob
from data_prep.sources import Record
from data_prep.sources.images import ImagesSource
from data_prep.sources.inputs import list_files, suffix_of
from tests.helpers.corpus import claims, deep_png, encode, picture, pixels
from vlgpt.document import Document, ImagePart
from vlgpt.errors import UserError
from vlgpt.image_formats import format_of
from vlgpt.images import BadImage, can_read, decode_image, read_square
from vlgpt.shards import ShardSet

UPRIGHT = pixels(3)
STORED = {  # EXIF orientation -> how a sensor stores what a viewer shows as UPRIGHT
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    6: np.rot90(UPRIGHT),
    8: np.rot90(UPRIGHT, -1),
}


HAS_AVIF = can_read("AVIF")  # Pillow before 11.3 has no decoder


def image() -> Image.Image:
    return Image.fromarray(UPRIGHT)


def error_of(data: bytes, **options) -> float:
    """Mean distance from UPRIGHT, in 255."""
    found = np.asarray(decode_image(data, **options)).astype(float)
    assert found.shape == UPRIGHT.shape
    return float(np.abs(found - UPRIGHT).mean())


def reason_of(data: bytes, **options) -> str:
    try:
        decode_image(data, **options)
    except BadImage as error:
        return error.reason
    return "good"


def built(folder: Path, *options: str) -> ShardSet:
    output = folder.with_name(f"{folder.name}-out")
    arguments = ["images", "--input", str(folder), "--output", str(output), "--num-workers", "0", *options]
    assert main(arguments) == 0
    return ShardSet.open(output)


def ids(source: ImagesSource) -> list[str]:
    return [record.document.id for record in source.read(0, len(source))]


@pytest.fixture
def passed_over(caplog, monkeypatch):
    """-> the parts of the line that lists what was not looked at."""
    monkeypatch.setattr(logging.getLogger("vlgpt"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vlgpt")

    def read() -> set[str]:
        (message,) = [line for line in caplog.messages if line.startswith("passed over")]
        return set(message.removeprefix("passed over: ").split(", "))

    return read


@pytest.fixture
def without_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    can_read.cache_clear()
    yield
    can_read.cache_clear()


# --- orientation ---


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", *["AVIF"] * HAS_AVIF])
def test_every_format_with_exif_is_turned_upright(tmp_path, file_format, orientation, fast):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    options = {
        "JPEG": {"quality": 95},
        "MPO": {"quality": 95},
        "WEBP": {"quality": 100},
        "AVIF": {"quality": 95},
    }
    if file_format == "MPO":  # a phone's photo: a small second image, as for HDR
        options["MPO"] |= {"save_all": True, "append_images": [stored.resize((16, 16))]}
    data = encode(stored, file_format, exif=exif, **options.get(file_format, {}))
    assert error_of(data, fast=fast) <= 2
    info = ImagePreparer(ImageSettings(fast=fast)).prepare(data).info
    assert (info["width"], info["height"]) == (64, 48), "as a viewer shows it"


@pytest.mark.parametrize("fast", [False, True])
def test_photos_with_two_images_are_decoded_at_a_reduced_size_too(fast):
    large = Image.fromarray(pixels(1, width=1200, height=900))
    data = encode(large, "MPO", save_all=True, append_images=[large.resize((64, 48))])
    assert 200 <= min(decode_image(data, fast=fast, min_size_px=200).size) < 450


def test_an_almost_square_image_keeps_its_sides():
    data = encode(Image.fromarray(pixels(1, width=1000, height=1001)), "JPEG")
    info = ImagePreparer(ImageSettings(size_px=100)).prepare(data).info
    assert (info["width"], info["height"]) == (1000, 1001)


# --- parts of a file that no pixel depends on ---


def chunk(name: bytes, data: bytes, *, is_damaged: bool = False) -> bytes:
    checksum = zlib.crc32(name + data) ^ is_damaged
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


LONG = b"a long text " * 180_000
ANCILLARY = {
    "text of 3 MB": chunk(b"iTXt", b"workflow\0\0\0\0\0" + bytes(3_000_000)),
    "packed text of 2 MB": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "packed XMP of 2 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "profile of 2 MB": chunk(b"iCCP", b"printer\0\0" + zlib.compress(bytes(2_000_000))),
    "70 MB of texts": b"".join(
        chunk(b"zTXt", b"k%d\0\0" % number + zlib.compress(bytes(1_000_000))) for number in range(70)
    ),
    "text that is not packed": chunk(b"zTXt", b"Comment\0\0no zlib"),
    "empty size": chunk(b"pHYs", b""),
    "empty gamma": chunk(b"gAMA", b""),
    "empty animation": chunk(b"acTL", b""),
    "empty transparency": chunk(b"tRNS", b""),
    **{
        f"checksum of {name.decode()}": chunk(name, b"key\0value", is_damaged=True)
        for name in (b"tEXt", b"iTXt", b"tIME", b"eXIf", b"iCCP", b"sRGB", b"vpAg", b"tRNS")
    },
}


@pytest.mark.parametrize("kind", ANCILLARY)
def test_ancillary_chunks_of_a_png_do_not_decide(kind):
    data = encode(image(), "PNG")
    assert error_of(data[:33] + ANCILLARY[kind] + data[33:]) == 0
    assert error_of(data[:-12] + ANCILLARY[kind] + data[-12:]) == 0


def test_a_png_with_too_much_text_keeps_orientation_and_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(np.ascontiguousarray(STORED[6])), "PNG", exif=exif)
    assert error_of(data[:33] + ANCILLARY["packed text of 2 MB"] + data[33:]) == 0
    palette = Image.fromarray(pixels(2)).quantize(32)
    data = encode(palette, "PNG", transparency=5)
    shown = np.asarray(decode_image(data[:33] + ANCILLARY["packed text of 2 MB"] + data[33:]))
    assert (shown[np.asarray(palette) == 5] == 255).all()


def test_a_damaged_pixel_chunk_decides_with_any_text_beside_it():
    data = bytearray(encode(image(), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 4
    for text in ANCILLARY.values():
        assert reason_of(bytes(data[:33]) + text + bytes(data[33:])) == "undecodable"


def test_a_damaged_index_of_further_images_does_not_decide():
    data = encode(image(), "MPO", quality=95, save_all=True, append_images=[image()])
    start = data.index(b"MPF\0")
    for position in range(start + 4, start + 60):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF
        for fast in (False, True):
            assert error_of(bytes(damaged), fast=fast) <= 2, position


# --- odd but valid, and damaged ---


ODD = {
    "JPEG 2000": (encode(image(), "JPEG2000"), 0),
    "TIFF of two pages": (encode(image(), "TIFF", save_all=True, append_images=[image().rotate(180)]), 0),
    "CMYK": (encode(image().convert("CMYK"), "JPEG", quality=95), 2),
    "JPEG and more": (encode(image(), "JPEG", quality=95) + b"<html>", 2),
    "PNG and more": (encode(image(), "PNG") + b"rest", 0),
    "PNG without its end mark": (encode(image(), "PNG")[:-12], 0),
}
if HAS_AVIF:
    turned = [image().rotate(180)]
    ODD["AVIF"] = encode(image(), "AVIF", quality=95), 2
    ODD["animated AVIF"] = encode(image(), "AVIF", quality=95, save_all=True, append_images=turned), 2


@pytest.mark.parametrize(("data", "limit"), ODD.values(), ids=ODD)
def test_odd_files_are_good(data, limit):
    assert error_of(data) <= limit and error_of(data, fast=True) <= limit


def test_float_and_32_bit_grey_are_scaled_not_white():
    grey = np.linspace(0, 1, 48 * 64).reshape(48, 64).astype(np.float32)
    for values in (grey, grey * 255, grey * 40_000, (grey * 2e9).astype(np.int32)):
        shown = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))
        assert 20 < shown.mean() < 140 and len(np.unique(shown)) > 100
    assert np.asarray(decode_image(encode(Image.fromarray(grey * np.nan), "TIFF"))).max() == 0


def test_transparent_16_bit_grey_lies_on_white():
    data = deep_png(np.full((48, 64, 1), 1000, np.uint16))
    shown = np.asarray(decode_image(data[:33] + chunk(b"tRNS", struct.pack(">H", 1000)) + data[33:]))
    assert (shown == 255).all()


AVIF = encode(image(), "AVIF") if HAS_AVIF else b""
JP2 = encode(image(), "JPEG2000")


UNREADABLE = {
    "nothing": (b"", "empty"),
    "half a JPEG 2000": (JP2[: len(JP2) // 2], "truncated"),
    "the start of a GIF": (encode(image(), "GIF")[:100], "truncated"),
    "half a TIFF": (encode(image(), "TIFF", compression="tiff_lzw")[:2000], "truncated"),
    "half a photo": (encode(image(), "MPO", save_all=True, append_images=[image()])[:600], "truncated"),
    "PNG of no size": (encode(image(), "PNG")[:8] + b"\0\0\0\x0dIHDR" + bytes(50), "undecodable"),
    "JPEG of 12 bits": (b"\xff\xd8\xff\xc0\0\x11\x0c" + bytes(40), "undecodable"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "needs_pillow_heif"),
    "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "unsupported_format"),
    "ICO": (encode(image(), "ICO"), "unsupported_format"),
    "PSD": (b"8BPS\0\1" + bytes(40), "unsupported_format"),
    "text": (b"BMW 320, used", "not_an_image"),
    "AVI": (b"RIFF\0\0\0\0AVI LIST", "not_an_image"),
    "MP4": (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "not_an_image"),
}
if HAS_AVIF:
    UNREADABLE["half an AVIF"] = AVIF[: len(AVIF) // 2], "truncated"
else:
    UNREADABLE["AVIF"] = b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", "needs_pillow"


@pytest.mark.parametrize(("data", "reason"), UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("fast", [False, True])
def test_what_cannot_be_read_has_the_right_reason(without_heif, data, reason, fast):
    assert reason_of(data, fast=fast) == reason


def test_heic_is_read_where_its_library_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    can_read.cache_clear()
    assert can_read("HEIF")
    (tmp_path / "in").mkdir()
    pillow_heif.from_pillow(image()).save(tmp_path / "in" / "a.heic", quality=95)
    data = (tmp_path / "in" / "a.heic").read_bytes()
    assert error_of(data) < 5
    assert reason_of(data, max_pixels=64 * 48 - 1) == "too_many_pixels"
    assert reason_of(data[: len(data) // 2]) == "truncated"
    assert built(tmp_path / "in").num_samples == 1


def test_the_drop_says_what_to_install(without_heif):
    with pytest.raises(BadImage, match="pip install 'pillow-heif'"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_details_do_not_differ_from_run_to_run():
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(50), b"II*\0\x08\0\0\0\1\0" + bytes(30), b"GIF89a" + bytes(30)):
        with pytest.raises(BadImage) as caught:
            decode_image(data)
        assert " at 0x" not in str(caught.value)


def bombs() -> dict[str, bytes]:
    avif, jp2 = bytearray(AVIF), bytearray(JP2)
    if HAS_AVIF:
        avif[(at := avif.index(b"ispe") + 8) : at + 8] = struct.pack(">II", 8000, 8000)
    jp2[(at := jp2.index(b"ihdr") + 4) : at + 8] = struct.pack(">II", 20_000, 20_000)
    return {**claims(8000, 8000), "JPEG2000": bytes(jp2), **({"AVIF": bytes(avif)} if HAS_AVIF else {})}


def test_a_bomb_is_refused_by_its_header_in_the_newer_formats_too(monkeypatch):
    files = bombs()
    monkeypatch.setattr(Image.Image, "load", None)
    for name, data in files.items():
        assert reason_of(data) == "too_many_pixels", name


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
@pytest.mark.parametrize("size", [(1, 1), (1, 19_999), (19_999, 1), (2, 700)])
def test_dots_and_ribbons_are_squared_in_little_memory(size, decoder, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    resize = cv2.resize

    def small_resize(pixels, size_px, **options):
        assert size_px[0] * size_px[1] < 5e6
        return resize(pixels, size_px, **options)

    monkeypatch.setattr(cv2, "resize", small_resize)
    data = encode(Image.new("RGB", size, (9, 80, 200)), "PNG")
    square = read_square(data, size_px=48, decoder=decoder)
    assert square.shape == (48, 48, 3) and (square == (9, 80, 200)).all()


def test_nothing_that_an_image_library_says_reaches_the_terminal(tmp_path):
    """Damaged EXIF, a malformed MPO index, odd palettes, unknown TIFF tags, libtiff's own errors, large sizes."""
    tiff = bytearray(encode(image(), "TIFF", compression="tiff_lzw"))
    tiff[len(tiff) // 2] ^= 0xFF
    deflate = bytearray(encode(image().convert("1"), "TIFF", compression="group4"))
    deflate[60] ^= 0xFF
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 99
    mpo = bytearray(encode(image(), "MPO", save_all=True, append_images=[image()]))
    mpo[mpo.index(b"MPF\0") + 30] ^= 0xFF
    files = {
        "a.tif": bytes(tiff),
        "b.tif": bytes(deflate),
        "c.jpg": encode(image(), "JPEG", exif=exif.tobytes()[:40]),
        "d.jpg": bytes(mpo),
        "e.png": encode(image().quantize(9), "PNG", transparency=bytes(range(9))),
        "f.png": encode(Image.new("1", (14_000, 7_000)), "PNG"),
        "g.tif": b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHII", 256, 99, 1, 1) * 2 + bytes(8),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import sys; from pathlib import Path; from vlgpt.images import BadImage, decode_image\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    for fast in (False, True):\n"
        "        try: print(decode_image(path.read_bytes(), fast=fast, max_pixels=10**8).size)\n"
        "        except BadImage as error: print(error.reason)\n"
    )
    command = [sys.executable, "-W", "always", "-c", script, str(tmp_path)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 2 * len(files)


# --- which files are looked at ---


def test_suffixes():
    for name, suffix in (
        *(("a.JPG", ".jpg"), ("b.tar.gz", ".tar.gz"), ("c.tgz", ".tgz"), ("d.7z", ".7z"), ("e", "")),
        *(("f.jpg?w=500", ""), ("g.jpg_large", ""), ("Fig. 3", ""), ("h.30", ""), ("i.json.gz", ".gz")),
    ):
        assert suffix_of(name) == suffix, name


def test_every_file_is_a_record_or_passed_over(tmp_path, passed_over, without_heif):
    folder = tmp_path / "in"
    folder.mkdir()
    good = [
        "a.JPG",
        "b.jfif",
        "c.jpe",
        "d.pjpeg",
        "e.png",
        "f f.webp",
        "ü.gif",
        "line\nbreak.bmp",
        "g.avif",
        "h.jp2",
    ]
    nameless = ["0123abcd", "i.jpg?w=500", "j.jpg_large", "k.jpg~"]
    for name in (*good, *nameless):
        (folder / name).write_bytes(picture(1))
    for name in ("l.heic", "m.heic", "n.txt", "o.tar.gz", "p.nef", "q", ".hidden.jpg", "r.json"):
        (folder / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "s.jpg").write_bytes(picture(1))
    os.mkfifo(folder / "t.jpg")
    os.symlink("nothing", folder / "u.jpg")
    os.symlink("v.jpg", folder / "v.jpg")
    assert ids(ImagesSource([folder])) == sorted([*good, *nameless])
    assert passed_over() == {
        *(
            "2 .heic (pip install pillow-heif)",
            "1 .txt",
            "1 .tar.gz",
            "1 .nef",
            "1 without suffix",
            "1 .json",
        ),
        *("2 hidden", "1 pipes and devices", "2 broken links"),
    }


def test_links_to_folders_are_followed_and_loops_end(tmp_path, passed_over):
    for name in ("in/a/1.jpg", "disk/b/2.jpg", "disk/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    os.symlink(tmp_path / "disk", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "disk" / "b", tmp_path / "in" / "twice")
    for place in ("in/a/up", "in/up", "disk/b/up"):
        os.symlink(tmp_path / "in", tmp_path / place)
    os.symlink(tmp_path, tmp_path / "in" / "a" / "out")
    assert ids(ImagesSource([tmp_path / "in"])) == ["a/1.jpg", "linked/3.jpg", "linked/b/2.jpg"]
    assert passed_over() == {"5 linked folders read before"}


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, passed_over, monkeypatch):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(1))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ids(ImagesSource([tmp_path])) == ["a/1.jpg"]
    assert passed_over() == {"1 unreadable folders"}


def test_images_beside_records_are_not_passed_over(tmp_path, passed_over):
    for name in ("a.json", "b.jpg", "c.tar", "d.csv", "e.md"):
        (tmp_path / name).write_bytes(b"x")
    found = list_files([tmp_path], (".json",), others=(".jpg", ".tar"))
    assert [file.name for file in found] == ["a"]
    assert passed_over() == {"1 .csv", "1 .md"}


def test_names_that_are_no_utf8_and_wrong_suffixes_are_stored(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(picture(1))
    (folder / "wrong.png").write_bytes(picture(2, "WEBP"))
    (folder / "page.jpg").write_bytes(b"<html>404</html>")
    shards = built(folder, "--max-bad-fraction", "1")
    assert [shards.read(0, sample).document.id for sample in range(2)] == ["caf\\xe9.jpg", "wrong.png"]
    assert shards.manifest.dropped == {"not_an_image": 1}


def test_nothing_found_names_what_was_there(tmp_path, passed_over):
    (tmp_path / "a.txt").write_bytes(b"x")
    with pytest.raises(UserError, match="found no file ending in"):
        ImagesSource([tmp_path])
    assert passed_over() == {"1 .txt"}


def test_caches_of_links_and_linked_disks_are_read(tmp_path):
    """Hugging Face's cache: snapshots/HASH/NAME are links into blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    rows = "".join(f'{{"file_name": "{n}.jpg", "text": "cat {n}"}}\n' for n in range(3))
    for name, data in (*((f"{n}.jpg", picture(n)) for n in range(3)), ("metadata.jsonl", rows.encode())):
        (blobs / f"{zlib.crc32(name.encode()):x}").write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{zlib.crc32(name.encode()):x}")
    arguments = ["folder", "--input", str(snapshot), "--output", str(tmp_path / "out"), "--num-workers", "0"]
    assert main(arguments) == 0
    assert ShardSet.open(tmp_path / "out").num_samples == 3


# --- errors of one record ---


@pytest.mark.parametrize("options", [(), ("--fast",)])
def test_an_encoder_that_refuses_costs_one_record(tmp_path, options):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ok.jpg").write_bytes(picture(1))
    (folder / "tall.png").write_bytes(encode(Image.new("RGB", (20, 17_000)), "PNG"))
    shards = built(folder, "--image-format", "webp", "--max-bad-fraction", "1", *options)
    assert (shards.num_samples, shards.manifest.dropped) == (1, {"not_encodable": 1})


class Faulty:
    """Records 0 ... 9: reading 2, opening 4 and the images of 6 are broken in ways that nobody foresaw."""

    licence = "none"

    def __len__(self) -> int:
        return 10

    def read(self, start, stop):
        def bad():
            raise zlib.error("unforeseen")

        for number in range(start, stop):
            if number == 2:
                raise LookupError("unforeseen")
            images = (bad if number == 4 else picture(number),) * (1 + (number == 6))
            yield Record(Document(str(number), "n", (ImagePart(0),)), images)


def test_an_error_that_nobody_foresaw_costs_one_record(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vlgpt"), "propagate", True)
    job = BuildJob(
        folder=tmp_path / "out",
        source=Faulty(),
        source_name="faulty",
        source_options={},
        inputs=(),
        images=ImageSettings(),
        filters=FilterSettings(),
        shard_size=4,
    )
    manifest = build(job, name="n", num_workers=0, max_bad_fraction=1)
    assert manifest is not None and manifest.dropped == {"unforeseen_error": 3}
    shards = ShardSet.open(tmp_path / "out")
    found = [
        shards.read(number, sample).document.id
        for number, record in enumerate(shards.shards)
        for sample in range(record.num_samples)
    ]
    assert found == ["0", "1", "3", "5", "7", "8", "9"]
    told = "\n".join(caplog.messages)
    for detail in ("LookupError: unforeseen", "error: unforeseen", "1 image parts, but 2 images"):
        assert detail in told
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    assert build(job, name="n", num_workers=0, max_bad_fraction=1, retry_failed=True) == manifest
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}


def test_the_first_bytes_name_the_format():
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", *["AVIF"] * HAS_AVIF):
        assert format_of(picture(1, name)[:32]) == name
    assert format_of(picture(1, "MPO")) == "JPEG"
    assert not any(format_of(re.sub(rb"[^ -~]", b"", picture(1, name))) for name in ("JPEG", "BMP", "TIFF"))
