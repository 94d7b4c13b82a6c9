"""GQA scores equal the official script's."""

import pytest

from evaluation.metrics.gqa import gqa_scores, normalise_answer
from tests.helpers.metric_golden import load


@pytest.fixture(scope="module")
def golden():
    return load("gqa")


def scored(golden, **options):
    inputs = golden["inputs"]
    return gqa_scores(inputs["questions"], inputs["predictions"], choices=inputs["choices"], **options)


def test_every_score_equals_the_official_code(golden):
    result = scored(golden, normalise="raw")
    for name, value in golden["expected"]["openvqa_full"].items():
        assert result.scores[name][0] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("structural_type", "accuracyPerStructuralType"),
        ("semantic_type", "accuracyPerSemanticType"),
        ("steps", "accuracyPerSteps"),
        ("length", "accuracyPerLength"),
    ],
)
def test_every_group_equals_the_official_code(golden, ours, theirs):
    groups = scored(golden, normalise="raw").groups[ours]
    assert {str(key): list(value) for key, value in groups.items()} == golden["expected"]["official_eval"][
        theirs
    ]


def test_detailed_types_add_up_to_all_balanced_questions(golden):
    result = scored(golden)
    accuracy, num_questions = result.scores["accuracy"]
    types = result.groups["detailed_type"].values()
    assert sum(number for _, number in types) == num_questions
    assert sum(value * number for value, number in types) / num_questions == pytest.approx(accuracy)


def test_llava_normalising_helps_and_raw_is_exact(golden):
    assert normalise_answer(" Dog.") == "dog"
    assert normalise_answer(" Dog.", "raw") == " Dog."
    assert (
        scored(golden, normalise="llava").scores["accuracy"]
        > scored(golden, normalise="raw").scores["accuracy"]
    )


def test_without_entailed_predictions_or_choices_there_is_no_such_score(golden):
    inputs = golden["inputs"]
    balanced = {name: q for name, q in inputs["questions"].items() if q["isBalanced"]}
    result = gqa_scores(balanced, {name: inputs["predictions"][name] for name in balanced})
    assert not {"consistency", "validity", "plausibility"} & result.scores.keys()


def test_missing_predictions_are_named(golden):
    questions = golden["inputs"]["questions"]
    with pytest.raises(ValueError, match="have no prediction"):
        gqa_scores(questions, {})
    with pytest.raises(ValueError, match="balanced"):
        gqa_scores({}, {})
    with pytest.raises(ValueError, match="'lower'"):
        scored(golden, normalise="lower")
