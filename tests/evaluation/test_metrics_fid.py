"""Frechet and kernel distances equal the published implementations."""

import numpy as np
import pytest

from evaluation.metrics import fid
from evaluation.metrics.fid import (
    frechet_distance,
    frechet_distance_of_features,
    kernel_distance,
    moments,
    polynomial_mmd,
)
from tests.helpers.metric_golden import FOLDER, load


def golden_features(name):
    if name == "d64":
        arrays = np.load(FOLDER / "fid_d64.npz", allow_pickle=False)
        return arrays["real"], arrays["fake"]
    pair = load("fid")["inputs"][name]
    return np.array(pair["real"], dtype=np.float32), np.array(pair["fake"], dtype=np.float32)


def distance_of_moments(real, fake):
    return frechet_distance(*moments(real), *moments(fake))


@pytest.mark.parametrize("name", ["d8", "d16_same", "d64"])
@pytest.mark.parametrize("source", ["symmetric_eigh", "pytorch_fid_sqrtm", "torch_fidelity", "torchmetrics"])
def test_distance_equals_the_published_implementations(name, source):
    real, fake = golden_features(name)
    expected = load("fid")["expected"][name]
    distance = distance_of_moments(real, fake)
    assert distance == pytest.approx(expected[source], rel=1e-6, abs=1e-6)
    assert np.trace(moments(real)[1]) == pytest.approx(expected["trace_cov_real"])


def test_features_far_from_zero_keep_their_covariance():
    """Sums of products that are not shifted would lose it."""
    rows = np.random.default_rng(0).normal(1e8, 1.0, size=(200, 3))
    np.testing.assert_allclose(moments(rows)[1], np.cov((rows - 1e8).T), atol=1e-6)


def test_fewer_rows_than_features_agree_on_all_roads():
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(10, 30)), rng.normal(0.3, 1.2, size=(12, 30))
    by_rows = frechet_distance_of_features(real, fake)
    by_moments = distance_of_moments(real, fake)
    assert by_moments == pytest.approx(by_rows, rel=1e-6)
    assert frechet_distance_of_features(real, real) == pytest.approx(0.0, abs=1e-6)


def test_singular_covariance_takes_the_eigenvector_road(monkeypatch):
    real, fake = golden_features("d64")
    regular = distance_of_moments(real, fake)

    def refuse(matrix):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(fid.np.linalg, "cholesky", refuse)
    assert distance_of_moments(real, fake) == pytest.approx(regular, rel=1e-9)
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
        lambda: moments(np.zeros((1, 2))),
        lambda: moments(np.full((2, 2), np.nan)),
        lambda: frechet_distance([0.0], [[1.0]], [0.0, 1.0], np.eye(2)),
        lambda: kernel_distance(np.zeros((5, 2)), np.zeros((5, 2)), seed=0),
        lambda: frechet_distance_of_features(np.zeros((5, 2)), np.zeros((5, 3))),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
