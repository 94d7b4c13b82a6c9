"""VisDial ranks, sparse scores and NDCG equal the challenge code; ties and empty rounds are defined."""

import math

import numpy as np
import pytest

from evaluation.metrics.visdial import ndcg_scores, ranks_of, sparse_scores, submission_record
from tests.helpers.metric_golden import load


@pytest.fixture(scope="module")
def golden():
    return load("visdial")


def test_ranks_and_ndcg_equal_the_challenge_code(golden):
    inputs, expected = golden["inputs"], golden["expected"]
    assert ranks_of(inputs["scores"]).tolist() == expected["ranks"]
    result = ndcg_scores(inputs["scores"], inputs["relevance"])
    assert result.per_round == pytest.approx(expected["ndcg_per_round"], abs=1e-6)
    assert result.ndcg == pytest.approx(np.mean(expected["ndcg_per_round"]), abs=1e-6)


def test_sparse_scores_follow_from_the_golden_ranks(golden):
    truth = golden["inputs"]["gt_index"]
    own = [ranks[index] for ranks, index in zip(golden["expected"]["ranks"], truth)]
    result = sparse_scores(golden["inputs"]["scores"], truth)
    assert result.mean_rank == pytest.approx(np.mean(own))
    assert result.mean_reciprocal_rank == pytest.approx(np.mean([1 / rank for rank in own]))
    assert result.recall_at_5 == pytest.approx(np.mean([rank <= 5 for rank in own]))


def test_equal_scores_rank_by_option_index():
    assert ranks_of([[1.0, 2.0, 1.0, 2.0]]).tolist() == [[3, 1, 4, 2]]
    assert sparse_scores([[1.0, 2.0, 1.0, 2.0]], [3]).mean_rank == 2
    assert sparse_scores([[0.0] * 100], [99]).mean_rank == 100
    tied = np.random.default_rng(0).integers(0, 5, size=(4, 100)).astype(float)
    expected = [
        [1 + sum((-s, i) < (-row[j], j) for i, s in enumerate(row)) for j in range(100)] for row in tied
    ]
    assert ranks_of(tied).tolist() == expected
    assert [sparse_scores(tied, [j] * 4).mean_rank for j in range(100)] == np.mean(expected, axis=0).tolist()


def test_a_round_without_relevant_options_is_explicit():
    scores, relevance = [[3.0, 2.0, 1.0]] * 2, [[0.0, 0.0, 0.0], [0.0, 1.0, 0.5]]
    result = ndcg_scores(scores, relevance)
    assert (result.num_rounds, result.num_undefined) == (2, 1)
    assert math.isnan(result.per_round[0])
    assert result.ndcg == result.per_round[1]


def test_best_order_scores_one():
    relevance = np.random.default_rng(0).choice([0, 0.2, 0.5, 1.0], size=(20, 100))
    assert ndcg_scores(relevance, relevance).ndcg == pytest.approx(1.0)


def test_submission_holds_ranks_that_are_a_permutation(golden):
    record = submission_record(185565, 5, golden["inputs"]["scores"][0])
    assert sorted(record["ranks"]) == list(range(1, 101))
    assert record["ranks"] == golden["expected"]["ranks"][0]
    with pytest.raises(ValueError, match="from 1"):
        submission_record(185565, 0, [1.0, 2.0])


@pytest.mark.parametrize(
    ("scores", "truth"),
    [([[1.0, float("nan")]], [0]), ([[1.0, 2.0]], [2]), ([1.0, 2.0], [0]), ([[1.0]], [0, 0])],
)
def test_bad_input_is_refused(scores, truth):
    with pytest.raises(ValueError):
        sparse_scores(scores, truth)
