"""Laws of the judge and the probes."""

import numpy as np
import pytest

from demo.benchmarks.edit import train_probe
from demo.probes import Judge, Probe, RidgeClassifier, blur, histogram, load_judge
from tests.helpers.emoji_shards import catalogue
from vlgpt.errors import UserError


@pytest.fixture(scope="module")
def judge(clip_folder) -> Judge:
    return load_judge(str(clip_folder))


@pytest.fixture(scope="module")
def drawings(judge):
    """(pictures, infos) of people by split."""
    people = [one for one in catalogue() if one.info["gender"]]

    def of(*splits):
        chosen = [one for one in people if one.info["split"] in splits]
        return judge.squares([one.data for one in chosen]), [one.info for one in chosen]

    return of


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(judge, drawings):
    pictures, _ = drawings("unseen")
    embedded = judge.embed(pictures)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(judge.embed(pictures[3:5]), embedded[3:5], atol=1e-5)


@pytest.mark.parametrize("attribute", ["tone", "gender"])
def test_a_probe_trained_on_training_pictures_knows_held_out_ones_sharp_and_blurred(
    judge, drawings, attribute
):
    pictures, infos = drawings("train")
    probe = Probe(attribute, judge).fit(pictures, [info[attribute] for info in infos])
    held_out, truth = drawings("unseen", "seen", "combination")
    labels = [info[attribute] for info in truth]
    assert probe.accuracy(held_out, labels) >= 0.9
    assert probe.accuracy(blur(held_out), labels) >= 0.9


def test_probes_are_trained_on_the_training_split_only(emoji_data, clip_folder, judge, drawings):
    probe = train_probe(emoji_data, str(clip_folder), "gender")
    pictures, infos = drawings("train")
    own = Probe("gender", judge).fit(pictures, [info["gender"] for info in infos])
    np.testing.assert_allclose(probe._classifier.weights, own._classifier.weights, atol=1e-6)


def test_labels_without_relation_to_the_picture_are_not_learnt(judge, drawings):
    pictures, _ = drawings("train")
    random = np.random.default_rng(0)
    labels = [str(number) for number in random.integers(0, 4, len(pictures))]
    probe = Probe("gender", judge).fit(pictures, labels)
    held_out, _ = drawings("unseen")
    wanted = [str(number) for number in random.integers(0, 4, len(held_out))]
    assert probe.accuracy(held_out, wanted) < 0.5


def test_rare_classes_count_as_much_as_frequent_ones():
    random = np.random.default_rng(0)
    features = random.normal(size=(1010, 2)).astype(np.float32)
    features[1000:, 0] += 3
    classifier = RidgeClassifier.fit(features, ["often"] * 1000 + ["rare"] * 10, ridge=1e-3)
    probe = random.normal(size=(200, 2)).astype(np.float32) + np.array([3, 0], np.float32)
    assert np.mean([found == "rare" for found in classifier.predict(probe)]) > 0.8


def test_a_histogram_knows_colours_not_places():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    turned = pictures[:, ::-1, :, :]
    np.testing.assert_allclose((histogram(pictures) ** 2).sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(histogram(pictures), histogram(turned))
    assert not np.array_equal(histogram(pictures)[0], histogram(pictures)[1])


def test_wrong_use_is_refused(judge, drawings):
    pictures, _ = drawings("unseen")
    with pytest.raises(RuntimeError, match="not trained"):
        Probe("tone", judge).predict(pictures)
    with pytest.raises(ValueError, match="two classes"):
        Probe("tone", judge).fit(pictures, ["light"] * len(pictures))
    with pytest.raises(UserError, match="--option judge"):
        load_judge("")
