"""Frechet and kernel distances equal the published implementations; streaming changes nothing."""

import numpy as np
import pytest
from metric_golden import FOLDER, load

from evaluation.metrics import fid
from evaluation.metrics.fid import (
    Moments,
    fid_of_moments,
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
    polynomial_mmd,
)


def golden_features(name):
    if name == "d64":
        arrays = np.load(FOLDER / "fid_d64.npz", allow_pickle=False)
        return arrays["real"], arrays["fake"]
    pair = load("fid")["inputs"][name]
    return np.array(pair["real"], dtype=np.float32), np.array(pair["fake"], dtype=np.float32)


def moments_of(rows, batch=7, **options):
    moments = Moments(rows.shape[1], **options)
    for start in range(0, len(rows), batch):
        moments.update(rows[start : start + batch])
    return moments


@pytest.mark.parametrize("name", ["d8", "d16_same", "d64"])
@pytest.mark.parametrize("source", ["symmetric_eigh", "pytorch_fid_sqrtm", "torch_fidelity", "torchmetrics"])
def test_distance_equals_the_published_implementations(name, source):
    real, fake = golden_features(name)
    expected = load("fid")["expected"][name]
    distance = fid_of_moments(moments_of(real), moments_of(fake))
    assert distance == pytest.approx(expected[source], rel=1e-6, abs=1e-6)
    assert np.trace(moments_of(real).covariance()) == pytest.approx(expected["trace_cov_real"])


def test_mutant_biased_covariance_gives_another_number():
    real, fake = (rows.astype(np.float64) for rows in golden_features("d64"))
    biased = frechet_distance(
        real.mean(0), np.cov(real.T, bias=True), fake.mean(0), np.cov(fake.T, bias=True)
    )
    assert abs(biased - load("fid")["expected"]["d64"]["symmetric_eigh"]) > 1e-3


def test_mutant_mean_of_processes_distances_is_not_the_distance_of_all():
    real, fake = golden_features("d64")
    parts = [frechet_distance_of_features(real, part) for part in (fake[:150], fake[150:])]
    assert abs(np.mean(parts) - load("fid")["expected"]["d64"]["symmetric_eigh"]) > 0.1


def test_batches_order_shift_and_merging_do_not_matter():
    rows = np.random.default_rng(0).normal(1000.0, 1.0, size=(60, 5))
    whole = moments_of(rows, batch=60)
    merged = Moments(5)
    for part in (rows[40:], rows[:3], rows[3:40]):
        merged.merge(moments_of(part, batch=4))
    merged.merge(Moments(5))
    for other in (moments_of(rows[::-1], batch=1), merged, moments_of(rows, shift=np.full(5, 990.0))):
        assert other.num_rows == 60
        np.testing.assert_allclose(other.mean(), whole.mean(), rtol=1e-12)
        np.testing.assert_allclose(other.covariance(), np.cov(rows.T), rtol=1e-9, atol=1e-12)


def test_mutant_unshifted_sums_lose_the_covariance_of_far_features():
    rows = np.random.default_rng(0).normal(1e8, 1.0, size=(200, 3))
    truth = np.cov((rows - 1e8).T)
    naive = (rows.T @ rows - 200 * np.outer(rows.mean(0), rows.mean(0))) / 199
    assert np.abs(naive - truth).max() > 0.1
    np.testing.assert_allclose(moments_of(rows).covariance(), truth, atol=1e-6)


def test_moments_survive_a_file(tmp_path):
    real, fake = golden_features("d8")
    np.savez(tmp_path / "moments.npz", **moments_of(real).to_arrays())
    restored = Moments.from_arrays(dict(np.load(tmp_path / "moments.npz", allow_pickle=False)))
    assert fid_of_moments(restored, moments_of(fake)) == fid_of_moments(moments_of(real), moments_of(fake))


def test_fewer_rows_than_features_agree_on_all_roads():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(10, 30)), rng.normal(0.3, 1.2, size=(12, 30))
    by_rows = frechet_distance_of_features(real, fake)
    by_moments = fid_of_moments(moments_of(real), moments_of(fake))
    assert by_moments == pytest.approx(by_rows, rel=1e-6)
    assert frechet_distance_of_features(real, real) == pytest.approx(0.0, abs=1e-6)


def test_singular_covariance_takes_the_eigenvector_road(monkeypatch):
    real, fake = golden_features("d64")
    regular = fid_of_moments(moments_of(real), moments_of(fake))

    def refuse(matrix):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(fid.np.linalg, "cholesky", refuse)
    assert fid_of_moments(moments_of(real), moments_of(fake)) == pytest.approx(regular, rel=1e-9)
    assert frechet_distance(np.zeros(2), np.diag([1.0, 0.0]), np.zeros(2), np.zeros((2, 2))) == pytest.approx(
        1.0
    )


def test_distance_of_two_lines_is_known_by_hand():
    assert frechet_distance([0.0], [[4.0]], [3.0], [[1.0]]) == pytest.approx(9.0 + 4.0 + 1.0 - 2 * 2.0)


def test_polynomial_mmd_equals_its_double_sum():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 4)), rng.normal(1.0, 1.0, size=(6, 4))

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = [kernel(s[i], s[j]) for s in (x, y) for i in range(6) for j in range(6) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    assert polynomial_mmd(x, y) == pytest.approx(sum(within) / 30 - 2 * sum(between) / 36)


def test_kernel_distance_is_addressed_by_its_seed_and_zero_in_the_mean_for_equal_sources():
    rng = np.random.default_rng(3)
    real, same, other = rng.normal(size=(400, 8)), rng.normal(size=(400, 8)), rng.normal(1, 1, size=(400, 8))
    options = {"num_subsets": 20, "subset_size": 100}
    near, far = (
        kernel_distance(real, same, seed=1, **options),
        kernel_distance(real, other, seed=1, **options),
    )
    assert kernel_distance(real, same, seed=1, **options) == near
    assert kernel_distance(real, same, seed=2, **options) != near
    assert abs(near.mean) < 3 * near.std + 0.05 < far.mean


@pytest.mark.parametrize(
    "call",
    [
        lambda: Moments(0),
        lambda: Moments(2).mean(),
        lambda: Moments(2).update(np.zeros((2, 3))),
        lambda: Moments(2).update(np.full((1, 2), np.nan)),
        lambda: Moments(2).merge(Moments(3)),
        lambda: moments_of(np.zeros((1, 2))).covariance(),
        lambda: frechet_distance([0.0], [[1.0]], [0.0, 1.0], np.eye(2)),
        lambda: kernel_distance(np.zeros((5, 2)), np.zeros((5, 2)), seed=0),
        lambda: frechet_distance_of_features(np.zeros((5, 2)), np.zeros((5, 3))),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
