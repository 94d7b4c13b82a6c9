"""GQA scores equal the official script's."""

import pytest
from metric_golden import load

from evaluation.metrics.gqa import gqa_scores, normalise_answer


@pytest.fixture(scope="module")
def golden():
    return load("gqa")


def scored(golden, **options):
    inputs = golden["inputs"]
    return gqa_scores(inputs["questions"], inputs["predictions"], choices=inputs["choices"], **options)


def test_every_score_equals_the_official_code(golden):
    result = scored(golden, normalise="raw")
    for name, value in golden["expected"]["openvqa_full"].items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("per_structural_type", "accuracyPerStructuralType"),
        ("per_semantic_type", "accuracyPerSemanticType"),
        ("per_steps", "accuracyPerSteps"),
        ("per_length", "accuracyPerLength"),
    ],
)
def test_every_group_equals_the_official_code(golden, ours, theirs):
    groups = getattr(scored(golden, normalise="raw"), ours)
    assert {str(key): list(value) for key, value in groups.items()} == golden["expected"]["official_eval"][
        theirs
    ]


def test_detailed_types_add_up_to_all_balanced_questions(golden):
    result = scored(golden)
    assert sum(number for _, number in result.per_detailed_type.values()) == result.num_questions
    total = sum(accuracy * number for accuracy, number in result.per_detailed_type.values())
    assert total / result.num_questions == pytest.approx(result.accuracy)


def test_llava_normalising_helps_and_raw_is_exact(golden):
    assert normalise_answer(" Dog.") == "dog"
    assert normalise_answer(" Dog.", "raw") == " Dog."
    assert scored(golden, normalise="llava").accuracy > scored(golden, normalise="raw").accuracy


def test_mutant_counting_unbalanced_questions_gives_another_number(golden):
    result = scored(golden, normalise="raw")
    everything = 100 * sum(result.is_correct.values()) / len(result.is_correct)
    assert abs(everything - golden["expected"]["official_eval"]["accuracy"]) > 1


def test_without_entailed_predictions_or_choices_there_is_no_such_score(golden):
    inputs = golden["inputs"]
    balanced = {name: q for name, q in inputs["questions"].items() if q["isBalanced"]}
    result = gqa_scores(balanced, {name: inputs["predictions"][name] for name in balanced})
    assert result.consistency is None
    assert result.validity is None
    assert result.plausibility is None


def test_missing_predictions_are_named(golden):
    questions = golden["inputs"]["questions"]
    with pytest.raises(ValueError, match="have no prediction"):
        gqa_scores(questions, {})
    with pytest.raises(ValueError, match="balanced"):
        gqa_scores({}, {})
    with pytest.raises(ValueError, match="'lower'"):
        scored(golden, normalise="lower")
