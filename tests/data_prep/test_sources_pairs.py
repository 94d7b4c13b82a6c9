"""img2dataset's output, InstructPix2Pix and MagicBrush: pairs and edits, in every form they come in."""

import json
import os
import shutil

import pytest

from data_prep.filters import FilterSettings, RecordFilter
from data_prep.sources import Record
from tests.helpers.builds import build
from tests.helpers.source_files import (
    ASSETS,
    asset,
    describe,
    number_of,
    open_source,
    picture,
    read_all,
    shown,
    write_download,
    write_table,
)
from tests.helpers.tars import write_tar
from vlgpt.errors import UserError
from vlgpt.shards import ShardSet

CAPTION = "a brown dog is sleeping on a bed"
URLS = {f"http://example.org/{number}.jpg": picture(number) if number != 1 else None for number in range(4)}


def reasons(items):
    return [getattr(item, "reason", "") for item in items]


def test_img2dataset_rows_are_pairs_and_failed_downloads_are_counted(tmp_path):
    write_download(tmp_path, URLS)
    write_download(tmp_path, URLS, shard=1)
    items = read_all(open_source("img2dataset", tmp_path))
    assert reasons(items) == ["", "failed_to_download", "", ""] * 2
    assert shown(items[2]) == [("plain", 2), ("plain", CAPTION)]
    info = items[0].document.info
    assert info["similarity"] == 0.31 and info["url"] == "http://example.org/0.jpg"
    assert info["original_size"] == [640, 480]
    assert [item.document.id for item in items if isinstance(item, Record)][:2] == [
        "00000/000000000",
        "00000/000000002",
    ]


def test_tars_without_their_table_give_the_same_pairs(tmp_path):
    write_download(tmp_path / "with", URLS)
    write_download(tmp_path / "without", URLS, has_table=False)
    items = read_all(open_source("img2dataset", tmp_path / "with"))
    alone = read_all(open_source("img2dataset", tmp_path / "without"))
    assert [describe(item) for item in items if isinstance(item, Record)] == list(map(describe, alone))


def test_parquet_output_gives_the_same_pairs(tmp_path):
    rows = []
    for number, data in enumerate(URLS.values()):
        status = "failed_to_download" if data is None else "success"
        row = {"key": f"00000000{number}", "jpg": data, "status": status, "txt": CAPTION}
        rows.append(asset("img2dataset.json") | row)
    write_table(tmp_path / "00000.parquet", rows)
    items = read_all(open_source("img2dataset", tmp_path))
    assert reasons(items) == ["", "failed_to_download", "", ""]
    assert shown(items[3]) == [("plain", 3), ("plain", CAPTION)]


def test_laion_scores_reach_the_filters_under_their_names(tmp_path):
    row = asset("img2dataset.json") | asset("laion_aesthetics.json") | {"jpg": picture(0)}
    copies = [row | {"AESTHETIC_SCORE": score} for score in (6.7, 5.0, None)]
    renamed = {"aesthetic" if name == "AESTHETIC_SCORE" else name: value for name, value in row.items()}
    write_table(tmp_path / "00000.parquet", copies)
    write_table(tmp_path / "00001.parquet", [renamed])
    items = read_all(open_source("img2dataset", tmp_path))
    wanted = {"similarity": 0.31, "aesthetic": 6.7, "watermark": 0.2, "nsfw": 0.01}
    for item in (items[0], items[3]):
        assert {name: item.document.info[name] for name in wanted} == wanted
    keep = RecordFilter(FilterSettings(min_aesthetic=6, max_watermark=0.8, max_nsfw=0.5))
    assert [keep.reason(item) for item in items] == [
        None,
        "filtered:aesthetic",
        "filtered:no_aesthetic",
        None,
    ]


def test_laion_coco_takes_the_top_caption_and_its_own_similarity(tmp_path):
    row = asset("img2dataset.json") | asset("laion_coco.json") | {"jpg": picture(0)}
    write_table(tmp_path / "00000.parquet", [row])
    (item,) = read_all(open_source("img2dataset", tmp_path))
    assert item.document.text == "a dog on a bed" and item.document.info["similarity"] == 0.35
    (item,) = read_all(open_source("img2dataset", tmp_path, caption_column="caption"))
    assert item.document.text == CAPTION and item.document.info["similarity"] == 0.29
    with pytest.raises(UserError, match=r"no title.*top_caption"):
        open_source("img2dataset", tmp_path, caption_column="title")


def test_laion_coco_s_similarity_is_that_of_the_caption_whatever_img2dataset_called_it(tmp_path):
    row = asset("img2dataset.json") | asset("laion_coco.json") | {"jpg": picture(0)}
    renamed = {key: value for key, value in row.items() if key != "top_caption"}
    renamed["caption"] = row["top_caption"]  # --caption_col top_caption
    alone = {key: value for key, value in row.items() if not key.startswith("all_")}
    write_table(tmp_path / "a" / "00000.parquet", [renamed])
    write_table(tmp_path / "b" / "00000.parquet", [alone])
    (item,) = read_all(open_source("img2dataset", tmp_path / "a"))
    assert item.document.text == "a dog on a bed" and item.document.info["similarity"] == 0.35
    (item,) = read_all(open_source("img2dataset", tmp_path / "b"))
    assert item.document.text == "a dog on a bed" and "similarity" not in item.document.info


def test_pictures_without_caption_can_serve_stage_1(tmp_path):
    rows = [
        asset("img2dataset.json") | {"jpg": picture(n), "caption": text} for n, text in enumerate(["", None])
    ]
    write_table(tmp_path / "00000.parquet", rows)
    assert reasons(read_all(open_source("img2dataset", tmp_path))) == ["empty_caption", "no_caption"]
    items = read_all(open_source("img2dataset", tmp_path, require_caption=False))
    assert [shown(item) for item in items] == [[("plain", 0)], [("plain", 1)]]


@pytest.mark.parametrize("has_table", [True, False])
def test_a_cut_tar_gives_what_lies_before_the_cut_and_says_so(tmp_path, has_table):
    write_download(tmp_path, URLS, has_table=has_table)
    tar = tmp_path / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[: data.index(picture(3)) + 20])
    items = read_all(open_source("img2dataset", tmp_path))
    expected = ["", "failed_to_download", "", "truncated_tar"] if has_table else ["", "", "truncated_tar"]
    assert reasons(items) == expected


def test_a_tar_that_ends_between_two_samples_is_found_out_by_its_table(tmp_path):
    write_download(tmp_path, URLS)
    last = dict(list(URLS.items())[:2])
    write_download(tmp_path / "short", last)
    shutil.copy(tmp_path / "short" / "00000.tar", tmp_path / "00000.tar")
    shutil.rmtree(tmp_path / "short")
    items = read_all(open_source("img2dataset", tmp_path))
    assert reasons(items) == ["", "failed_to_download", "missing_in_tar", "missing_in_tar"]


def test_a_table_cut_by_a_killed_download_is_replaced_by_its_tar(tmp_path):
    write_download(tmp_path, URLS)
    table = tmp_path / "00000.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    assert reasons(read_all(open_source("img2dataset", tmp_path))) == [""] * 3


def test_damaged_samples_of_a_tar_are_dropped_by_reason_and_dotted_keys_stay_apart(tmp_path):
    members = {
        "img.v1.jpg": picture(0),
        "img.v1.txt": b"one",
        "img.v2.JPG": picture(1),
        "img.v2.txt": b"two",
        "a.txt": b"no picture",
        "b.jpg": picture(2),
        "b.txt": b"\xff\xfe",
        "c.jpg": picture(3),
        "c.json": b"{",
        "d.jpg": picture(4),
        "../e.jpg": picture(5),
        "../e.json": b'{"caption": "five", "url": 3}',
        "./b.jpg": picture(6),
        "f.pyd": b"never opened",
    }
    tar = write_tar(tmp_path / "x.tar", members)
    items = read_all(open_source("img2dataset", tar))
    assert reasons(items) == [
        *("", "", "no_image", "text_not_utf8", "bad_json", "no_caption", "", "duplicate_key")
    ]
    assert [shown(items[n]) for n in (0, 1, 6)] == [
        [("plain", 0), ("plain", "one")],
        [("plain", 1), ("plain", "two")],
        [("plain", 5), ("plain", "five")],
    ]


def test_a_list_of_urls_is_answered_with_the_commands_that_fetch_it(tmp_path):
    table = write_table(tmp_path / "part-0.parquet", [asset("laion_aesthetics.json")])
    with pytest.raises(UserError) as error:
        open_source("img2dataset", table)
    assert '--save_additional_columns \'["similarity","AESTHETIC_SCORE","pwatermark","punsafe"]\'' in str(
        error.value
    )
    assert "--url_col URL" in str(error.value) and "--caption_col TEXT" in str(error.value)
    (tmp_path / "Train_GCC-training.tsv").write_text("a caption\thttp://example.org/a.jpg\n")
    with pytest.raises(UserError, match="--input_format tsv"):
        open_source("img2dataset", tmp_path / "Train_GCC-training.tsv")


def test_a_download_goes_through_the_build_on_any_number_of_workers(tmp_path):
    write_download(tmp_path / "in", URLS)
    write_download(tmp_path / "in", URLS, shard=1)
    hashes = []
    for workers in ("0", "2"):
        output = tmp_path / f"out{workers}"
        options = ("--shard-size", 3, "--max-bad-fraction", 0.5, "--num-workers", workers)
        assert build("img2dataset", tmp_path / "in", output, *options) == 0
        shards = ShardSet.open(output)
        assert shards.manifest.num_records == 8 and shards.manifest.dropped == {"failed_to_download": 2}
        hashes.append([record.sha256 for record in shards.shards])
    assert hashes[0] == hashes[1]


def test_instructpix2pix_folder_gives_one_editing_chat_per_pair(tmp_path):
    shutil.copytree(ASSETS / "instructpix2pix", tmp_path / "in")
    for seed, first in (("2223667", 0), ("3120932", 2)):
        for number in (0, 1):
            (tmp_path / "in" / "0000000" / f"{seed}_{number}.jpg").write_bytes(picture(first + number))
    items = read_all(open_source("instructpix2pix", tmp_path / "in", split="all"))
    reply = ("assistant", "Here is the edited image:")
    assert shown(items[1]) == [("user", 2), ("user", "make it snowy."), reply, ("assistant", 3)]
    assert items[1].document.info["clip_sim_dir"] == 0.24 and items[0].document.info["clip_sim_image"] == 0.9
    assert items[0].document.info["edited_prompt"] == "photo of a snowy lake"
    source = open_source("instructpix2pix", tmp_path / "in", split="all")
    (tmp_path / "in" / "0000000" / "metadata.jsonl").unlink()
    assert shown(read_all(source)[1]) == shown(items[1])
    (tmp_path / "in" / "0000000" / "prompt.json").write_text("{")
    assert reasons(read_all(source)) == ["bad_json"] * 2
    (tmp_path / "in" / "0000000" / "prompt.json").unlink()
    assert reasons(read_all(source)) == ["missing_file"] * 2


def test_instructpix2pix_splits_are_cut_by_position_and_cover_everything_once(tmp_path):
    seeds = [[f"{number:07d}", ["1", "2"]] for number in range(47)]
    (tmp_path / "seeds.json").write_text(json.dumps(seeds))
    parts = [
        [item.key for item in read_all(open_source("instructpix2pix", tmp_path, split=split))]
        for split in ("train", "val", "test", "all")
    ]
    assert [len(part) // 2 for part in parts] == [42, 2, 3, 47]
    assert parts[0] + parts[1] + parts[2] == parts[3]
    assert len(open_source("instructpix2pix", tmp_path, split="all", pairs="first")) == 47
    (tmp_path / "seeds.json").write_text('[["../../etc", ["passwd"]]]')
    with pytest.raises(UserError, match="etc"):
        open_source("instructpix2pix", tmp_path)


def test_instructpix2pix_tables_give_the_same_chats(tmp_path):
    image = [{"bytes": picture(number), "path": None} for number in (0, 1)]
    row = {"original_prompt": "lake", "original_image": image[0], "edit_prompt": "make it snowy"}
    row |= {"edited_prompt": "snow", "edited_image": image[1]}
    empty = row | {"edited_image": {"bytes": None, "path": "x.jpg"}}
    write_table(tmp_path / "train.parquet", [row, empty, row | {"edit_prompt": " "}])
    items = read_all(open_source("instructpix2pix", tmp_path))
    assert [part for _, part in shown(items[0])] == [0, "make it snowy.", "Here is the edited image:", 1]
    assert reasons(items[1:]) == ["no_image", "empty_instruction"]


def magicbrush_rows():
    """The published rows with pictures: row n shows picture 2 n before and 2 n + 1 after the edit."""
    rows = asset("magicbrush.json")
    for number, row in enumerate(rows):
        row |= {
            "source_img": {"bytes": picture(2 * number)},
            "target_img": {"bytes": picture(2 * number + 1)},
        }
    return rows


def test_magicbrush_turns_become_one_dialogue_in_which_each_edits_the_last_picture(tmp_path):
    rows = magicbrush_rows()
    write_table(tmp_path / "train.parquet", [rows[1], rows[2], rows[0]], rows_per_group=1)
    items = read_all(open_source("magicbrush", tmp_path))
    reply = "Here is the edited image:"
    cat, boat = items
    expected = [0, "Put a cat on the seat.", reply, 1, "let it wear a hat.", reply, 3]
    assert [part for _, part in shown(cat)] == expected
    assert [part for _, part in shown(boat)] == [4, "Add a boat.", reply, 5]
    assert cat.document.info == {"image_id": "242679", "turns": [1, 2]}
    single = read_all(open_source("magicbrush", tmp_path, turns="single"))
    assert sorted(shown(item)[0][1] for item in single) == [0, 2, 4]


def test_magicbrush_leaves_the_splits_for_evaluation_out_unless_told(tmp_path):
    rows = magicbrush_rows()
    write_table(tmp_path / "data" / "train-00000.parquet", rows[:2])
    write_table(tmp_path / "data" / "dev-00000.parquet", rows[2:])
    assert len(read_all(open_source("magicbrush", tmp_path / "data"))) == 1
    assert len(read_all(open_source("magicbrush", tmp_path / "data", split="all"))) == 2
    (tmp_path / "data" / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match="--split all"):
        open_source("magicbrush", tmp_path / "data")


def test_magicbrush_shows_the_source_again_after_a_missing_turn_and_drops_what_is_ambiguous(tmp_path):
    first, second, other = magicbrush_rows()
    third = second | {"turn_index": 3}
    write_table(tmp_path / "gap" / "train.parquet", [first, third])
    (gap,) = read_all(open_source("magicbrush", tmp_path / "gap"))
    assert [part for _, part in shown(gap) if isinstance(part, int)] == [0, 1, 2, 3]
    broken = other | {"img_id": "9", "turn_index": None}
    write_table(tmp_path / "bad" / "train.parquet", [first, first, broken, other | {"instruction": None}])
    items = read_all(open_source("magicbrush", tmp_path / "bad"))
    assert reasons(items) == ["duplicate_turn", "bad_turn_index", "no_instruction"]


def test_large_tars_are_listed_once_and_again_when_they_change(tmp_path, monkeypatch):
    from data_prep.sources import inputs, sample_tar

    monkeypatch.setattr(inputs, "SMALL_BYTES", 0)
    tar = write_tar(tmp_path / "a.tar", {"0.jpg": picture(0), "0.txt": b"zero"})
    listed = []
    real = sample_tar.list_tar_members
    monkeypatch.setattr(sample_tar, "list_tar_members", lambda path: listed.append(path) or real(path))
    for _ in range(3):
        sample_tar.open_sample_tar.cache_clear()
        (item,) = read_all(open_source("img2dataset", tar))
        assert number_of(item.images[0]()) == 0
    assert len(listed) == 1
    write_tar(tar, {"1.jpg": picture(1), "1.txt": b"one", "2.jpg": picture(2), "2.txt": b"two"})
    os.utime(tar, ns=(1, 1))
    sample_tar.open_sample_tar.cache_clear()
    assert len(read_all(open_source("img2dataset", tar))) == 2 and len(listed) == 2


def test_magicbrush_sessions_may_be_interleaved_in_any_order(tmp_path):
    first = magicbrush_rows()[0]
    order = [("a", 1), ("b", 3), ("a", 4), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]
    rows = [
        first | {"img_id": name, "turn_index": turn, "instruction": f"{name}{turn}"} for name, turn in order
    ]
    for rows_per_group in (1, 3, 100):
        folder = tmp_path / str(rows_per_group)
        write_table(folder / "train.parquet", rows, rows_per_group=rows_per_group)
        texts = [item.document.text for item in read_all(open_source("magicbrush", folder))]
        reply = " Here is the edited image: "
        assert texts[0] + " " == reply.join(["a1.", "a2.", "a3.", "a4.", ""])
        assert texts[1] + " " == reply.join(["b1.", "b2.", "b3.", ""])


def test_of_two_pictures_under_one_key_the_first_is_taken(tmp_path):
    write_download(tmp_path, {"http://example.org/0.jpg": picture(0)})
    write_tar(tmp_path / "00000.tar", {"000000000.jpg": picture(0), "./000000000.jpg": picture(1)})
    (item,) = read_all(open_source("img2dataset", tmp_path))
    assert shown(item)[0] == ("plain", 0)
