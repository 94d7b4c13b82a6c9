"""Laws of VQA accuracy: equal to the official evaluators on golden cases, and known bugs would show."""

import pytest

from evaluation.core import mean_by
from evaluation.metrics.vqa import (
    answers_of,
    leave_one_out,
    vizwiz_answerable_from_answers,
    vizwiz_unanswerable,
    vqa_accuracy,
)
from evaluation.metrics.vqa_text import (
    CONTRACTIONS,
    clean,
    digits_articles,
    normaliser,
    punctuation,
    punctuation_step,
)
from tests.helpers.metric_golden import load

GOLDEN_NAMES = {
    "official_2021": "official_2021",
    "official_2016": "official_2016",
    "always": "openflamingo_always_normalise",
    "vizwiz": "vizwiz_index_loo_gt_raw",
    "vizwiz_backtick": "vizwiz_with_backtick_contractions",
}


def synthetic():
    golden = load("vqa_accuracy")
    questions = golden["inputs"]
    return [q["prediction"] for q in questions], [q["answers"] for q in questions], golden["expected"]


def real_vizwiz():
    golden = load("vizwiz_accuracy")
    questions = golden["inputs"]["questions"]
    return [q["prediction"] for q in questions], [q["answers"] for q in questions], golden


def rounded(values):
    return [round(value, 2) for value in values]


def lmms_eval_normalised(text):
    """EvalAIAnswerProcessor of lmms-eval and MMF: the same steps after changes of its own."""
    spaced = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normaliser()(spaced.strip())


@pytest.mark.parametrize(
    ("normalise", "column"),
    [
        (normaliser(), "normalised"),
        (lambda text: punctuation(clean(text)), "punct"),
        (lambda text: digits_articles(clean(text), CONTRACTIONS), "digit_article_only"),
        (lmms_eval_normalised, "lmms_eval"),
    ],
)
def test_normalising_equals_the_official_code(normalise, column):
    golden = load("vqa_normaliser")
    assert [normalise(text) for text in golden["inputs"]] == [case[column] for case in golden["expected"]]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "tie"), ("feed", "feed"), ("agreed", "agre"),
        ("plastered", "plaster"), ("motoring", "motor"), ("hopping", "hop"), ("falling", "fall"),
        ("filing", "file"),
        ("happy", "happi"), ("sky", "sky"), ("relational", "relat"), ("vietnamization", "vietnam"),
        ("electrical", "electr"), ("adoption", "adopt"), ("rate", "rate"), ("controlling", "control"),
        ("Dying", "die"), ("is", "is"), ("", ""), ("fire hydrants", "fire hydr"),
    ],
)  # fmt: skip
def test_answers_are_stemmed_as_one_word_by_nltks_default_porter_stemmer(word, expected):
    assert punctuation_step(stem="porter")(word) == expected


@pytest.mark.parametrize("mode", GOLDEN_NAMES)
def test_accuracy_equals_the_official_code_on_every_question(mode):
    predictions, answers, expected = synthetic()
    result = vqa_accuracy(predictions, answers, mode=mode)
    golden = expected[GOLDEN_NAMES[mode]]
    assert rounded(result.per_question) == list(golden["per_question"].values())
    assert result.overall == pytest.approx(golden["overall_from_rounded"], abs=0.01)


def test_lmms_eval_accuracy_equals_mode_always():
    predictions, answers, expected = synthetic()
    result = vqa_accuracy(predictions, answers, mode="always")
    assert rounded(result.per_question) == [
        round(100 * v, 2) for v in expected["lmms_eval"]["per_question"].values()
    ]


@pytest.mark.parametrize(
    ("mode", "name"),
    [("official_2021", "official_2021"), ("always", "openflamingo_always_normalise"), ("vizwiz", "vizwiz")],
)
def test_real_vizwiz_questions_score_as_the_official_code_says(mode, name):
    predictions, answers, golden = real_vizwiz()
    result = vqa_accuracy(predictions, answers, mode=mode)
    expected = golden["expected"][name]
    assert rounded(result.per_question) == list(expected["per_question"].values())
    assert round(result.overall, 2) == expected["overall"]
    ids = [str(number) for number in range(len(predictions))]
    types = [q["answer_type"] for q in golden["inputs"]["questions"]]
    groups = mean_by(dict(zip(ids, result.per_question)), dict(zip(ids, types)))
    for group, value in expected.get("per_answer_type", {}).items():
        assert round(groups[group]["value"], 2) == value


def test_okvqa_with_porter_equals_emu_and_none_differs():
    golden = load("okvqa_emu")
    full = normaliser(stem="porter")
    assert [full(text) for text in golden["inputs"]["strings"]] == golden["expected"]["normalised_prediction"]
    questions = golden["inputs"]["questions"]
    predictions, answers = [q["prediction"] for q in questions], [q["answers"] for q in questions]
    stemmed = vqa_accuracy(predictions, answers, mode="official_2016", stem="porter")
    assert rounded(stemmed.per_question) == list(golden["expected"]["per_question"].values())
    assert vqa_accuracy(predictions, answers, mode="official_2016", stem="none").overall != stemmed.overall


def test_unanswerable_scores_equal_the_vizwiz_api():
    golden = load("vizwiz_unanswerable_ap")
    result = vizwiz_unanswerable(golden["inputs"]["answerable_labels"], golden["inputs"]["answerable_scores"])
    assert result.average_precision == pytest.approx(100 * golden["expected"]["average_precision"], abs=1e-9)
    assert result.f1 == pytest.approx(100 * golden["expected"]["f1"], abs=1e-9)
    predictions, _, vizwiz = real_vizwiz()
    labels = list(vizwiz["inputs"]["answerable"].values())
    hard = vizwiz_unanswerable(labels, vizwiz_answerable_from_answers(predictions))
    expected = vizwiz["expected"]["vizwiz"]["unanswerability"]
    assert (round(hard.average_precision, 2), round(hard.f1, 2)) == (
        expected["average_precision"],
        expected["f1_score"],
    )


def test_counting_formula_equals_leaving_each_annotator_out():
    for num_annotators in range(1, 12):
        for num_matches in range(num_annotators + 1):
            is_match = [index < num_matches for index in range(num_annotators)]
            shares = [min(1, (sum(is_match) - own) / 3) for own in is_match]
            assert leave_one_out(num_matches, num_annotators) == pytest.approx(sum(shares) / num_annotators)


def test_percentages_known_by_heart():
    assert [round(100 * leave_one_out(m, 10)) for m in range(5)] == [0, 30, 60, 90, 100]


def test_unanimous_annotators_demand_the_exact_answer_only_in_2021():
    assert vqa_accuracy(["Yes"], [["yes"] * 10]).overall == 0
    assert vqa_accuracy(["Yes"], [["yes"] * 9 + ["yes\n"]]).overall == 0
    assert vqa_accuracy(["Yes"], [["yes"] * 10], mode="always").overall == 100


def test_predictions_and_answers_are_normalised_once():
    """Normalising twice is not the same as once, so a pipeline must not normalise before scoring."""
    full = normaliser()
    texts = [t for t in load("vqa_normaliser")["inputs"] if full(full(t)) != full(t)]
    assert texts
    for text in texts:  # one side normalised twice would no longer agree with the other
        for mode in ("official_2021", "always"):
            assert vqa_accuracy([text], [[text] * 5 + ["something else"] * 5], mode=mode).overall == 100


def test_order_of_annotators_does_not_matter():
    predictions, answers, _ = synthetic()
    for mode in GOLDEN_NAMES:
        forward = vqa_accuracy(predictions, answers, mode=mode)
        assert vqa_accuracy(predictions, [given[::-1] for given in answers], mode=mode) == forward


def test_answers_are_taken_by_place_not_by_id():
    annotation = {"answers": [{"answer": "red"}, {"answer": "red"}]}
    assert answers_of(annotation) == ["red", "red"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"predictions": ["a"], "answers": []}, ValueError),
        ({"predictions": [], "answers": []}, ValueError),
        ({"predictions": ["a"], "answers": [[]]}, ValueError),
        ({"predictions": ["a"], "answers": ["a"]}, TypeError),
        ({"predictions": ["a"], "answers": [["a"]], "mode": "official"}, ValueError),
        ({"predictions": ["a"], "answers": [["a"]], "stem": "snowball"}, ValueError),
    ],
)
def test_bad_input_is_refused(arguments, error):
    with pytest.raises(error):
        vqa_accuracy(arguments.pop("predictions"), arguments.pop("answers"), **arguments)
