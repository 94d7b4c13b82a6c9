"""VisDial ranks, sparse scores and NDCG, as in the challenge's starter code (visdialch/metrics.py).

Two gaps of the original are closed: equal scores rank by option index (the original's sort is not stable),
and a round without any relevant option, where NDCG is 0 / 0, is counted and left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class SparseScores:
    """Recall and mean reciprocal rank as fractions, mean rank in ranks (1 is best)."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mean_rank: float
    mean_reciprocal_rank: float
    num_rounds: int


@dataclass(frozen=True)
class NdcgScores:
    """Mean NDCG as a fraction; `per_round` holds nan where no option is relevant."""

    ndcg: float
    num_rounds: int
    num_undefined: int
    per_round: list[float] = field(repr=False)


def ranks_of(scores: ArrayLike) -> NDArray[np.int64]:
    """Rank of every option, 1 for the highest score, equal scores by option index: (rounds, options) -> same.

    Ranks, not an argsort: entry i says at which place option i comes. Raises ValueError for NaN or wrong shapes.
    """
    values = _score_matrix(scores)
    best_first = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(best_first)
    np.put_along_axis(ranks, best_first, np.arange(1, values.shape[1] + 1)[None], axis=1)
    return ranks


def sparse_scores(scores: ArrayLike, gt_index: ArrayLike) -> SparseScores:
    """Scores against the one human answer of each round: (rounds, options), (rounds,).

    Raises ValueError where lengths differ or an index is not an option.
    """
    values = _score_matrix(scores)
    truth = np.asarray(gt_index)
    if truth.shape != (len(values),):
        raise ValueError(
            f"gt_index has shape {truth.shape}; wanted ({len(values)},), one option index per round"
        )
    if truth.size and (truth.min() < 0 or truth.max() >= values.shape[1]):
        raise ValueError(
            f"gt_index goes from {truth.min()} to {truth.max()}; options are 0..{values.shape[1] - 1}"
        )
    # The rank is the number of higher scores, so the 100 options need no sorting.
    own = values[np.arange(len(values)), truth][:, None]
    rank = 1 + np.count_nonzero(values > own, axis=1)
    ties = np.flatnonzero(np.count_nonzero(values == own, axis=1) > 1)
    if len(ties):
        is_earlier = np.arange(values.shape[1])[None] < truth[ties, None]
        rank[ties] += np.count_nonzero((values[ties] == own[ties]) & is_earlier, axis=1)
    return SparseScores(
        recall_at_1=float((rank <= 1).mean()),
        recall_at_5=float((rank <= 5).mean()),
        recall_at_10=float((rank <= 10).mean()),
        mean_rank=float(rank.mean()),
        mean_reciprocal_rank=float((1.0 / rank).mean()),
        num_rounds=len(rank),
    )


def ndcg_scores(scores: ArrayLike, relevance: ArrayLike) -> NdcgScores:
    """NDCG at k = number of relevant options, of the rounds that have dense annotations.

    Gain is the relevance itself, discount log2(place + 1). A round without a relevant option is left out of
    the mean; in the original it makes the mean nan. Raises ValueError where the shapes differ.
    """
    values = _score_matrix(scores)
    gains = np.asarray(relevance, dtype=np.float64)
    if gains.shape != values.shape:
        raise ValueError(f"relevance has shape {gains.shape} but scores {values.shape}; wanted the same")
    num_relevant = (gains != 0).sum(axis=1)
    num_undefined = int((num_relevant == 0).sum())
    places = np.arange(values.shape[1])
    discount = (places[None] < num_relevant[:, None]) / np.log2(places + 2.0)
    by_score = np.take_along_axis(gains, np.argsort(-values, axis=1, kind="stable"), axis=1)
    by_gain = -np.sort(-gains, axis=1)
    ideal = (by_gain * discount).sum(axis=1)
    per_round = np.divide(
        (by_score * discount).sum(axis=1), ideal, out=np.full(len(values), np.nan), where=ideal != 0
    )
    defined = per_round[num_relevant > 0]
    mean = float(defined.mean()) if len(defined) else float("nan")
    return NdcgScores(mean, len(per_round), num_undefined, per_round.tolist())


def submission_record(image_id: int, round_id: int, scores: Sequence[float]) -> dict[str, object]:
    """One entry of the challenge's file. `round_id` counts from 1. Raises ValueError where it does not."""
    if round_id < 1:
        raise ValueError(f"round_id is {round_id}; the challenge counts rounds from 1")
    return {"image_id": image_id, "round_id": round_id, "ranks": ranks_of([scores])[0].tolist()}


def _score_matrix(scores: ArrayLike) -> NDArray[np.floating]:
    values = np.asarray(scores)
    # float32 stays: it keeps its order and half the memory of 20,640 rounds x 100 options.
    if values.dtype != np.float32:
        values = values.astype(np.float64, copy=False)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"scores have shape {values.shape}; wanted (rounds, options), neither of them 0")
    if np.isnan(values).any():
        row = int(np.argmax(np.isnan(values).any(axis=1)))
        raise ValueError(f"scores of row {row} hold NaN; every option needs a number to be ranked")
    return values
