"""Foreign tars as people have them: the build and the loader see the same samples, captions and reasons."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest

from data_prep import check, dedup, index
from data_prep.build import main as build
from data_prep.sources import Record, source_class
from data_prep.sources.sample_tar import open_sample_tar
from vlgpt.errors import UserError
from vlgpt.files import expand_paths
from vlgpt.shards import ShardSet
from vlgpt.shards.samples import choose_fields, split_name
from vlgpt.shards.tars import find_tars, list_tar_members

IMAGE = b"no decoder looks at this"
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


def tar_bytes(members, **options) -> bytes:
    """A tar of (name, bytes), or of (name, type, linkname) for members without bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest
                archive.addfile(info)
            else:
                info.size = len(rest[0])
                archive.addfile(info, io.BytesIO(rest[0]))
    return buffer.getvalue()


def pair(key: str, caption: bytes = b"", *, suffix: str = "txt"):
    return [(f"{key}.jpg", IMAGE + key.encode()), (f"{key}.{suffix}", caption or f"about {key}".encode())]


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def by_loader(folder: Path) -> tuple[Counter, dict[str, int]]:
    """(shard/key, caption, image) of all samples, and what is skipped."""
    shards = ShardSet.open(folder)
    places = [(n, i) for n, record in enumerate(shards.shards) for i in range(record.num_samples)]
    read = [(shards.shards[n].name, shards.read(n, i)) for n, i in places]
    return Counter((f"{name}/{s.key}", s.document.text, s.images[0]) for name, s in read), shards.skipped


def by_build(folder: Path) -> tuple[Counter, dict[str, int]]:
    open_sample_tar.cache_clear()
    source = source_class("img2dataset")((folder,))
    items = list(source.read(0, len(source)))
    assert len(items) == len(source)
    records = [item for item in items if isinstance(item, Record)]
    dropped = Counter(item.reason for item in items if not isinstance(item, Record))
    return Counter((r.document.id, r.document.text, r.images[0]()) for r in records), dict(
        sorted(dropped.items())
    )


def seen(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Key -> caption and reason -> count, which the build and the loader must agree on."""
    built, loaded = by_build(folder), by_loader(folder)
    assert built == loaded
    return {key.partition("/")[2]: caption for key, caption, _ in built[0]}, built[1]


KEPT = {"kept": "about kept"}
MEMBERS = {
    "companions of a Mac": (
        [
            ("./._.DS_Store", APPLE_DOUBLE),
            ("./._a.jpg", APPLE_DOUBLE),
            ("./._a.txt", APPLE_DOUBLE),
            *pair("./a"),
        ],
        {"a": "about ./a"},
        {},
    ),
    "a mask is another field": ([*pair("a"), ("a.seg.png", b"mask")], {"a": "about a"}, {}),
    "two pictures": (
        [("a.left.png", b"l"), ("a.right.png", b"r"), ("a.txt", b"both")],
        {},
        {"several_images": 1},
    ),
    "two formats": ([("a.jpg", b"l"), ("a.png", b"r"), ("a.txt", b"both")], {}, {"several_images": 1}),
    "a dot in the only picture's name": (
        [("a.v1.jpg", b"x"), ("a.v1.txt", b"its own")],
        {"a": "its own"},
        {},
    ),
    "a dot in a folder's name": (pair("d.v1/a", b"deep"), {"d.v1/a": "deep"}, {}),
    "keys that one dot makes equal": (
        [*pair("www.a.com_1"), *pair("www.a.com_2")],
        {},
        {"several_images": 1},
    ),
    "capital suffixes": ([("a.JPG", b"x"), ("a.TXT", b"loud")], {"a": "loud"}, {}),
    "other formats of images": (
        [(f"{s}.{s}", b"x") for s in ("gif", "tiff", "avif", "jfif", "heic", "jp2")]
        + [(f"{s}.txt", b"c") for s in ("gif", "tiff", "avif", "jfif", "heic", "jp2")],
        dict.fromkeys(("gif", "tiff", "avif", "jfif", "heic", "jp2"), "c"),
        {},
    ),
    "a hard link": (
        [*pair("a"), ("b.jpg", tarfile.LNKTYPE, "a.jpg"), ("b.txt", b"the same picture")],
        {"a": "about a", "b": "the same picture"},
        {},
    ),
    "symbolic links": (
        [
            ("all/a.jpg", tarfile.SYMTYPE, "../store/1.jpg"),
            ("all/a.txt", b"a link"),
            ("store/1.jpg", b"far"),
            ("store/1.txt", b"itself"),
        ],
        {"all/a": "a link", "store/1": "itself"},
        {},
    ),
    "links that lead nowhere": (
        [
            *[("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("a.txt", b"x")],
            *[
                ("b.jpg", tarfile.LNKTYPE, "c.jpg"),
                ("b.txt", b"x"),
                ("loop.png", tarfile.SYMTYPE, "loop.png"),
            ],
        ],
        {},
        {"not_a_file": 3},
    ),
    "a device": ([("a.jpg", tarfile.CHRTYPE, ""), ("a.txt", b"x")], {}, {"not_a_file": 1}),
    "twice": ([*pair("a"), *pair("a", b"again")], {"a": "about a"}, {"duplicate_key": 1}),
    "no picture": ([("a.txt", b"x")], {}, {"no_image": 1}),
    "no caption": ([("a.jpg", b"x")], {}, {"no_caption": 1}),
    "no sample at all": ([("README", b"x"), ("a.cls", b"1"), (".hidden.jpg", b"x"), ("b.npy", b"2")], {}, {}),
    "names that are no UTF-8": ([("caf\udce9.jpg", b"x"), ("caf\udce9.txt", b"ok")], {"caf\\xe9": "ok"}, {}),
    "keys that lead out": (pair("../../etc/a", b"in"), {"../../etc/a": "in"}, {}),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_members_are_grouped_by_one_set_of_rules(tmp_path, kind):
    members, captions, reasons = MEMBERS[kind]
    put(tmp_path / "00000.tar", tar_bytes([*members, *pair("kept")]))
    assert seen(tmp_path) == (captions | KEPT, reasons)


CAPTIONS = {
    **{f"of .{suffix}": (suffix, b"said", "said") for suffix in ("txt", "text", "caption", "cap")},
    **{
        f"of {name}": ("json", json.dumps({name: "said"}).encode(), "said")
        for name in ("top_caption", "caption", "txt", "text", "TEXT", "cap")
    },
    "of the JSON before a file": ("json", b'{"caption": "said", "text": "no"}', "said"),
    "null, then another": ("json", b'{"caption": null, "TEXT": "said"}', "said"),
    "byte-order mark": ("txt", b"\xef\xbb\xbfsaid\n", "said"),
    "byte-order mark in JSON": ("json", b'\xef\xbb\xbf{"caption": "said"}', "said"),
    "NaN beside it": ("json", b'{"caption": "said", "similarity": NaN}', "said"),
    "cp1252": ("txt", b"caf\xe9", "text_not_utf8"),
    "UTF-16": ("json", '{"caption": "x"}'.encode("utf-16"), "text_not_utf8"),
    "nothing": ("txt", b"", "empty_caption"),
    "blanks": ("json", b'{"caption": " \\n"}', "empty_caption"),
    "nothing to see": ("txt", "\u200b\ufeff\u00a0".encode(), "empty_caption"),
    "half a pair": ("json", b'{"caption": "cut \\ud83d"}', "bad_caption"),
    "a list": ("json", b'{"caption": ["a", "b"]}', "bad_caption"),
    "a number": ("json", b'{"caption": 7}', "bad_caption"),
    "null": ("json", b'{"caption": null}', "no_caption"),
    "other names": ("json", b'{"prompt": "x"}', "no_caption"),
    "no JSON": ("json", b"{", "bad_json"),
    "no object": ("json", b"[1]", "bad_json"),
    "5,000 digits": ("json", b'{"caption": "x", "n": ' + b"9" * 5000 + b"}", "bad_json"),
    "5,000 brackets": ("json", b"[" * 5000, "bad_json"),
    "2 MB": ("txt", b"x" * 2_000_000, "text_too_long"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_are_judged_when_they_are_indexed_as_the_build_judges_them(tmp_path, kind):
    suffix, data, expected = CAPTIONS[kind]
    members = [("a.jpg", IMAGE), (f"a.{suffix}", data), *pair("kept")]
    put(tmp_path / "00000.tar", tar_bytes(members))
    is_said = expected == "said"
    assert seen(tmp_path) == (KEPT | ({"a": "said"} if is_said else {}), {} if is_said else {expected: 1})


def header_with(data: bytes, *, at: int, field: slice, value: bytes) -> bytes:
    """The tar with another field in the header at `at`, and its checksum made right."""
    tar = bytearray(data)
    tar[at + field.start : at + field.stop] = value
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


SIZE = slice(124, 136)
A, B, C = (tar_bytes(pair(key)) for key in "abc")


def extension(kind: bytes, data: bytes) -> bytes:
    """A header that says something about the member behind it."""
    info = tarfile.TarInfo("extension")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def pax(keyword: bytes, value: bytes) -> bytes:
    record = b" %s=%s\n" % (keyword, value)
    length = len(record) + len(str(len(record)))
    return extension(tarfile.XHDTYPE, b"%d%s" % (length, record))


WITHOUT_A = {"damaged_tar": 1, "no_image": 1}
CONTAINERS = {
    "two joined by cat": (A + B, "ab", {}),
    "three, the first without an end mark": (A[:2048] + B + C, "abc", {}),
    "cut inside a member, then another": (A[:1600] + B, "b", {"damaged_tar": 1, "no_caption": 1}),
    "cut at a block, then another": (A[:1536] + B, "b", {"damaged_tar": 1, "no_caption": 1}),
    "bytes behind the end": (A + b"nonsense" * 99, "a", {"damaged_tar": 1}),
    "no end mark": (A[:2048], "a", {"truncated_tar": 1}),
    "one block of zeros between members": (A[:2048] + bytes(512) + B[:2048] + bytes(1024), "ab", {}),
    "a flipped bit in a header": (
        A[:1029] + b"\xff" + A[1030:2048] + B,
        "b",
        {"damaged_tar": 1, "no_caption": 1},
    ),
    "a negative size": (header_with(A[:2048] + B, at=0, field=SIZE, value=b"\xff" * 12), "b", WITHOUT_A),
    "a size of 8 GB": (header_with(A[:2048] + B, at=0, field=SIZE, value=b"77777777777\0"), "b", WITHOUT_A),
    "a size that is no number": (
        header_with(A[:2048] + B, at=0, field=SIZE, value=b"9zz999999999"),
        *("b", WITHOUT_A),
    ),
    "a PAX size of 5,000 digits": (pax(b"size", b"9" * 5000) + A[:2048] + B, "b", WITHOUT_A),
    "a PAX header without sense": (extension(tarfile.XHDTYPE, b"what?") + A[:2048] + B, "b", WITHOUT_A),
    "a name of 100 kB": (
        extension(tarfile.GNUTYPE_LONGNAME, b"x" * 100_000 + b".jpg") + A[:2048] + B,
        *("b", WITHOUT_A),
    ),
    "a sparse member": (pax(b"GNU.sparse.major", b"1") + A[:2048] + B, "b", {"not_a_file": 1}),
    "gzip": (gzip.compress(A), "a", {}),
    "bzip2": (bz2.compress(A), "a", {}),
    "xz": (lzma.compress(A), "a", {}),
    "gzip of two joined by cat": (gzip.compress(A) + gzip.compress(B), "ab", {}),
    "gzip with bytes behind its end": (gzip.compress(A) + b"nonsense", "a", {"damaged_tar": 1}),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_containers_are_read_to_the_end_of_the_file_and_damage_is_counted(tmp_path, kind, suffix):
    data, keys, reasons = CONTAINERS[kind]
    put(tmp_path / f"x{suffix}", data)
    assert seen(tmp_path) == ({key: f"about {key}" for key in keys}, reasons)


def test_a_tar_without_any_caption_gives_pictures_and_says_which_names_it_has(tmp_path, caplog):
    members = [("a.jpg", b"x"), ("a.json", b'{"prompt": "p", "seed": 3}'), ("b.jpg", b"y"), ("b.cls", b"1")]
    put(tmp_path / "00000.tar", tar_bytes(members))
    loaded, skipped = by_loader(tmp_path)
    assert (sorted(loaded), skipped) == ([("00000/a", "", b"x"), ("00000/b", "", b"y")], {})
    assert "names found: prompt, seed, cls" in caplog.text
    caplog.clear()
    assert by_build(tmp_path) == (Counter(), {"no_caption": 2})
    assert "names found: prompt, seed, cls" in caplog.text


def test_what_is_passed_over_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    put(
        tmp_path / "00000.tar",
        tar_bytes([*pair("a"), ("a.seg.png", b"m"), ("._a.jpg", b"m"), ("README", b"m")]),
    )
    seen(tmp_path)
    lines = [line for line in caplog.text.splitlines() if "members" in line]
    assert len(lines) == 2 and all("1 .*, 1 no suffix, 1 seg.png" in line for line in lines)


def test_tars_at_any_depth_are_found_by_both(tmp_path):
    for name in ("00000.tar", "b/00000.tar", "b/c/00001.tgz", ".hidden/00000.tar"):
        data = tar_bytes(pair("1", name.encode()))
        put(tmp_path / "in" / name, gzip.compress(data) if name.endswith("tgz") else data)
    put(tmp_path / "elsewhere" / "00000.tar", tar_bytes(pair("1", b"linked")))
    (tmp_path / "in" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "loop").symlink_to(tmp_path / "in")
    built, loaded = by_build(tmp_path / "in"), by_loader(tmp_path / "in")
    assert built == loaded
    assert {key: caption for key, caption, _ in loaded[0]} == {
        "00000/1": "00000.tar",
        "b/00000/1": "b/00000.tar",
        "b/c/00001/1": "b/c/00001.tgz",
        "d/00000/1": "linked",
    }


def test_two_tars_of_one_name_are_refused_with_both_paths(tmp_path):
    put(tmp_path / "a.tar", A)
    put(tmp_path / "a.tar.gz", gzip.compress(B))
    for read in (by_build, by_loader):
        with pytest.raises(UserError, match=r"a\.tar and .*a\.tar\.gz"):
            read(tmp_path)


def test_braces_and_stars_that_no_shell_expanded_are_read(tmp_path):
    for number in range(3):
        put(tmp_path / f"{number:05d}.tar", tar_bytes(pair(str(number))))
    for name, expected in (("{00000..00001}.tar", 2), ("*.tar", 3), ("0000[12].tar", 2)):
        assert ShardSet.open(str(tmp_path / name)).num_samples == expected
        output = str(tmp_path / "out" / name.strip("*"))
        assert len(expand_paths(tmp_path / name)) == expected
        options = ["--output", output, "--max-bad-fraction", "1", "--num-workers", "0"]
        assert build(["img2dataset", "--input", str(tmp_path / name), *options]) == 0
        assert ShardSet.open(output).manifest.num_records == expected
    with pytest.raises(FileNotFoundError, match=r"00003\.tar"):
        ShardSet.open(str(tmp_path / "{00000..00003}.tar"))
    for name in ("no*.tar", "{a,b}.tar"):
        with pytest.raises(UserError, match="does not exist"):
            build(["img2dataset", "--input", str(tmp_path / name), "--output", str(tmp_path / "none")])


@pytest.mark.parametrize(
    "has_cache", [True, False], ids=["one cache folder", "folders that cannot be written"]
)
def test_sets_whose_tars_have_the_same_names_do_not_share_an_index(tmp_path, monkeypatch, has_cache):
    for name in ("one", "two"):
        put(tmp_path / name / "00000.tar", tar_bytes(pair("a", name.encode())))
    options = {"cache_dir": tmp_path / "cache"} if has_cache else {}
    if not has_cache:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    for _ in range(2):
        sets = [ShardSet.open(tmp_path / name, **options) for name in ("one", "two")]
        assert [shards.read(0, 0).document.text for shards in sets] == ["one", "two"]
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["00000.tar"]


def test_an_index_follows_the_content_of_its_tar(tmp_path):
    tar = put(tmp_path / "in" / "a.tar", tar_bytes(pair("a", b"old")))
    assert ShardSet.open(tmp_path / "in").read(0, 0).document.text == "old"
    stat = tar.stat()
    tar.write_bytes(tar_bytes(pair("a", b"new")))
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` leaves it: same size, same time
    assert ShardSet.open(tmp_path / "in").read(0, 0).document.text == "new"
    made = ShardSet.open(tmp_path / "in").index_path(0).stat().st_ino
    shutil.move(tmp_path / "in", tmp_path / "moved")
    os.utime(tmp_path / "moved" / "a.tar")
    shards = ShardSet.open(tmp_path / "moved")
    assert shards.index_path(0).stat().st_ino == made, "the same content needs no new index"
    shards.index_path(0).write_bytes(b"damaged")
    assert ShardSet.open(tmp_path / "moved").read(0, 0).document.text == "new"


def test_a_compressed_tar_is_unpacked_once_and_again_when_it_changes(tmp_path):
    tar = put(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(pair("a", b"one"))))
    assert ShardSet.open(tmp_path).read(0, 0).document.text == "one"
    (plain,) = (tmp_path / ".vlgpt-index").glob("*.tar")
    made = plain.stat().st_ino
    assert by_build(tmp_path)[0] and plain.stat().st_ino == made
    tar.write_bytes(gzip.compress(tar_bytes(pair("a", b"two"))))
    assert ShardSet.open(tmp_path).read(0, 0).document.text == "two"
    assert len(list((tmp_path / ".vlgpt-index").glob("*.tar"))) == 1


def test_bombs_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("vlgpt.shards.tars.MAX_UNPACKED", 1 << 20)
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(A[:2048])
        for _ in range(200):
            file.write(bytes(1 << 20))
    assert seen(tmp_path) == ({"a": "about a"}, {"damaged_tar": 1})
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 100 << 20


def test_hostile_headers_cost_no_time(tmp_path):
    started = time.process_time()
    for name, data in {
        "nothing but zeros": bytes(50 << 20),
        "magic everywhere": b"ustar" * (2 << 20),
        "headers that claim what follows": header_with(A[:512], at=0, field=SIZE, value=b"00007777777\0")
        * 4000,
    }.items():
        list_tar_members(put(tmp_path / name, data))
    assert time.process_time() - started < 20


def test_one_bad_caption_stops_neither_index_nor_dedup_nor_check(tmp_path, word_tokenizer, capsys):
    from tests.helpers.source_files import picture

    members = [("a.jpg", picture(1)), ("a.json", b'{"caption": "cut \\ud83d"}')]
    put(tmp_path / "b" / "00000.tar", tar_bytes([*members, ("b.jpg", picture(2)), ("b.txt", b"a dog")]))
    assert index.main([str(tmp_path), "--tokenizer", str(word_tokenizer)]) == 0
    assert ShardSet.open(tmp_path).index(0).part_tokens.tolist() == [0, 2]
    assert dedup.main(["hash", str(tmp_path)]) == 0
    assert dedup.main(["find", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    assert check.main([str(tmp_path), "--decode"]) == 0
    assert "left out of these foreign tars: bad_caption 1" in " ".join(capsys.readouterr().out.split())


def test_advice_about_a_damaged_foreign_sample_leads_out(tmp_path, word_tokenizer):
    tar = put(tmp_path / "00000.tar", tar_bytes(pair("a")))
    shards = ShardSet.open(tmp_path)
    tar.write_bytes(tar.read_bytes().replace(b"about", b"ABOUT"))
    with pytest.raises(
        UserError, match=r"checksum; leave it out: python -m data_prep\.build img2dataset --input"
    ):
        index.reindex_shard(shards, 0, folder=tmp_path, tokenizer=word_tokenizer_of(word_tokenizer))


def word_tokenizer_of(folder: Path):
    from vlgpt.tokens import DocumentTokenizer

    return DocumentTokenizer.load(str(folder), template="vlgpt")


def test_keys_and_fields_are_those_of_webdataset():
    from webdataset.tariterators import base_plus_ext

    for name in (
        "a.jpg",
        "d/a.seg.png",
        "d.v1/a.txt",
        "._a.jpg",
        ".hidden",
        "a",
        "a..jpg",
        "a b.c d.JPG",
    ):
        key, field = base_plus_ext(name)
        assert split_name(name) == (None if key is None else (key, field.lower()))


def test_texts_follow_their_image():
    assert choose_fields(["jpg", "txt", "left.txt"]) == ("", {"image": "jpg", "txt": "txt"})
    assert choose_fields(["left.png", "left.txt", "txt"]) == ("", {"image": "left.png", "txt": "left.txt"})
    assert choose_fields(["left.png", "json"]) == ("", {"image": "left.png", "json": "json"})


def test_hidden_folders_hold_no_tars(tmp_path):
    put(tmp_path / ".vlgpt-index" / "a.tar.gz.0.tar", A)
    assert find_tars(tmp_path) == []
