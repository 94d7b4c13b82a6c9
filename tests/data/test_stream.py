"""Law of the position: a run may be stopped anywhere and cut anew into ranks, workers and micro-batches.

No process is started here: a rank and a worker are nothing but numbers, so all of them can be asked in turn.
What is checked is the real plan of more than 20,000 documents, mixed and packed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np
import pytest

from tests.helpers.small_data import chat, make_tokenizer, page, pair
from vlgpt.data.assemble import Assembler, ShardLengths
from vlgpt.data.mixture import Mixture, OnePass, SlotPlan, SourceOrder
from vlgpt.data.packing import Packer
from vlgpt.data.stream import Position, RowMaker, batches_of_worker, rows_of_rank
from vlgpt.seeds import generator
from vlgpt.settings import SourceSettings
from vlgpt.shards import ShardIndex
from vlgpt.shards.index import IndexBuilder

SIZES = {"pairs": [2500, 0, 2500, 2500, 2500], "pages": [3000, 3000], "chats": [1, 4999]}
LAYOUTS = [(3, 2), (5, 1), (1, 4), (2, 3), (7, 1), (1, 0)]  # ranks x workers; 0 workers = in the main process


class PlanMaker(RowMaker):
    """What a stream of rows needs to know of them, without reading what stands there."""

    def __init__(self, packer: Packer):
        self.packer, self.plan = packer, packer.plan

    def documents(self, row: Position) -> list[tuple[int, int, int]]:
        """(source, shard, sample) of a row."""
        window = self.window(row)
        slots = window.slots
        return [
            (int(slots.source[i]), int(slots.shard[i]), int(slots.sample[i])) for i in window.row(row.row)
        ]


def columns_of(index: ShardIndex, samples: np.ndarray) -> ShardIndex:
    """The index of a shard that holds these samples of another one, in this order."""
    counts = np.diff(index.part_start)[samples]
    parts = (
        np.concatenate([np.arange(*index.part_start[[i, i + 1]]) for i in samples]) if len(samples) else []
    )
    parts = np.asarray(parts, dtype=np.int64)
    return replace(
        index,
        keys=index.keys[samples],
        part_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        part_is_image=index.part_is_image[parts],
        part_role=index.part_role[parts],
        part_tokens=index.part_tokens[parts],
    )


@cache
def shard_lengths() -> dict[tuple[int, int], ShardLengths]:
    """Part lengths of every shard: 300 real documents per source, again and again in other places."""
    tokenizer = make_tokenizer()
    lengths: dict[tuple[int, int], ShardLengths] = {}
    for s, (name, make) in enumerate({"pairs": pair, "pages": page, "chats": chat}.items()):
        builder = IndexBuilder(tokenizer)
        for number in range(300):
            builder.add(f"{name}-{number}", make(number), [])
        index = builder.build(tar_sha256="")
        for shard, size in enumerate(SIZES[name]):
            picked = columns_of(index, (31 * shard + np.arange(size)) % 300)
            lengths[s, shard] = ShardLengths(picked, image_length=tokenizer.image_length)
    return lengths


def make_packer(plan: SlotPlan | None = None) -> Packer:
    tokenizer, lengths = make_tokenizer(), shard_lengths()
    orders = [SourceOrder(n, seed=3, counts=np.array(c), shuffle_shards=2) for n, c in SIZES.items()]
    options = {"image_first": 0.5, "max_images": 3, "start": "random", "keep_single_image": 0.9}
    sources = [SourceSettings(name=name, path="x", **options) for name in SIZES]  # type: ignore[arg-type]
    return Packer(
        plan or Mixture(orders, seed=3, weights=np.array([0.5, 0.25, 0.25])),
        seed=3,
        assemblers=[Assembler(source, tokenizer=tokenizer, sequence_length=128) for source in sources],
        lengths=lambda source, shard: lengths[source, shard],
        packing="best_fit",
        sequence_length=128,
    )


@pytest.fixture(scope="module")
def maker() -> PlanMaker:
    return PlanMaker(make_packer())


def global_batches(
    maker: PlanMaker, start: Position, *, ranks: int, workers: int, micro_batch: int
) -> Iterator[tuple[list[Position], Position]]:
    """What all ranks get step by step: worker w of each rank makes every workers-th batch, as in the real
    loader.
    """
    num_workers = max(workers, 1)
    made = [
        [
            batches_of_worker(
                maker,
                start,
                micro_batch=micro_batch,
                rank=rank,
                world_size=ranks,
                worker=worker,
                num_workers=num_workers,
            )
            for worker in range(num_workers)
        ]
        for rank in range(ranks)
    ]
    number = 0
    while True:
        parts = [next(of_rank[number % num_workers], None) for of_rank in made]
        if parts[0] is None:
            assert all(part is None for part in parts)
            return
        ends = {end for _, end in parts}  # type: ignore[misc]
        assert len(ends) == 1
        rows = [row for part, _ in parts for row in part if row is not None]  # type: ignore[misc]
        yield rows, ends.pop()
        number += 1


def stream_rows(maker: PlanMaker, start: Position, num_rows: int) -> list[Position]:
    """The uninterrupted stream."""
    rows: list[Position] = []
    while len(rows) < num_rows:
        rows += [start._replace(row=row) for row in range(start.row, maker.num_rows(start))]
        start = maker.next_window(start)
    return rows[:num_rows]


def test_a_stop_anywhere_and_any_new_layout_lose_and_repeat_nothing(maker: PlanMaker) -> None:
    """10 random stops of a 3 x 2 run, each resumed at 6 layouts; micro-batches of 1 to 4 rows."""
    wanted = stream_rows(maker, Position(), 6_000)
    assert sum(len(maker.documents(row)) for row in wanted) > 20_000
    assert min(wanted[-1].redrawn[:2]) > 50  # pairs and pages were rejected and drawn anew
    rng = generator("stops")
    for stop in sorted(rng.choice(np.arange(1, 500), size=10, replace=False).tolist()):
        steps = list(islice(global_batches(maker, Position(), ranks=3, workers=2, micro_batch=4), stop))
        consumed, end = [row for rows, _ in steps for row in rows], steps[-1][1]
        for ranks, workers in LAYOUTS:
            micro_batch = int(rng.integers(1, 5))
            size = ranks * micro_batch
            num_steps = -(-(len(wanted) - len(consumed)) // size)
            resumed = global_batches(maker, end, ranks=ranks, workers=workers, micro_batch=micro_batch)
            rest = [row for rows, _ in islice(resumed, num_steps) for row in rows]
            found, expected = Counter(consumed + rest), Counter(wanted)
            extra = num_steps * size - (len(wanted) - len(consumed))
            assert expected - found == Counter()
            assert (found - expected).total() == extra < size


def test_global_batches_are_equal_when_their_size_is(maker: PlanMaker) -> None:
    start = Position(2, 17)
    by_layout = [
        [
            sorted(rows)
            for rows, _ in islice(global_batches(maker, start, ranks=r, workers=w, micro_batch=12 // r), 300)
        ]
        for r, w in [(3, 2), (1, 4), (2, 3), (6, 1), (12, 1), (1, 0), (4, 5)]
    ]
    assert all(batches == by_layout[0] for batches in by_layout[1:])


def test_a_far_position_is_reached_without_passing_the_others(maker: PlanMaker) -> None:
    before = maker.packer.window.cache_info().misses
    far = Position(10**6, 5, (10**8, 10**7, 3))
    rows = rows_of_rank(far, maker, micro_batch=2, rank=0, world_size=1)
    assert rows == [far, far._replace(row=6)]
    assert maker.packer.window.cache_info().misses - before == 1


def test_a_global_batch_larger_than_a_window_takes_from_several(maker: PlanMaker) -> None:
    size = int(2.5 * maker.num_rows(Position()))
    (rows, end), *_ = islice(global_batches(maker, Position(), ranks=5, workers=2, micro_batch=size // 5), 1)
    assert sorted(rows) == sorted(stream_rows(maker, Position(), size // 5 * 5))
    assert end.window >= 2


@pytest.mark.parametrize(("ranks", "workers", "micro_batch"), [(1, 0, 7), (3, 2, 4), (5, 3, 64)])
def test_one_pass_gives_every_document_once_and_every_rank_as_many_batches(
    ranks: int, workers: int, micro_batch: int
) -> None:
    plan = OnePass([np.array(counts) for counts in SIZES.values()], seed=3)
    maker = PlanMaker(make_packer(plan))
    steps = global_batches(maker, Position(), ranks=ranks, workers=workers, micro_batch=micro_batch)
    places = Counter(document for rows, _ in steps for row in rows for document in maker.documents(row))
    rejected = sum(sum(maker.packer.window(w).rejected.values()) for w in range(plan.num_windows or 0))
    assert set(places.values()) == {1}
    assert len(places) + rejected == plan.num_samples == 21_000
