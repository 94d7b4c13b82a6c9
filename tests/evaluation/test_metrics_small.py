"""CLIP score, answer cutting, word F1 and bootstrap."""

import numpy as np
import pytest

from evaluation.metrics.bootstrap import paired_bootstrap
from evaluation.metrics.clip_score import mean_wrong_cosine, pair_cosines
from evaluation.metrics.postprocess import cut_answer, cut_caption
from tests.helpers.metric_golden import load


def golden_embeddings():
    golden = load("clip_score")
    return golden["inputs"]["text_embeds"], golden["inputs"]["image_embeds"], golden["expected"]


def test_clip_cosines_equal_torchmetrics_pair_by_pair():
    texts, images, expected = golden_embeddings()
    assert 100 * pair_cosines(texts, images) == pytest.approx(expected["per_pair_100cos_unclipped"], abs=1e-4)


def test_chance_is_the_mean_cosine_of_all_wrong_pairs():
    texts, images, _ = golden_embeddings()
    n = len(texts)
    wrong = [pair_cosines([texts[i]], [images[j]])[0] for i in range(n) for j in range(n) if i != j]
    assert mean_wrong_cosine(texts, images) == pytest.approx(np.mean(wrong))
    assert mean_wrong_cosine(texts[:1], images[:1]) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [([[0.0, 0.0]], [[1.0, 0.0]]), ([[1.0]], [[1.0], [1.0]]), (np.zeros((0, 2)), np.zeros((0, 2)))],
)
def test_cosines_refuse_bad_embeddings(first, second):
    with pytest.raises(ValueError):
        pair_cosines(first, second)


@pytest.mark.parametrize(
    ("cut", "style", "column"),
    [
        (cut_answer, "emu", "emu_short_answer"),
        (cut_caption, "emu", "emu_caption"),
        (cut_answer, "openflamingo", "openflamingo_vqa"),
        (cut_caption, "openflamingo", "openflamingo_caption"),
    ],
)
def test_cuts_equal_the_published_evaluators(cut, style, column):
    golden = load("postprocess")
    found = [cut(text, style) for text in golden["inputs"]]
    assert found == [case[column] for case in golden["expected"]]


def test_llava_and_no_cuts():
    assert cut_answer(" A Dog. ", "llava") == "a dog"
    assert cut_caption(" A Dog. ", "llava") == "A Dog."
    assert cut_answer(" A Dog. ", "none") == cut_caption(" A Dog. ", "none") == " A Dog. "
    with pytest.raises(ValueError, match="gill"):
        cut_answer("a", "gill")


def test_bootstrap_is_addressed_by_its_seed():
    scores, zeros = np.random.default_rng(0).random(300), np.zeros(300)
    assert paired_bootstrap(scores, zeros, seed=1) == paired_bootstrap(scores, zeros, seed=1)
    assert paired_bootstrap(scores, zeros, seed=1) != paired_bootstrap(scores, zeros, seed=2)


def test_bootstrap_interval_has_the_normal_width():
    scores = np.random.default_rng(0).normal(5.0, 2.0, size=1000)
    interval = paired_bootstrap(scores, np.zeros(1000), seed=3, num_resamples=4000)
    error = scores.std() / np.sqrt(1000)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)


def test_pairing_narrows_the_interval_of_two_systems_that_share_hard_questions():
    rng = np.random.default_rng(4)
    difficulty = rng.normal(0, 10, size=500)
    first, second = difficulty + rng.normal(1.0, 1, 500), difficulty + rng.normal(0.5, 1, 500)
    paired = paired_bootstrap(first, second, seed=0)
    unpaired = paired_bootstrap(first, rng.permutation(second), seed=0)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)
    assert paired.low > 0
    assert paired_bootstrap(second, first, seed=0).mean == pytest.approx(-paired.mean)


@pytest.mark.parametrize("scores", [[], [1.0, np.inf]])
def test_bootstrap_refuses_bad_input(scores):
    with pytest.raises(ValueError):
        paired_bootstrap(scores, np.zeros(len(scores)), seed=0)
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap([1.0], [1.0, 2.0], seed=0)
