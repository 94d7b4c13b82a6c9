"""Laws of packing: no row overflows, nothing is lost or repeated, and hardly a position is wasted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.small_data import WORDS, lengths_of, make_tokenizer
from vlgpt.data.assemble import Assembler
from vlgpt.data.mixture import SLOTS, Mixture, SourceOrder
from vlgpt.data.packing import Packer, best_fit
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.seeds import generator
from vlgpt.settings import SourceSettings


@given(lengths=st.lists(st.integers(1, 64), max_size=300))
@settings(max_examples=150, deadline=None)
def test_rows_never_overflow_and_hold_everything_once(lengths: list[int]) -> None:
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity=64)
    assert len(rows) == len(lengths)
    filled = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
    assert (filled <= 64).all()
    assert (filled > 0).all()


@given(lengths=st.lists(st.integers(1, 64), min_size=2, max_size=300))
@settings(max_examples=100, deadline=None)
def test_no_row_could_have_joined_another(lengths: list[int]) -> None:
    """Best fit opens a row only when nothing else has room: two rows at most half full cannot exist."""
    filled = np.bincount(best_fit(np.array(lengths), capacity=64), weights=lengths)
    assert (filled <= 32).sum() <= 1


def test_a_sequence_goes_into_the_fullest_row_with_room() -> None:
    assert best_fit(np.array([60, 57, 4, 7]), capacity=64).tolist() == [0, 1, 0, 1]
    # both rows have room for the last one: 5 and 10 positions
    assert best_fit(np.array([59, 54, 4]), capacity=64).tolist() == [0, 1, 0]


def test_a_sequence_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="65"):
        best_fit(np.array([3, 65]), capacity=64)


def caption_pair(number: int) -> Document:
    """As long as LAION's captions with 32 visual embeddings: 40 to 110 positions, rarely more."""
    num_words = int(np.clip(generator("caption", number).lognormal(2.9, 0.6), 3, 300))
    return Document(str(number), "laion", (ImagePart(0), TextPart(" ".join(WORDS[:1] * num_words))))


def web_page(number: int) -> Document:
    """As MMC4's core pages: a few images among sentences, hundreds to thousands of tokens."""
    rng = generator("page", number)
    parts: list[Part] = []
    for image in range(int(rng.integers(2, 7))):
        parts.append(ImagePart(image))
        parts += [
            TextPart(" ".join(WORDS[:1] * int(rng.integers(8, 45)))) for _ in range(int(rng.integers(1, 7)))
        ]
    return Document(str(number), "mmc4", tuple(parts))


@pytest.fixture(scope="module")
def packers() -> dict[str, Packer]:
    tokenizer = make_tokenizer(num_visual=32)
    lengths = []
    for make in (caption_pair, web_page):
        lengths.append(lengths_of([make(number) for number in range(1500)], tokenizer))
    orders = [SourceOrder(n, seed=1, counts=np.array([1500]), shuffle_shards=16) for n in ("laion", "mmc4")]
    sources = [SourceSettings(name="laion", path="x"), SourceSettings(name="mmc4", path="x", start="random")]
    assemblers = [Assembler(source, tokenizer=tokenizer, sequence_length=512) for source in sources]

    def packer(packing: str) -> Packer:
        return Packer(
            Mixture(orders, seed=1, weights=np.array([0.5, 0.5])),
            seed=1,
            assemblers=assemblers,
            lengths=lambda source, shard: lengths[source],
            packing=packing,  # type: ignore[arg-type]
            sequence_length=512,
        )

    return {packing: packer(packing) for packing in ("best_fit", "none")}


def padding_share(packer: Packer, windows: int = 3) -> float:
    plans = [packer.window(window) for window in range(windows)]
    filled = sum(int(plan.length.sum()) for plan in plans)
    return 1 - filled / (512 * sum(plan.num_rows for plan in plans))


def test_a_mixture_of_pairs_and_pages_wastes_under_three_per_cent(packers: dict[str, Packer]) -> None:
    packed, plain = padding_share(packers["best_fit"]), padding_share(packers["none"])
    assert packed < 0.03
    assert plain > 0.4


def test_the_rows_of_a_window_hold_every_accepted_slot_once(packers: dict[str, Packer]) -> None:
    for packer in packers.values():
        plan = packer.window(4)
        members = [slot for row in range(plan.num_rows) for slot in plan.row(row)]
        assert sorted(members) == np.flatnonzero(plan.length).tolist()
        assert len(members) == SLOTS
        assert all(plan.row(row) == sorted(plan.row(row)) for row in range(plan.num_rows))


def test_without_packing_every_row_is_one_sequence(packers: dict[str, Packer]) -> None:
    plan = packers["none"].window(0)
    assert all(len(plan.row(row)) == 1 for row in range(plan.num_rows))


def test_a_window_is_planned_alike_whatever_was_planned_before(packers: dict[str, Packer]) -> None:
    packer = packers["best_fit"]
    early = packer.window(9).members.tolist()
    packer.window.cache_clear()
    for window in (3, 10, 2):
        packer.window(window)
    assert packer.window(9).members.tolist() == early
    assert packer.window(10).members.tolist() != early


def test_long_and_short_rows_are_mixed(packers: dict[str, Packer]) -> None:
    """Longest-first packing would otherwise put all pages first and all pairs last."""
    plan = packers["best_fit"].window(0)
    share = [
        np.mean([plan.slots.source[slot] == 1 for slot in plan.row(row)]) for row in range(plan.num_rows)
    ]
    halves = np.array_split(np.array(share), 2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.06
