"""CIDEr-D, BLEU and ROUGE-L equal pycocoevalcap; corpus traps give visibly different numbers."""

import random

import pytest

from evaluation.metrics.captions import score_captions, score_tokenized
from tests.helpers.metric_golden import load

NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]


@pytest.fixture(scope="module")
def coco():
    golden = load("captions_coco80")
    ids = golden["inputs"]["image_ids"]
    hypotheses = dict(zip(ids, golden["inputs"]["hypotheses"]))
    references = dict(zip(ids, golden["inputs"]["references"]))
    return hypotheses, references, golden["expected"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_real_captions_equal_pycocoevalcap(coco, name):
    hypotheses, references, expected = coco
    scores = score_captions(hypotheses, references)
    golden = expected["scores"][name]
    assert scores.corpus[name] == pytest.approx(golden["corpus"], abs=1e-9)
    assert scores.per_image[name] == pytest.approx(golden["per_image"], abs=1e-9)


def test_scores_of_odd_captions_equal_pycocoevalcap():
    """Empty captions, no-break spaces, one image, unequal numbers of references."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    generator = random.Random(1)

    def caption():
        return " ".join(
            generator.choices(["a", "b", "c", "d", "e", "f", "x\u00a0y"], k=generator.randint(0, 9))
        )

    for num_images in [1, 2, 3, 5, 8] * 8:
        hypotheses = {image: caption() for image in range(num_images)}
        references = {image: ["a", *(caption() for _ in range(image % 4))] for image in range(num_images)}
        ours = score_tokenized(hypotheses, references)
        given = {image: [text] for image, text in hypotheses.items()}
        bleu, bleu_images = Bleu(4).compute_score(references, given, verbose=0)
        for order in range(4):
            assert ours.corpus[f"Bleu_{order + 1}"] == pytest.approx(bleu[order], abs=1e-9)
            assert ours.per_image[f"Bleu_{order + 1}"] == pytest.approx(bleu_images[order], abs=1e-9)
        for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
            corpus, images = scorer.compute_score(references, given)
            assert ours.corpus[name] == pytest.approx(corpus, abs=1e-9)
            assert ours.per_image[name] == pytest.approx(list(images), abs=1e-9)


def test_order_of_images_and_of_references_does_not_matter(coco):
    hypotheses, references, _ = coco
    plain = score_captions(hypotheses, references)
    turned = score_captions(
        dict(reversed(hypotheses.items())),
        {image: refs[::-1] for image, refs in reversed(references.items())},
    )
    for name in NAMES:
        assert turned.corpus[name] == pytest.approx(plain.corpus[name], abs=1e-9)


def test_one_image_scores_zero_cider(coco):
    hypotheses, references, _ = coco
    image = next(iter(references))
    assert score_captions({image: hypotheses[image]}, {image: references[image]}).corpus["CIDEr"] == 0


def test_a_string_or_a_stringified_list_is_no_list_of_references(coco):
    hypotheses, references, expected = coco
    with pytest.raises(TypeError, match="list of strings"):
        score_captions(hypotheses, {image: refs[0] for image, refs in references.items()})
    with pytest.raises(TypeError, match="one string"):
        score_captions({image: [text] for image, text in hypotheses.items()}, references)
    stringified = score_captions(hypotheses, {image: [str(refs)] for image, refs in references.items()})
    assert abs(stringified.corpus["CIDEr"] - expected["scores"]["CIDEr"]["corpus"]) > 0.5


def test_missing_and_extra_images_are_refused(coco):
    hypotheses, references, _ = coco
    fewer = dict(list(hypotheses.items())[1:])
    with pytest.raises(ValueError, match="1 images have no caption"):
        score_captions(fewer, references)
    with pytest.raises(ValueError, match="no images"):
        score_captions({}, {})
    with pytest.raises(ValueError, match="no reference caption"):
        score_captions({1: "a"}, {1: []})
