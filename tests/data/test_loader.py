"""Laws of the whole loader, on real shards: batches say the truth, worker processes change nothing, state
is exact.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.small_data import (
    NUM_VISUAL,
    chat,
    make_tokenizer,
    page,
    pair,
    write_dataset,
    write_feature,
)
from vlgpt.batch import Batch, tensors_of
from vlgpt.data.loader import Loader
from vlgpt.data.mixture import SLOTS
from vlgpt.data.stream import Position, advance
from vlgpt.document import Document, ImagePart
from vlgpt.errors import UserError
from vlgpt.models.losses import count_targets
from vlgpt.settings import DataSettings, SourceSettings
from vlgpt.shards import ShardSet
from vlgpt.tokens import flatten

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets, uneven shards, an empty one among them, with features."""
    root = tmp_path_factory.mktemp("data")
    sets = {"pairs": (pair, [30, 0, 50, 40]), "pages": (page, [25, 35]), "chats": (chat, [60])}
    for name, (make, sizes) in sets.items():
        documents = [make(number) for number in range(sum(sizes))]
        write_dataset(root / name, documents, shard_sizes=sizes, tokenizer=TOKENIZER)
        write_feature(root / name, "patches", shape=(3, 2), views=2, dtype="float16")
        write_feature(root / name, "visual", shape=(NUM_VISUAL, 5))
        write_feature(root / name, "image_condition", shape=(2, 3), views=2)
        write_feature(root / name, "text_condition", shape=(2, 3))
    return root


def settings(root: Path, *names: str, source: dict[str, Any] | None = None, **options: Any) -> DataSettings:
    sources = tuple(
        SourceSettings(name=name, path=str(root / name), **(source or {}))
        for name in names or ("pairs", "pages", "chats")
    )
    chosen: dict[str, Any] = {"sequence_length": 64, "features": ("patches",), "num_workers": 0, "seed": 4}
    return DataSettings(sources=sources, **{**chosen, **options})


def packed(chosen: DataSettings, **options: Any) -> Loader:
    return Loader(chosen, kind="packed", **{"micro_batch": 4, "tokenizer": TOKENIZER, **options})


def conditions(chosen: DataSettings, **options: Any) -> Loader:
    return Loader(chosen, kind="conditions", **{"micro_batch": 8, **options})


def take(loader: Loader, num_batches: int) -> list[Any]:
    try:
        return list(islice(loader, num_batches))
    finally:
        loader.close()


def same(a: Any, b: Any) -> bool:
    """Equality of batches, tensor by tensor."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    return bool(a == b)


# --- what a batch holds


def test_a_packed_batch_holds_the_documents_it_names(data: Path) -> None:
    """Every segment decodes to the text of its document, and every image is the one that stands there."""
    wanted = {d.id: d for make in (pair, page, chat) for d in map(make, range(120))}
    rows = ShardSet.open(data / "pairs")
    for batch in take(packed(settings(data, "pairs")), 20):
        image = 0
        for row, names in enumerate(batch.documents):
            assert len(names) == batch.segment_ids[row].max()
            for number, name in enumerate(names, start=1):
                at = batch.segment_ids[row] == number
                assert TOKENIZER.decode(batch.token_ids[row][at].tolist()) == wanted[name].text
                assert batch.is_visual[row][at].sum() == NUM_VISUAL
                row_of_image = int(name.rpartition("-")[2])
                shard = next(s for s, start in ((3, 80), (2, 30), (0, 0)) if row_of_image >= start)
                start = sum(s.num_samples for s in rows.shards[:shard])
                value = float(batch.images.values[image, 0, 0])
                assert value - 100 * shard - (row_of_image - start) in (0.0, 0.25)
                image += 1
        assert image == len(batch.images)


def test_every_image_of_a_page_comes_with_its_own_feature(data: Path) -> None:
    index = {shard: ShardSet.open(data / "pages").index(shard) for shard in (0, 1)}

    def rows_of(name: str) -> list[int]:
        number = int(name.rpartition("-")[2])
        shard, sample = (0, number) if number < 25 else (1, number - 25)
        first, last = index[shard].image_start[[sample, sample + 1]].tolist()
        return [100 * shard + row for row in range(first, last)]

    chosen = settings(data, "pages", source={"max_images": 9}, sequence_length=256)
    for batch in take(packed(chosen), 4):
        names = [name for row in batch.documents for name in row]
        assert batch.images.values[:, 0, 0].floor().tolist() == [
            row for name in names for row in rows_of(name)
        ]
    few = settings(data, "pages", source={"max_images": 1}, sequence_length=256)
    numbers = set()
    for batch in take(packed(few), 4):
        names = [name for row in batch.documents for name in row]
        for name, value in zip(names, batch.images.values[:, 0, 0].tolist(), strict=True):
            numbers.add(rows_of(name).index(int(value)))  # each document gives one of its own images
    assert numbers >= {0, 1, 2}
    batches = take(conditions(chosen), 10)
    places = [
        rows_of(name).index(int(value))
        for batch in batches
        for name, value in zip(batch.documents, batch.patches[:, 0, 0])
    ]
    assert set(places) >= {0, 1, 2}


def test_source_ids_say_which_source_a_position_came_from(data: Path) -> None:
    loader = packed(settings(data))
    for batch in take(loader, 10):
        for row, names in enumerate(batch.documents):
            for number, name in enumerate(names, start=1):
                ids = batch.source_ids[row][batch.segment_ids[row] == number].unique().tolist()
                assert [loader.source_names[i] for i in ids] == [name.rpartition("-")[0] + "s"]


def test_padding_is_its_own_segment_without_targets(data: Path) -> None:
    for batch in take(packed(settings(data, packing="none")), 5):
        padding = batch.segment_ids == 0
        assert padding.any()
        assert not (batch.is_target | batch.is_visual)[padding].any()
        starts = padding.int().argmax(dim=1)[padding.any(dim=1)]
        rows = torch.arange(len(padding))[padding.any(dim=1)]
        assert (batch.position_ids[rows, starts] == 0).all()


@pytest.mark.parametrize(
    ("features", "pixels", "kind", "shape", "dtype"),
    [
        (("patches",), False, "patches", (3, 2), torch.float16),
        (("patches", "visual"), False, "visual", (NUM_VISUAL, 5), torch.float32),
        ((), True, "pixels", (3, 8, 8), torch.uint8),
    ],
)
def test_images_come_as_the_settings_say(
    data: Path, features: tuple[str, ...], pixels: bool, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for batch in take(packed(settings(data, features=features, pixels=pixels, image_size_px=8)), 3):
        assert batch.images.kind == kind
        assert batch.images.values.shape[1:] == shape
        assert batch.images.values.dtype == dtype


def test_pixels_are_the_pictures_of_the_documents(data: Path) -> None:
    chosen = settings(data, "pairs", features=(), pixels=True, image_size_px=8)
    for batch in take(conditions(chosen), 5):
        for document, pixels in zip(batch.documents, batch.pixels):
            number = int(document.rpartition("-")[2])
            assert pixels[:, 3, 3].tolist() == [number, 0, 77]


def test_inputs_are_random_views_and_targets_the_clean_one(data: Path) -> None:
    features = ("patches", "image_condition", "text_condition")
    batches = take(conditions(settings(data, "pairs", features=features)), 30)
    views = torch.cat([(batch.patches[:, 0, 0] % 1) for batch in batches])
    assert set(views.tolist()) == {0.0, 0.25}
    for batch in batches:
        assert torch.equal(batch.image_condition[:, 0, 0], batch.patches[:, 0, 0].float().floor())
        assert torch.equal(
            batch.text_condition[:, 0, 0], batch.image_condition[:, 0, 0]
        )  # one text per image
        assert batch.has_text.all()
        assert batch.is_valid.all()


def test_a_page_gives_one_of_its_images_without_text(data: Path) -> None:
    chosen = settings(data, "pages", features=("patches", "text_condition"))
    batch = take(conditions(chosen, micro_batch=40), 1)[0]
    wanted = {d.id: d.num_images for d in map(page, range(60))}
    for document, has_text, caption in zip(batch.documents, batch.has_text.tolist(), batch.captions):
        assert has_text == bool(caption) == (wanted[document] == 1 and bool(page(int(document[5:])).text))
    assert not batch.text_condition[~batch.has_text].any()


# --- processes change nothing


@pytest.mark.parametrize("kind", ["packed", "conditions"])
def test_worker_processes_give_what_the_main_process_gives(data: Path, kind: str) -> None:
    def batches(num_workers: int) -> list[Any]:
        chosen = settings(data, num_workers=num_workers)
        return take(packed(chosen) if kind == "packed" else conditions(chosen), 25)

    alone = batches(0)
    for num_workers in (1, 3):
        together = batches(num_workers)
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_large_tensors_survive_the_way_between_processes(data: Path) -> None:
    chosen = settings(data, "pairs", features=(), pixels=True, image_size_px=160)
    alone, together = (take(conditions(chosen.model_copy(update={"num_workers": n})), 6) for n in (0, 2))
    assert alone[0].pixels.nbytes > 500_000
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("packed", {"features": (), "pixels": True, "image_size_px": 8}),
        ("packed", {"features": ("patches",)}),
        ("packed", {"features": ("visual",)}),
        ("conditions", {"features": ("patches", "image_condition", "text_condition"), "pixels": True}),
    ],
)
def test_no_batch_is_larger_than_its_buffer(data: Path, kind: str, options: dict[str, Any]) -> None:
    chosen = settings(data, **options)
    loader = packed(chosen) if kind == "packed" else conditions(chosen)
    for batch in take(loader, 20):
        assert sum(t.nbytes for t in tensors_of(batch)) <= loader.maker.max_bytes(loader.micro_batch)


def test_a_row_of_nothing_but_images_fills_its_buffer(tmp_path: Path) -> None:
    documents = [Document(f"d{n}", "all", (ImagePart(0),)) for n in range(40)]
    write_dataset(tmp_path / "all", documents, shard_sizes=[40], tokenizer=TOKENIZER)
    least = len(flatten(TOKENIZER.spans(documents[0])).token_ids)  # a sequence of one image
    chosen = settings(tmp_path, "all", features=(), pixels=True, image_size_px=8, sequence_length=10 * least)
    loader = packed(chosen)
    (batch,) = take(loader, 1)
    assert len(batch.images) == 40
    held = sum(t.nbytes for t in tensors_of(batch))
    assert 0.7 * loader.maker.max_bytes(4) < held <= loader.maker.max_bytes(4)


# --- targets are counted ahead of the batches


def num_targets(batch: Any) -> dict[str, float]:
    """As the stages count: of rows their targets by modality, of samples those that are valid and those with text."""
    if isinstance(batch, Batch):
        return {name: float(count) for name, count in count_targets(batch).items()}
    return {"image": float(batch.is_valid.sum()), "text": float((batch.is_valid & batch.has_text).sum())}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["packed", "conditions"])
def test_what_is_counted_ahead_is_what_the_batches_hold(data: Path, kind: str, num_workers: int) -> None:
    """Whether the trainer takes exactly the batches that it asked for, or one more that is copied ahead."""
    chosen = settings(data, num_workers=num_workers)
    options = {"count_targets": num_targets}
    loader = packed(chosen, **options) if kind == "packed" else conditions(chosen, **options)
    straight = take(packed(chosen) if kind == "packed" else conditions(chosen), 36)
    for is_one_more in (False, True):
        batches, counted, found = iter(loader), [], []
        for step in range(5):
            counted += loader.targets(7)
            found += [next(batches) for _ in range(7 + (is_one_more and step == 0))]
        assert counted == [num_targets(batch) for batch in found[:35]]
        assert all(same(a, b) for a, b in zip(straight, found))
    loader.close()


def test_counting_ahead_moves_neither_batches_nor_position(data: Path) -> None:
    first = packed(settings(data, num_workers=2), count_targets=num_targets)
    straight = take(packed(settings(data)), 20)
    batches = iter(first)
    first.targets(8)
    seen = [next(batches) for _ in range(8)]
    first.advance(8)
    first.targets(8)
    next(batches)
    state = first.state_dict()
    second = packed(settings(data, num_workers=3), count_targets=num_targets)
    second.load_state_dict(state)
    assert second.targets(12) == [num_targets(batch) for batch in straight[8:]]
    seen += [next(second) for _ in range(12)]
    assert all(same(a, b) for a, b in zip(straight, seen, strict=True))
    first.close(), second.close()


def test_targets_are_not_counted_further_ahead_than_was_said(data: Path) -> None:
    loader = packed(settings(data, num_workers=2), count_targets=num_targets)
    loader.targets(4)
    with pytest.raises(ValueError, match="no more than 4 are counted ahead"):
        loader.targets(1)
    loader.close()
    with pytest.raises(ValueError, match="count_targets"):
        packed(settings(data)).targets(1)
    late = packed(settings(data), count_targets=num_targets)
    next(late)
    with pytest.raises(ValueError, match="before the first batch"):
        late.targets(1)


def test_ranks_share_the_stream_without_overlap(data: Path) -> None:
    chosen = settings(data)
    whole = take(packed(chosen, micro_batch=12), 5)
    parts = [take(packed(chosen, micro_batch=4, rank=rank, world_size=3), 5) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(batch.documents) == sorted(row for part in parts for row in part[step].documents)


def test_one_pass_gives_every_document_once_over_all_ranks(data: Path) -> None:
    chosen = settings(data, sequence_length=130, num_workers=2)
    seen: Counter[str] = Counter()
    num_batches = set()
    for rank in range(3):
        batches = list(packed(chosen, rank=rank, world_size=3, is_one_pass=True))
        num_batches.add(len(batches))
        seen.update(name for batch in batches for row in batch.documents for name in row)
    assert len(num_batches) == 1
    assert set(seen.values()) == {1}
    assert len(seen) == 240
    once = conditions(settings(data, "pairs"), micro_batch=50, is_one_pass=True)
    assert sum(int(batch.is_valid.sum()) for batch in once) == 120


# --- the state


def consume(loader: Loader, num_batches: int, ahead: int = 3) -> list[Any]:
    """Train on some batches while others have been fetched already."""
    batches = iter(loader)
    seen = []
    for _ in range(num_batches):
        seen.append(next(batches))
        loader.advance(1)
    for _ in range(ahead):
        next(batches)
    return seen


@pytest.mark.parametrize("kind", ["packed", "conditions"])
@pytest.mark.parametrize(("first_workers", "then_workers"), [(0, 2), (2, 0)])
def test_a_resumed_run_goes_on_as_if_it_never_stopped(
    data: Path, kind: str, first_workers: int, then_workers: int
) -> None:
    def make(num_workers: int) -> Loader:
        chosen = settings(data, num_workers=num_workers)
        return packed(chosen) if kind == "packed" else conditions(chosen)

    straight = take(make(0), 40)
    first = make(first_workers)
    seen = consume(first, 17)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = make(then_workers)
    second.load_state_dict(state)
    rest = take(second, 23)
    assert all(same(a, b) for a, b in zip(straight, seen + rest, strict=True))


def test_a_resumed_run_may_have_another_number_of_ranks(data: Path) -> None:
    first = packed(settings(data), micro_batch=6)
    seen = [row for batch in consume(first, 10) for row in batch.documents]
    state = first.state_dict()
    for rank in range(2):
        loader = packed(settings(data), micro_batch=5, rank=rank, world_size=2)
        loader.load_state_dict(state)
        seen += [row for batch in take(loader, 12) for row in batch.documents]
    whole = [row for batch in take(packed(settings(data), micro_batch=6), 30) for row in batch.documents]
    assert sorted(whole) == sorted(seen)


SELECTIVE = {"keep_single_image": 0.2, "max_images": 2, "start": "random", "weight": 1.0}


def test_every_source_gives_its_share_of_what_is_trained_on(data: Path) -> None:
    """Of pairs 80 % are rejected. One window is 4,096 sequences, here in 64 batches of 64 rows."""
    loader = packed(settings(data, source=SELECTIVE, packing="none"), micro_batch=64)
    take(loader, 64)
    found = loader.statistics()
    assert sum(found["samples"].values()) == SLOTS
    assert all(abs(share - 1 / 3) < 1 / SLOTS for share in found["mixture"].values())
    assert found["rejected"]["pairs"]["single_image"] > 3 * SLOTS / 3


def test_a_run_that_draws_anew_resumes_exactly_and_plans_no_window_of_the_past(data: Path) -> None:
    """Stopped in the second window, of 4,096 rows; 1,500 rows a step, whoever reads them."""

    def make(ranks: int, rank: int, num_workers: int) -> Loader:
        chosen = settings(data, source=SELECTIVE, num_workers=num_workers, packing="none")
        return packed(chosen, micro_batch=1500 // ranks, rank=rank, world_size=ranks)

    def documents(batches: list[list[Any]]) -> list[list[list[str]]]:
        return [sorted(row for part in step for row in part.documents) for step in zip(*batches)]

    straight = documents([take(make(1, 0, 0), 4)])
    first = make(1, 0, 2)
    assert documents([consume(first, 3, ahead=0)]) == straight[:3]
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["position"]["window"] == 1
    assert set(state["position"]["redrawn"]) == {"pairs", "pages"}
    for ranks, num_workers in ((1, 0), (1, 3), (3, 0)):
        rest = []
        for rank in range(ranks):
            loader = make(ranks, rank, num_workers)
            loader.load_state_dict(state)
            assert loader.state_dict()["position"] == state["position"]
            rest.append(take(loader, 1))
            assert loader.maker.packer.window.cache_info().misses <= 1  # type: ignore[attr-defined]
        assert documents(rest) == straight[3:]


def aged(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it was saved before rejected documents were replaced."""
    position = {name: value for name, value in state["position"].items() if name != "redrawn"}
    return {**state, "schema": 1, "position": position}


@pytest.mark.parametrize("kind", ["packed", "conditions"])
def test_an_old_state_goes_on_exactly_where_nothing_was_rejected(data: Path, kind: str) -> None:
    def make() -> Loader:
        return packed(settings(data)) if kind == "packed" else conditions(settings(data))

    straight, first = take(make(), 8), make()
    consume(first, 5)
    second = make()
    second.load_state_dict(aged(first.state_dict()))
    assert all(same(a, b) for a, b in zip(straight[5:], take(second, 3), strict=True))


def test_an_old_state_amid_rejected_documents_is_refused_with_the_way_on(data: Path) -> None:
    first = packed(settings(data, source=SELECTIVE))
    consume(first, 5)
    state = aged(first.state_dict())
    second = packed(settings(data, source=SELECTIVE))
    with pytest.raises(UserError, match=r"'single_image': \d+.* data\.allow_data_change=true"):
        second.load_state_dict(state)
    assert second.position == Position()
    allowed = packed(settings(data, source=SELECTIVE, allow_data_change=True))
    allowed.load_state_dict(state)
    assert allowed.position == first.position


def test_the_state_counts_what_was_consumed_not_what_was_fetched(data: Path) -> None:
    loader = conditions(settings(data, num_workers=2), world_size=2)
    consume(loader, 5, ahead=6)
    assert loader.state_dict()["position"] == {"sample": 5 * 8 * 2}
    with pytest.raises(ValueError, match="advance"):
        loader.advance(100)
    loader.advance(2)  # of the six that are open
    assert loader.state_dict()["position"] == {"sample": 7 * 8 * 2}
    loader.close()


def test_the_state_is_small_json_at_any_size() -> None:
    """Three bytes per shard beside a fixed part."""
    from vlgpt.data.sources import DIGEST_BYTES

    assert DIGEST_BYTES * 4 / 3 * 100_000 < 500_000


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    documents = [pair(number) for number in range(60)]
    return write_dataset(tmp_path / "pairs", documents, shard_sizes=[20, 40], tokenizer=TOKENIZER).parent


def test_changed_data_is_refused_by_name_unless_allowed(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = settings(copied, "pairs", features=(), pixels=True, image_size_px=8)
    loader = packed(chosen)
    consume(loader, 3)
    state = loader.state_dict()
    documents = [pair(number) for number in range(60)]
    documents[30] = pair(999)
    write_dataset(copied / "pairs", documents, shard_sizes=[20, 40], tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="shard 00001 of source 'pairs' differs"):
        packed(chosen).load_state_dict(state)
    allowed = packed(chosen.model_copy(update={"allow_data_change": True}))
    allowed.load_state_dict(state)
    assert "shard 00001" in caplog.text
    assert allowed.state_dict()["position"] == state["position"]
    write_dataset(copied / "pairs", documents + [pair(61)], shard_sizes=[20, 40, 1], tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="shard 00001"):
        packed(chosen).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 70}, "sequence_length was 64 and now is 70"),
        ({"seed": 5}, "seed was 4 and now is 5"),
        ({"packing": "none"}, "packing"),
    ],
)
def test_settings_that_move_the_stream_are_refused_by_name(
    data: Path, change: dict[str, Any], named: str
) -> None:
    state = packed(settings(data)).state_dict()
    with pytest.raises(UserError, match=named):
        packed(settings(data, **change)).load_state_dict(state)
    changed = settings(data, source={"image_first": 0.5})
    with pytest.raises(UserError, match=r"pairs\.image_first was 1\.0 and now is 0\.5"):
        packed(changed).load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 3},
        {"kind": "conditions"},
        {"position": {"window": -1, "row": 0, "redrawn": {}}},
        {"position": {"window": "__import__('os').system('true')", "row": 0, "redrawn": {}}},
        {"position": {"window": 0, "row": 0}},
        {"position": {"window": 0, "row": 0, "redrawn": {"pairs": 0.5}}},
        {"position": {"window": 0, "row": 0, "redrawn": [1, 2, 3]}},
        {"position": None},
        {"sources": {}},
        "not a state",
    ],
)
def test_a_damaged_state_is_refused(data: Path, damage: Any) -> None:
    loader = packed(settings(data))
    state = {**loader.state_dict(), **damage} if isinstance(damage, dict) else damage
    with pytest.raises(UserError):
        loader.load_state_dict(state)


def test_ramps_keep_the_length_of_the_run_they_began_with(data: Path) -> None:
    chosen = settings(data, "pairs", "pages")
    ramped = chosen.model_copy(
        update={"sources": (chosen.sources[0], chosen.sources[1].model_copy(update={"ramp": (0.2, 0.6)}))}
    )
    with pytest.raises(UserError, match="run_positions"):
        packed(ramped)
    loader = packed(ramped, run_positions=20_000)
    straight = take(packed(ramped, run_positions=20_000), 30)
    seen = consume(loader, 15)
    longer = packed(ramped, run_positions=90_000)
    longer.load_state_dict(loader.state_dict())
    assert all(same(a, b) for a, b in zip(straight, seen + take(longer, 15), strict=True))


@pytest.mark.parametrize("keep_single_image", [1.0, 0.2])
def test_a_ramped_source_is_absent_at_first_and_present_at_the_end(
    data: Path, keep_single_image: float
) -> None:
    source = {"weight": 0.5, "keep_single_image": keep_single_image}
    chosen = settings(data, "pairs", "pages", source=source)
    late = chosen.sources[1].model_copy(update={"ramp": (0.4, 0.6)})
    ramped = chosen.model_copy(update={"sources": (chosen.sources[0], late)})
    num_rows = 30_000
    loader = packed(ramped, run_positions=num_rows)
    first = take(loader, 5)
    assert all(name.startswith("pair") for batch in first for row in batch.documents for name in row)
    total = loader.state_dict()["total_windows"]
    end = advance(Position(), num_rows, loader.maker)
    assert abs(end.window / total - 1) < 0.25  # the estimate of the run's length in windows


# --- what must not fit is refused at the start


def test_unfitting_data_is_refused_with_the_command_that_mends_it(data: Path, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path / "plain", [pair(0)], shard_sizes=[1])
    with pytest.raises(UserError, match=r"data_prep\.index"):
        take(packed(settings(tmp_path, "plain", features=(), pixels=True)), 1)
    with pytest.raises(UserError, match=r"data_prep\.features"):
        packed(settings(tmp_path, "plain"))
    with pytest.raises(UserError, match=r"data\.pixels"):
        packed(settings(data, features=()))
    with pytest.raises(UserError, match="twice"):
        packed(settings(data, "pairs", "pairs"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        packed(settings(tmp_path, "nowhere"))
    with pytest.raises(UserError, match="tokenizer of the run"):
        packed(settings(data), tokenizer=None)
    with pytest.raises(UserError, match="4 visual embeddings per image, the model has 6"):
        packed(settings(data, features=("visual",)), tokenizer=make_tokenizer(num_visual=6))
    assert plain.exists()


def test_features_made_differently_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [pair(0)], shard_sizes=[1], tokenizer=TOKENIZER)
    write_feature(other, "patches", shape=(4, 2))
    sources = (*settings(data, "pairs").sources, SourceSettings(name="other", path=str(other)))
    with pytest.raises(UserError, match=r"'patches' of source 'other' has shape \(4, 2\)"):
        packed(settings(data, "pairs").model_copy(update={"sources": sources}))


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "empty", [], shard_sizes=[0], tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="'empty' holds no sample"):
        packed(settings(tmp_path, "empty", features=()))


def test_fewer_shards_than_workers_still_feed_all_of_them(copied: Path) -> None:
    chosen = settings(copied, "pairs", features=(), pixels=True, image_size_px=8, num_workers=5)
    batches = take(conditions(chosen), 15)
    assert Counter(name for batch in batches for name in batch.documents).total() == 120
    assert len({name for batch in batches for name in batch.documents}) == 60


@pytest.mark.parametrize(("num_workers", "source"), [(0, {}), (2, {}), (0, {"keep_single_image": 0.2})])
def test_remote_shards_are_fetched_whole_and_give_the_same_batches(
    copied: Path, tmp_path: Path, num_workers: int, source: dict[str, Any]
) -> None:
    options = {"features": (), "pixels": True, "image_size_px": 8, "num_workers": num_workers}
    local = settings(copied, "pairs", source=source, **options)
    far = local.sources[0].model_copy(update={"path": f"file://{copied}/pairs"})
    remote = local.model_copy(update={"sources": (far,), "cache_dir": str(tmp_path / "cache")})
    assert all(same(a, b) for a, b in zip(take(packed(local), 8), take(packed(remote), 8), strict=True))
    originals = {path.name: path.read_bytes() for path in (copied / "pairs").glob("*.tar")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("0*.tar")} == originals


def test_statistics_add_up(data: Path) -> None:
    loader = packed(settings(data, source={"max_images": 1}))
    batches = take(loader, 50)
    found = loader.statistics()
    names = Counter(
        name.rpartition("-")[0] + "s" for batch in batches for row in batch.documents for name in row
    )
    assert found["samples"] == names
    filled = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert sum(found["tokens"].values()) == filled
    assert found["padding_share"] == pytest.approx(1 - filled / (50 * 4 * 64))
    assert found["dropped_images"] > 0
    assert found["bad"] == {}
    assert found["data_wait_s"] > 0
    assert json.dumps(found)
