"""Frechet and kernel distance between feature sets (FID, KID), in float64 numpy.

The distance uses tr sqrt(S1 S2) = sum of square roots of the eigenvalues of L' S2 L with S1 = L L', about
eight times faster at width 2048 than `scipy.linalg.sqrtm`, which pytorch-fid calls in a form that scipy
1.18 removed (`benchmarks/metrics.py` measures it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def moments(features: ArrayLike) -> tuple[Floats, Floats]:
    """Mean and unbiased covariance of feature rows: (n, d) -> (d,), (d, d). Raises ValueError for n < 2."""
    rows = _feature_rows(features, "given")
    # For d = 1 numpy gives a number, not a matrix.
    return rows.mean(axis=0), np.cov(rows, rowvar=False).reshape(rows.shape[1], -1)


def frechet_distance(mean_1: ArrayLike, cov_1: ArrayLike, mean_2: ArrayLike, cov_2: ArrayLike) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)): (d,), (d, d), (d,), (d, d) -> number.

    Source: Heusel et al. 2017, appendix; pytorch-fid `calculate_frechet_distance`. Slightly negative
    values for equal inputs are rounding and kept. Raises ValueError where shapes do not fit.
    """
    m1, m2 = np.asarray(mean_1, dtype=np.float64), np.asarray(mean_2, dtype=np.float64)
    s1, s2 = np.asarray(cov_1, dtype=np.float64), np.asarray(cov_2, dtype=np.float64)
    if m1.ndim != 1 or m1.shape != m2.shape or s1.shape != (len(m1), len(m1)) or s2.shape != s1.shape:
        raise ValueError(
            f"means {m1.shape}, {m2.shape} and covariances {s1.shape}, {s2.shape} do not fit together"
        )
    trace_of_root = _sum_of_roots(_left_root(s1), s2)
    difference = m1 - m2
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * trace_of_root)


def _left_root(covariance: Floats) -> Floats:
    """R with R R' = S: (d, d) -> (d, d)."""
    # Cholesky is the cheaper root but fails where S is singular (fewer rows than features); any root gives
    # the same eigenvalues of R' S2 R.
    try:
        return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0.0))


def _sum_of_roots(root: Floats, covariance: Floats) -> float:
    # Rounding makes the product slightly asymmetric and its zero eigenvalues slightly negative.
    inner = root.T @ covariance @ root
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0.0)).sum())


def frechet_distance_of_features(real: ArrayLike, fake: ArrayLike) -> float:
    """Frechet distance straight from rows: (n1, d), (n2, d) -> number.

    With fewer rows than features, tr sqrt(S1 S2) is the sum of singular values of the small matrix X1 X2'
    of centred rows, so nothing of size d x d is formed. Raises ValueError for other shapes or fewer than
    two rows.
    """
    x1, x2 = _feature_rows(real, "real"), _feature_rows(fake, "fake")
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(f"real features have width {x1.shape[1]} but fake ones {x2.shape[1]}")
    if min(len(x1), len(x2)) >= x1.shape[1]:
        return frechet_distance(*moments(x1), *moments(x2))
    difference = x1.mean(axis=0) - x2.mean(axis=0)
    c1 = (x1 - x1.mean(axis=0)) / np.sqrt(len(x1) - 1)
    c2 = (x2 - x2.mean(axis=0)) / np.sqrt(len(x2) - 1)
    trace_of_root = np.linalg.svd(c1 @ c2.T, compute_uv=False).sum()
    return float(difference @ difference + (c1**2).sum() + (c2**2).sum() - 2 * trace_of_root)


def _feature_rows(features: ArrayLike, name: str) -> Floats:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"{name} features have shape {rows.shape}; wanted (n, d) with n >= 2")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} features hold NaN or infinity")
    return rows


@dataclass(frozen=True)
class Kid:
    """Kernel distance over random subsets; papers often print it times 1000."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kernel_distance(
    real: ArrayLike, fake: ArrayLike, *, seed: int, num_subsets: int = 100, subset_size: int = 1000
) -> Kid:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, mean and std over subsets (Binkowski et al. 2018).

    Defaults and drawing follow torch-fidelity, whose own seed is 2020. Raises ValueError where a set has
    fewer rows than `subset_size` or that is below 2.
    """
    x1, x2 = _feature_rows(real, "real"), _feature_rows(fake, "fake")
    if not 2 <= subset_size <= min(len(x1), len(x2)):
        raise ValueError(
            f"subset_size is {subset_size} for {len(x1)} real and {len(x2)} fake rows; wanted 2 to the least"
        )
    # UPSTREAM: torch-fidelity metric_kid.py draws with this legacy generator, real rows before fake ones.
    generator = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        rows_1 = x1[generator.choice(len(x1), subset_size, replace=False)]
        rows_2 = x2[generator.choice(len(x2), subset_size, replace=False)]
        values.append(polynomial_mmd(rows_1, rows_2))
    return Kid(float(np.mean(values)), float(np.std(values)), num_subsets, subset_size)


def polynomial_mmd(first: Floats, second: Floats) -> float:
    """Unbiased squared MMD of two sets of the same size, kernel (x.y / d + 1)^3: (m, d), (m, d) -> number."""
    num_rows, width = first.shape
    within = 0.0
    for rows in (first, second):
        kernel = (rows @ rows.T / width + 1.0) ** 3
        # Without the diagonal the estimate is unbiased: a row always equals itself (Gretton et al. 2012).
        within += float(kernel.sum() - np.trace(kernel))
    between = float(((first @ second.T / width + 1.0) ** 3).sum())
    return within / (num_rows * (num_rows - 1)) - 2 * between / num_rows**2
