"""Laws of the shard contract: what is written is read, damage is named, foreign tars lose no good sample."""

import functools
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tests.helpers.small_data import feature_spec
from tests.helpers.tars import add_special, write_tar
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError
from vlgpt.images import BadImage
from vlgpt.shards import (
    BadSample,
    ForeignStream,
    ShardIndex,
    ShardSet,
    ShardWriter,
    write_manifest,
)
from vlgpt.shards.features import dequantise, quantise, write_feature_rows, write_spec
from vlgpt.shards.index import rebuild_index
from vlgpt.shards.manifest import read_report
from vlgpt.shards.schema import UnstorableDocument


class WordTokenizer:
    """One token per word."""

    fingerprint = "words"

    def encode_text(self, text: str, place: str) -> list[int]:
        return [len(word) for word in text.split()]


DOCUMENTS = [
    (
        Document("a/../b", "s", (ImagePart(0), TextPart("a dog <img> ümlaut 🐕")), {"url": "x"}),
        [b"\x89PNG" * 40],
    ),
    (Document("text", "s", (TextPart("no picture at all"),)), []),
    (
        Document("chat", "s", (ImagePart(0, "user"), TextPart("why ?", "user"), TextPart("so", "assistant"))),
        [b"j" * 511],
    ),
    (
        Document("page", "s", (TextPart("x"), ImagePart(0), ImagePart(1), TextPart("y z"))),
        [b"1" * 512, b"2" * 513],
    ),
]


def write(folder: Path, *, num_shards: int = 2) -> ShardSet:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        writer = ShardWriter(folder, shard, first_record=shard * 5, build="b", tokenizer=WordTokenizer())
        for document, images in DOCUMENTS:
            writer.add(document, [("png", image) for image in images])
        writer.drop("not_an_image")
        writer.close()
    write_manifest(folder, name="toy", licence="none", versions={}, build={}, num_shards=num_shards)
    return ShardSet.open(folder)


def samples(shards: ShardSet) -> list:
    return [shards.read(s, i) for s, record in enumerate(shards.shards) for i in range(record.num_samples)]


def test_documents_and_images_survive_the_round_trip(tmp_path):
    shards = write(tmp_path)
    read = samples(shards)
    assert [sample.document for sample in read] == [document for document, _ in DOCUMENTS] * 2
    assert [list(sample.images) for sample in read] == [images for _, images in DOCUMENTS] * 2
    assert read[5].key == "0000100001"
    assert shards.num_samples == 8 and shards.num_images == 8
    assert shards.manifest.dropped == {"not_an_image": 2}


def test_index_columns_describe_every_part_and_member(tmp_path):
    index = write(tmp_path).index(0)
    assert index.part_start.tolist() == [0, 2, 3, 6, 10]
    assert index.part_tokens.tolist() == [0, 5, 4, 0, 2, 1, 1, 0, 0, 2]
    assert index.image_start.tolist() == [0, 1, 1, 2, 4]
    assert index.text_start.tolist() == [0, 1, 2, 4, 6]
    assert index.member_start.tolist() == [0, 2, 3, 5, 8]
    assert index.part_role.tolist() == [0, 0, 0, 1, 1, 2, 0, 0, 0, 0]
    assert index.tokenizer == "words"


def test_tars_are_plain_tars_that_tarfile_and_webdataset_read(tmp_path):
    write(tmp_path, num_shards=1)
    with tarfile.open(tmp_path / "00000.tar") as archive:
        names = archive.getnames()
        assert names[:3] == ["0000000000.json", "0000000000.0.png", "0000000001.json"]
        assert archive.extractfile("0000000003.1.png").read() == b"2" * 513
    rows = list(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == [f"000000000{number}" for number in range(4)]
    assert rows[3]["1.png"] == b"2" * 513


def test_the_bytes_are_those_of_tarfile_with_its_default_owner_mode_and_time(tmp_path):
    write(tmp_path, num_shards=1)
    content = (tmp_path / "00000.tar").read_bytes()
    wanted = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as found,
        tarfile.open(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for member in found:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            archive.addfile(info, found.extractfile(member))
    assert wanted.getvalue() == content


def test_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_nothing_stands_under_a_final_name_before_close(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add(*DOCUMENTS[1])
    assert [path.name for path in tmp_path.iterdir()] == [".00000.tar.partial"]
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.idx", "00000.json", "00000.tar"]


def test_a_tar_gets_its_name_after_its_index_and_its_report(tmp_path, monkeypatch):
    """Seen after every rename: a kill between two of them must not leave a tar that readers take for whole."""
    write(tmp_path, num_shards=1)
    seen, replace = [], os.replace

    def spy(source, target):
        replace(source, target)
        if (tmp_path / "00000.tar").exists():
            index, report = ShardIndex.load(tmp_path / "00000.idx"), read_report(tmp_path, 0)
            seen.append((index.num_samples, report is not None and report.sha256 == index.tar_sha256))

    monkeypatch.setattr(os, "replace", spy)
    writer = ShardWriter(tmp_path, 0)
    writer.add(*DOCUMENTS[1])
    writer.close()
    assert seen == [(1, True)]


def test_a_second_writer_of_a_shard_waits_for_the_first(tmp_path):
    first = ShardWriter(tmp_path, 0)
    first.add(*DOCUMENTS[1])
    opened = []
    thread = threading.Thread(target=lambda: opened.append(ShardWriter(tmp_path, 0)), daemon=True)
    thread.start()
    thread.join(timeout=0.3)
    assert not opened
    first.close()
    thread.join(timeout=10)
    assert opened and (tmp_path / "00000.tar").stat().st_size == read_report(tmp_path, 0).num_bytes
    opened[0].abort()
    assert (tmp_path / "00000.tar").is_file() and not (tmp_path / ".00000.tar.partial").exists()


def test_text_that_is_no_unicode_is_refused_and_nothing_is_written(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    with pytest.raises(UnstorableDocument):
        writer.add(Document("x", "s", (TextPart("\ud800"),)), [])
    writer.drop("bad_text")
    writer.add(*DOCUMENTS[1])
    report = writer.close()
    assert (report.num_records, report.num_samples, report.first_key) == (2, 1, "0000000001")


def test_wrong_image_counts_and_suffixes_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    with pytest.raises(ValueError, match="1 image parts but 0"):
        writer.add(DOCUMENTS[0][0], [])
    with pytest.raises(ValueError, match="suffix 'exe'"):
        writer.add(DOCUMENTS[0][0], [("exe", b"")])


def test_manifest_is_refused_while_a_shard_is_missing_or_damaged(tmp_path):
    write(tmp_path)
    options = {"name": "t", "licence": "", "versions": {}, "build": {}}
    with pytest.raises(UserError, match="shard 00002 of 3: missing"):
        write_manifest(tmp_path, num_shards=3, **options)
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "00001.tar").write_bytes(data)
    with pytest.raises(UserError, match="shard 00001 of 2: the tar's sha256"):
        write_manifest(tmp_path, num_shards=2, **options)


def test_one_flipped_bit_is_one_bad_sample(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "00001.tar").read_bytes())
    shards = ShardSet.open(tmp_path)
    index = shards.index(1)
    data[int(index.member_offset[4]) + 7] ^= 16
    (tmp_path / "00001.tar").write_bytes(data)
    with pytest.raises(BadSample) as caught:
        shards.read(1, 2)
    assert (caught.value.reason, caught.value.shard) == ("checksum", "00001")
    assert shards.read(1, 3).document == DOCUMENTS[3][0]
    assert pickle.loads(pickle.dumps(caught.value)).key == caught.value.key


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"x" * 100])
def test_a_damaged_index_is_named_with_its_repair(tmp_path, damage):
    write(tmp_path)
    (tmp_path / "00000.idx").write_bytes(damage)
    with pytest.raises(UserError, match=r"data_prep\.index"):
        ShardSet.open(tmp_path).index(0)


def test_an_index_with_objects_is_never_unpickled(tmp_path):
    write(tmp_path)
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    buffer = io.BytesIO()
    np.savez(buffer, keys=np.array([Payload()], dtype=object))
    (tmp_path / "00000.idx").write_bytes(buffer.getvalue())
    with pytest.raises(UserError):
        ShardSet.open(tmp_path).index(0)
    assert not canary.exists()


def test_an_index_of_another_tar_is_refused(tmp_path):
    shards = write(tmp_path)
    other = shards.index(0)
    other.tar_sha256 = "0" * 64
    (tmp_path / "00001.idx").write_bytes(other.save_bytes())
    with pytest.raises(UserError, match="belongs to another tar"):
        ShardSet.open(tmp_path).index(1)


def test_a_claim_of_a_huge_member_allocates_nothing(tmp_path):
    shards = write(tmp_path)
    index = shards.index(0)
    index.member_size[0] = 2 << 30
    shards.index_path(0).write_bytes(index.save_bytes())
    damaged = ShardSet.open(tmp_path)
    with pytest.raises(BadSample, match="bad_index"):
        damaged.read(0, 0)
    assert damaged.read(0, 1) == shards.read(0, 1)


def test_an_unfinished_folder_is_named_as_such(tmp_path):
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        ShardSet.open(tmp_path)
    write(tmp_path)
    (tmp_path / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="not finished"):
        ShardSet.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_prep\.build"):
        ShardSet.open(tmp_path / "nowhere")


def test_fingerprint_depends_on_content_and_order(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "b", num_shards=1)
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == write(tmp_path / "c").fingerprint


def test_threads_and_pickled_copies_read_the_same(tmp_path):
    shards = write(tmp_path)
    expected = samples(shards)
    copy = pickle.loads(pickle.dumps(shards))
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(samples(copy))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert results == [expected] * 8


def test_rebuilt_index_equals_the_written_one(tmp_path):
    shards = write(tmp_path)
    rebuilt = rebuild_index(tmp_path / "00000.tar", tokenizer=WordTokenizer())
    assert rebuilt.save_bytes() == shards.index(0).save_bytes()
    assert isinstance(ShardIndex.load(io.BytesIO(rebuilt.save_bytes())), ShardIndex)


# --- remote folders ---


def test_remote_shards_are_cached_bounded_and_checked(tmp_path):
    local = write(tmp_path / "data")
    cache = tmp_path / "cache"
    url = f"file://{tmp_path / 'data'}"
    limit = sum(shard.num_bytes for shard in local.shards) - 1
    remote = ShardSet.open(url, cache_dir=cache, cache_bytes=limit)
    assert samples(remote) == samples(local)
    kept = sum(path.stat().st_size for path in cache.rglob("*.tar"))
    assert 0 < kept <= limit
    data = bytearray((tmp_path / "data" / "00000.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "data" / "00000.tar").write_bytes(data)
    again = ShardSet.open(url, cache_dir=tmp_path / "other")
    with pytest.raises(UserError, match="sha256"):
        again.read(0, 0)
    assert not list((tmp_path / "other").rglob("00000.tar"))


def test_prefetch_brings_whole_shards(tmp_path):
    write(tmp_path / "data")
    remote = ShardSet.open(f"file://{tmp_path / 'data'}", cache_dir=tmp_path / "cache")
    others = threading.enumerate()
    remote.prefetch([1])
    for thread in set(threading.enumerate()).difference(others):
        thread.join()
    assert [path.name for path in sorted((tmp_path / "cache").rglob("0*.???"))] == ["00001.idx", "00001.tar"]


# --- features ---


spec = partial(feature_spec, views=3)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 2e-3), ("int8", 2e-2)])
def test_feature_rows_come_back_within_their_precision(tmp_path, dtype, error):
    shards = write(tmp_path)
    rows = np.random.default_rng(0).standard_normal((4, 3, 2, 8)).astype(np.float32)
    write_spec(tmp_path, spec(dtype=dtype))
    for record in shards.shards:
        write_feature_rows(tmp_path, spec(dtype=dtype), record.name, rows, tar_sha256=record.sha256)
    read = shards.feature("visual").rows(1, 1, 3)
    assert read.shape == (2, 3, 2, 8)
    assert np.abs(read - rows[1:3]).max() <= error


def test_int8_error_is_at_most_half_a_step_of_each_row():
    rows = np.random.default_rng(0).standard_normal((50, 16)) * np.logspace(-3, 3, 50)[:, None]
    rows[7] = 0
    quantised, scales = quantise(rows)
    assert (np.abs(dequantise(quantised, scales) - rows) <= scales[:, None] * 0.5001 + 1e-12).all()


def test_missing_and_foreign_features_name_the_command(tmp_path):
    shards = write(tmp_path)
    with pytest.raises(UserError, match=r"data_prep\.features .* --features visual"):
        shards.feature("visual")
    write_spec(tmp_path, spec())
    with pytest.raises(UserError, match="missing or damaged"):
        shards.feature("visual").rows(0, 0, 1)
    write_feature_rows(tmp_path, spec(), "00000", np.zeros((4, 3, 2, 8)), tar_sha256="of another tar")
    with pytest.raises(UserError, match="another build"):
        shards.feature("visual").rows(0, 0, 1)
    with pytest.raises(UserError, match="another encoder"):
        write_spec(tmp_path, spec(encoder="other"))


def test_feature_fingerprint_changes_with_every_field():
    changes = {
        "encoder": "x",
        "weights_hash": "x",
        "layer": "x",
        "preprocessing": "x",
        "shape": (1,),
        "views": 1,
    }
    prints = {spec(**{name: value}).fingerprint for name, value in changes.items()} | {spec().fingerprint}
    assert len(prints) == len(changes) + 1


def real_picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, num_shards: int) -> None:
    """Shards of two documents: one of two pictures with text, one of text."""
    folder.mkdir()
    for shard in range(num_shards):
        writer = ShardWriter(folder, shard)
        parts = (ImagePart(0), TextPart(f"both {shard}"), ImagePart(1))
        writer.add(
            Document("a", "s", parts), [("png", real_picture(shard)), ("png", real_picture(shard + 10))]
        )
        writer.add(Document("b", "s", (TextPart("none"),)), [])
        writer.close()
    write_manifest(folder, name="p", licence="", versions={}, build={}, num_shards=num_shards)


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_data_set_is_a_webdataset_of_documents_and_decoded_images(tmp_path, is_remote):
    write_pictures(tmp_path / "data", 3)
    path = f"file://{tmp_path}/data" if is_remote else tmp_path / "data"
    pipeline = ShardSet.open(path, cache_dir=tmp_path / "cache").as_webdataset()
    for _ in range(2):
        rows = list(pipeline)
        assert [row["__key__"] for row in rows] == [f"0000{s}0000{n}" for s in range(3) for n in range(2)]
        assert [row["document"].text for row in rows[:2]] == ["both 0", "none"]
        assert [image.getpixel((0, 0))[0] for image in rows[2]["images"]] == [1, 11]
        assert rows[1]["images"] == []
    assert (
        len(list(pipeline.shuffle(4).map(lambda row: row["document"].id).batched(2, collation_fn=None))) == 3
    )
    loaded = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2)
    assert sorted(row["__key__"] for row in loaded) == [row["__key__"] for row in rows]


def test_damaged_images_of_a_webdataset_are_raised_or_handled(tmp_path):
    writer = ShardWriter(tmp_path, 0)
    writer.add(Document("a", "s", (ImagePart(0),)), [("png", b"nothing")])
    writer.add(Document("b", "s", (TextPart("b"),)), [])
    writer.close()
    write_manifest(tmp_path, name="p", licence="", versions={}, build={}, num_shards=1)
    shards = ShardSet.open(tmp_path)
    with pytest.raises(BadImage):
        list(shards.as_webdataset())
    rows = list(shards.as_webdataset(handler=webdataset.ignore_and_continue))
    assert [row["document"].id for row in rows] == ["b"]


# --- foreign webdataset tars ---


def pair(key: str, *, image: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{image}", f"image {key}".encode()), (f"{key}.txt", f" caption {key}\n".encode())]


def test_foreign_pairs_are_documents(tmp_path):
    write_tar(tmp_path / "00000.tar", pair("a") + pair("b", image="JPG") + pair("x/c", image="webp"))
    write_tar(
        tmp_path / "00001.tar", [("d.png", b"d"), ("d.json", json.dumps({"caption": "from json"}).encode())]
    )
    shards = ShardSet.open(tmp_path)
    read = samples(shards)
    assert [sample.document.text for sample in read] == ["caption a", "caption b", "caption x/c", "from json"]
    assert read[1].images == (b"image b",) and shards.skipped == {}
    assert samples(ShardSet.open(tmp_path)) == read  # from the stored index
    assert samples(ShardSet.open([tmp_path / "00001.tar"])) == read[3:]


def test_foreign_tars_are_a_webdataset_of_what_the_index_holds(tmp_path):
    members = [("a.png", real_picture(7)), ("a.txt", b" red "), ("b.txt", b"no image")]
    write_tar(tmp_path / "x.tar", members)
    (row,) = ShardSet.open(tmp_path).as_webdataset()
    assert (row["__key__"], row["document"].text, row["images"][0].size) == ("a", "red", (8, 6))


@pytest.fixture
def server(tmp_path):
    """A folder behind http."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(QuietHandler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        """Nothing."""


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset streams http with curl")
def test_foreign_tars_are_streamed_over_http_and_their_damage_is_counted(server):
    folder, url = server
    write_tar(folder / "0.tar", pair("a") + pair("x/b", image="webp") + [("c.txt", b"no image")])
    write_tar(folder / "1.tar", [*pair("d"), ("e.jpg", b"e"), ("e.txt", b"\xff")])
    write_tar(folder / "2.tar", [("f.jpg", b"f" * 5000)])
    os.truncate(folder / "2.tar", 2000)
    stream = ForeignStream(f"{url}/{{0..2}}.tar")
    found = [(sample.key, sample.document.text, sample.images) for sample in stream]
    assert found == [
        ("a", "caption a", (b"image a",)),
        ("x/b", "caption x/b", (b"image x/b",)),
        ("d", "caption d", (b"image d",)),
    ]
    assert stream.skipped == {"no_image": 1, "text_not_utf8": 1, "truncated_tar": 1}
    with pytest.raises(UserError, match=r"3\.tar cannot be fetched"):
        list(ForeignStream([f"{url}/0.tar", f"{url}/3.tar"]))
    with pytest.raises(UserError, match="http, https, s3, gs, hf"):
        ForeignStream("pipe:echo danger")


def test_members_of_a_sample_may_lie_in_any_order_and_far_apart(tmp_path):
    big = os.urandom(50_000)
    names = [("a.txt", b"first"), ("b.jpg", big), ("a.jpg", b"1"), ("c.jpg", b"3"), ("c.txt", b"third")]
    write_tar(tmp_path / "p.tar", [*names, ("b.txt", b"second")])
    shards = ShardSet.open(tmp_path)
    found = {
        sample.key: (sample.document.text, *sample.images) for sample in (shards.read(0, i) for i in range(3))
    }
    assert found == {"a": ("first", b"1"), "b": ("second", big), "c": ("third", b"3")}


def test_foreign_tars_without_captions_are_pictures_only(tmp_path):
    write_tar(tmp_path / "p.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    assert [sample.document.num_images for sample in samples(ShardSet.open(tmp_path))] == [1, 1]


def test_a_rewritten_foreign_tar_is_indexed_again(tmp_path):
    write_tar(tmp_path / "p.tar", pair("a"))
    assert ShardSet.open(tmp_path).num_samples == 1
    write_tar(tmp_path / "p.tar", pair("a") + pair("b"))
    os.utime(tmp_path / "p.tar", ns=(1, 1))
    assert ShardSet.open(tmp_path).num_samples == 2


def tricky_tar(path: Path) -> None:
    members = [*pair("good"), ("noimage.txt", b"x"), ("nocaption.jpg", b"x"), *pair("good")]
    members += [("v.v1.jpg", b"1"), ("v.v2.jpg", b"2"), *pair("../../etc/cron.d/evil"), *pair("/absolute")]
    members += [
        ("evil.pyd", b"cos\nsystem\n"),
        ("stray.pkl", b"x"),
        ("late.txt", b"late text"),
        *pair("e\u0301"),
        *pair("\u00e9"),
    ]
    members += [("late.jpg", b"late image"), ("binary.jpg", b"x"), ("binary.txt", b"\xff\xfe\xfa")]
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("device.jpg", tarfile.CHRTYPE)):
            add_special(archive, name, kind)


def test_tar_tricks_are_counted_and_write_nothing(tmp_path):
    inside = tmp_path / "data"
    inside.mkdir()
    tricky_tar(inside / "t.tar")
    shards = ShardSet.open(inside)
    delivered, bad = [], []
    for sample in range(shards.num_samples):
        try:
            delivered.append(shards.read(0, sample).document.text)
        except BadSample as error:
            bad.append(error.reason)
    assert delivered == [
        *("caption good", "caption ../../etc/cron.d/evil", "caption /absolute", "late text"),
        *("caption e\u0301", "caption \u00e9"),
    ]
    assert bad == ["text_not_utf8"]
    assert shards.skipped == {
        "dots_in_key": 2,
        "duplicate": 1,
        "no_caption": 1,
        "no_image": 1,
        "not_a_file": 2,
    }
    assert sorted(path.name for path in inside.iterdir()) == [".vlgpt-index", "t.tar"]
    assert not list(inside.glob("*.json")), "img2dataset would take it for a finished shard"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("cut", ["in a member", "on a boundary", "to nothing"])
def test_a_cut_foreign_tar_keeps_what_lies_before_the_cut(tmp_path, cut):
    write_tar(tmp_path / "a.tar", pair("a") + pair("b") + [("c.jpg", b"c" * 2000), ("c.txt", b"c")])
    write_tar(tmp_path / "b.tar", pair("z"))
    size = {"in a member": 4 * 1024 + 512 + 700, "on a boundary": 4 * 1024, "to nothing": 0}[cut]
    os.truncate(tmp_path / "a.tar", size)
    shards = ShardSet.open(tmp_path)
    assert len(samples(shards)) == (1 if cut == "to nothing" else 3)
    expected = {"in a member": {"truncated_tar": 1}, "on a boundary": {}, "to nothing": {"empty_tar": 1}}[cut]
    assert shards.skipped == expected


def test_a_folder_without_usable_images_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match="no tar holds a usable image"):
        ShardSet.open(tmp_path)
    (tmp_path / "a.tar").unlink()
    (tmp_path / ".vlgpt-index/a.tar.idx").unlink()
    with pytest.raises(UserError, match="not a data set"):
        ShardSet.open(tmp_path)


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    far = os.urandom(50_000)
    members = [("a.txt", b"first"), ("b.jpg", far), ("a.jpg", b"1"), ("c.txt", b"third"), ("c.jpg", b"3")]
    write_tar(tmp_path / "p.tar", [*members, ("b.txt", b"second")])
    shards = ShardSet.open(tmp_path)
    shards.read(0, 0)
    sizes: list[int] = []
    monkeypatch.setattr(
        os, "pread", lambda file, size, at, read=os.pread: sizes.append(size) or read(file, size, at)
    )
    requests = {}
    for sample in range(3):
        for with_images in (True, False):
            sizes.clear()
            key = shards.read(0, sample, with_images=with_images).key
            requests[key, with_images] = len(sizes), sum(sizes)
    assert requests["a", True] == (2, 6), "what lies between two far members is not read"
    assert requests["c", True][0] == 1, "neighbours are one request"
    assert {requests[key, False] for key in "abc"} == {(1, 5), (1, 6)}, "without images only the text is read"
