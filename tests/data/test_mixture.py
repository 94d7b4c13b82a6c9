"""Laws of the stream: exact weights, every sample once per epoch, any position at once."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlgpt.data.mixture import (
    SLOTS,
    Mixture,
    OnePass,
    SourceOrder,
    base_weights,
    quotas,
    ramp_factors,
)
from vlgpt.errors import UserError
from vlgpt.settings import DataSettings, SourceSettings


def order(name: str, counts: list[int], *, seed: int = 1, shuffle_shards: int = 2) -> SourceOrder:
    return SourceOrder(name, seed=seed, counts=np.array(counts), shuffle_shards=shuffle_shards)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    shuffle_shards=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_gives_every_sample_exactly_once(counts: list[int], shuffle_shards: int, epoch: int) -> None:
    source = order("a", counts, shuffle_shards=shuffle_shards)
    total = sum(counts)
    shard, sample = source.locate(epoch * total + np.arange(total))
    found = sorted(zip(shard.tolist(), sample.tolist()))
    assert found == [(i, j) for i, count in enumerate(counts) for j in range(count)]


def test_draws_do_not_depend_on_how_they_are_asked_for() -> None:
    source, again = order("a", [5, 0, 7, 3, 9]), order("a", [5, 0, 7, 3, 9])
    draws = np.arange(100)
    together = np.stack(source.locate(draws))
    backwards = np.stack([np.concatenate(again.locate(np.array([k]))) for k in draws[::-1]])[::-1].T
    assert (together == backwards).all()


def test_every_epoch_seed_and_source_has_another_order() -> None:
    for counts in ([40, 40, 40], [120]):  # in one shard only the samples can change places
        orders = [order("a", counts), order("b", counts), order("a", counts, seed=2)]
        sequences = [
            tuple(map(tuple, np.stack(o.locate(e * 120 + np.arange(120))).T)) for o in orders for e in (0, 1)
        ]
        assert len(set(sequences)) == len(sequences)


def test_samples_come_from_at_most_a_block_of_shards_at_a_time() -> None:
    source = order("a", [10] * 40, shuffle_shards=4)
    shard, _ = source.locate(np.arange(400))
    for start in range(0, 400, 40):
        assert len(set(shard[start : start + 40].tolist())) == 4


@given(weights=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_quotas_are_exact_within_one_slot(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    found = quotas(shares[None])[0]
    assert found.sum() == SLOTS
    assert (np.abs(found - shares * SLOTS) < 1).all()


def test_a_small_source_gets_a_slot_before_larger_ones_are_rounded_up() -> None:
    found = quotas(np.array([[2048.6, 2047.28, 0.12]]))[0]
    assert found.tolist() == [2048, 2047, 1]


def mixture(weights: list[float], **options: object) -> Mixture:
    orders = [order(f"s{i}", [100 + i, 50], shuffle_shards=8) for i in range(len(weights))]
    return Mixture(orders, seed=5, weights=np.array(weights) / sum(weights), **options)  # type: ignore[arg-type]


def test_every_window_holds_every_source_by_its_weight() -> None:
    stream = mixture([0.5, 0.3, 0.2])
    for window in (0, 1, 7, 10**9):
        counts = np.bincount(stream.slots(window).source, minlength=3)
        assert (np.abs(counts / SLOTS - [0.5, 0.3, 0.2]) < 1 / SLOTS).all()


def test_every_draw_has_random_numbers_of_its_own() -> None:
    """Also those in place of rejected draws, at every attempt: under an old key they would meet the same verdict."""
    stream, source = mixture([0.5, 0.5]), np.zeros(500, np.int64)
    keys = [stream.slots(window).key for window in (3, 4)]
    for window, attempt in ((3, 1), (3, 2), (3, 3), (4, 1)):
        keys.append(stream.redraw(window, source, redrawn=(0, 0), attempt=attempt).key)
    everything = np.concatenate(keys)
    assert len(np.unique(everything)) == len(everything)


def test_sources_are_spread_evenly_inside_a_window() -> None:
    """Chi-square of source against quarter of the window, over 25 windows: 102,400 draws."""
    stream = mixture([0.5, 0.3, 0.2])
    table = np.zeros((4, 3))
    for window in range(25):
        quarters = stream.slots(window).source.reshape(4, -1)
        table += np.stack([np.bincount(quarter, minlength=3) for quarter in quarters])
    expected = table.sum(axis=0) / 4
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 22.46  # p = 0.001 with 6 degrees of freedom


def test_a_source_goes_on_through_windows_without_gap_or_repeat() -> None:
    stream = mixture([0.5, 0.3, 0.2])
    for source, size in enumerate([150, 151, 152]):
        found: Counter[tuple[int, int]] = Counter()
        for window in range(3):
            slots = stream.slots(window)
            at = slots.source == source
            found.update(zip(slots.shard[at].tolist(), slots.sample[at].tolist()))
        num_draws = int(stream.draws_before(3)[source])
        assert len(found) == size
        assert set(found.values()) <= {num_draws // size, -(-num_draws // size)}


def test_a_ramp_grows_the_weight_and_draws_stay_contiguous() -> None:
    stream = mixture([0.6, 0.4], ramps=[(0.0, 0.0), (0.25, 0.75)], total_windows=100)
    counts = np.array([np.bincount(stream.slots(w).source, minlength=2) for w in range(100)])
    late = counts[:, 1] / SLOTS
    assert (late[:26] == 0).all()
    assert (np.diff(late[25:75]) > 0).all()
    assert np.abs(late[75:] - 0.4).max() < 1 / SLOTS
    assert (stream.draws_before(100) == counts.sum(axis=0)).all()
    assert (stream.draws_before(60) == counts[:60].sum(axis=0)).all()
    middle = 0.5 * 0.4 / (0.6 + 0.5 * 0.4)
    assert abs(late[50] - middle) < 1 / SLOTS


def test_a_ramp_needs_the_length_of_the_run_and_something_to_start_with() -> None:
    with pytest.raises(UserError, match="length of the run"):
        mixture([1.0, 1.0], ramps=[(0.0, 0.0), (0.0, 0.5)])
    with pytest.raises(UserError, match="without data"):
        mixture([1.0, 1.0], ramps=[(0.0, 0.5), (0.2, 0.5)], total_windows=10)


def test_a_weight_too_small_for_a_slot_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="s2"):
        mixture([1.0, 1e-5, 1e-5, 1e-5])


def test_weights_by_size_by_number_and_by_temperature() -> None:
    def weights(given: list[float | str], **options: object) -> np.ndarray:
        sources = tuple(SourceSettings(name=f"s{i}", path="x", weight=w) for i, w in enumerate(given))  # type: ignore[arg-type]
        return base_weights(DataSettings(sources=sources, **options), [300, 100])  # type: ignore[arg-type]

    assert np.allclose(weights(["size", "size"]), [0.75, 0.25])
    assert np.allclose(weights([1.0, 3.0]), [0.25, 0.75])
    tempered = weights(["size", "size"], mixing="temperature", temperature=2.0)
    assert np.allclose(tempered, np.sqrt([300, 100]) / np.sqrt([300, 100]).sum())
    assert np.allclose(weights([0.0, 2.0], mixing="temperature", temperature=5.0), [0, 1])
    with pytest.raises(UserError, match="s0"):
        weights(["size", 1.0])
    with pytest.raises(UserError, match="every weight is 0"):
        weights([0.0, 0.0])


def test_ramp_factors_are_steps_when_both_ends_agree() -> None:
    factors = ramp_factors([(0.5, 0.5), (0.0, 0.0)], np.array([0.0, 0.49, 0.5, 0.51, 1.0]))
    assert factors[:, 0].tolist() == [0, 0, 0, 1, 1]
    assert (factors[:, 1] == 1).all()


def test_one_pass_gives_everything_once_in_order() -> None:
    stream = OnePass([np.array([3000, 0, 2000]), np.array([1500])], seed=1)
    slots = [stream.slots(window) for window in range(stream.num_windows or 0)]
    assert [len(s) for s in slots] == [SLOTS, 2404]
    places = np.concatenate([np.stack([s.source, s.shard, s.sample]) for s in slots], axis=1).T.tolist()
    wanted = (
        [[0, 0, i] for i in range(3000)] + [[0, 2, i] for i in range(2000)] + [[1, 0, i] for i in range(1500)]
    )
    assert places == wanted


def test_a_position_far_out_in_100k_shards_needs_little_memory_and_no_replay() -> None:
    """1,024 ranks with 8 workers each would ask for just this; the time is printed by
    benchmarks/loader.py.
    """
    tracemalloc.start()
    rng = np.random.default_rng(0)
    orders = [
        SourceOrder(name, seed=1, counts=rng.integers(5_000, 10_001, 100_000), shuffle_shards=16)
        for name in ("laion", "mmc4")
    ]
    stream = Mixture(orders, seed=1, weights=np.array([0.5, 0.5]))
    slots = stream.slots(700_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(zip(slots.source.tolist(), slots.shard.tolist()))) <= 4 * 16
    assert peak < 60e6
