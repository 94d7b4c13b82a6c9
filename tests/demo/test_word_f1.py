"""Word F1 of captions, on values worked out by hand."""

import pytest

from demo.word_f1 import word_f1


def test_word_f1_counts_repeated_words_once_each():
    assert word_f1("a red red bus", ["A red bus."]) == pytest.approx(2 * 3 / 7)
    assert word_f1("dog", ["cat", "a dog"]) == pytest.approx(2 / 3)
    assert word_f1("", [""]) == 1
    assert word_f1("dog", [""]) == 0


def test_word_f1_refuses_a_string_as_references():
    with pytest.raises(TypeError):
        word_f1("dog", "dog")
    with pytest.raises(ValueError):
        word_f1("dog", [])
