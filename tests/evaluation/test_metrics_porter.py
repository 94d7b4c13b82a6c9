"""The stemmer equals NLTK's default Porter stemmer."""

import random

import pytest
from metric_golden import load

from evaluation.metrics.porter import stem

ENDINGS = """
    ies ied s es sses ed ing eed ational tional enci anci izer bli abli alli entli eli ousli ization ation
    ator alism iveness fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al
    ance ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll y ly at bl iz
    ss ' 's
"""


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
def test_textbook_words(word, expected):
    assert stem(word) == expected


def test_stems_equal_nltk_on_random_words():
    porter = pytest.importorskip("nltk.stem.porter").PorterStemmer()
    generator = random.Random(0)
    questions = load("vizwiz_accuracy")["inputs"]["questions"]
    words = sorted({text for question in questions for text in question["answers"]})
    for _ in range(5_000):
        start = "".join(generator.choices("aeiouybcdlmnrstwxz '", k=generator.randint(0, 6)))
        words.append(start + "".join(generator.choices(ENDINGS.split(), k=generator.randint(0, 3))))
    assert [stem(word) for word in words] == [porter.stem(word) for word in words]
