"""The Python tokenizer gives what the Java tool gives."""

import pytest

from evaluation.metrics import ptb
from evaluation.metrics.ptb import find_java_tokenizer, scan, tokenize
from tests.helpers.metric_golden import load

NUM_HAND_MADE = 67


def test_real_captions_tokenise_exactly_and_hand_made_ones_too():
    golden = load("ptb_tokenizer")
    found = tokenize(golden["inputs"])
    wrong = [index for index, (ours, theirs) in enumerate(zip(found, golden["expected"])) if ours != theirs]
    assert wrong == []
    assert len(golden["inputs"]) - NUM_HAND_MADE == 401


def test_probes_and_random_mixtures_tokenise_as_the_java_tool_did():
    golden = load("ptb_probes")
    assert tokenize(golden["inputs"]) == golden["expected"]


def test_remembered_pieces_give_the_same_tokens_as_a_fresh_scan():
    """The quick way cuts at spaces; it must not lose what depends on text beyond the space."""
    lines = load("ptb_probes")["inputs"] + load("ptb_tokenizer")["inputs"]
    tokenize(lines)  # fills the memory
    followed = [*lines, "end"]
    fresh = [
        " ".join(
            token
            for token in scan(line, "\n" + "\n".join(followed[index + 1 : index + 3]) + "\n")
            if token not in ptb.PUNCTUATION
        )
        for index, line in enumerate(lines)
    ]
    assert tokenize(followed)[:-1] == fresh


@pytest.mark.parametrize("mark", ["\r", "\n", "\u2028", "\u2029", "\x0b", "\x0c"])
def test_line_breaks_inside_a_caption_do_not_shift_the_next_one(mark):
    captions = [f"a red{mark}bus", "two dogs", "a cat"]
    assert tokenize(captions) == ["a red bus", "two dogs", "a cat"]
    assert tokenize([f"see http://a.b/c{mark}d now"]) == ["see http://a.b/c d now"]
    if find_java_tokenizer() is not None and mark in "\r\u2028":
        assert tokenize(captions, tokenizer="java") == ["a red bus", "two dogs", "a cat"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("You cannot, I'm gonna!", "you can not i 'm gon na"),
        ("(two) men", "-lrb- two -rrb- men"),
        ("22 3/4 inches", "22\u00a03/4 inches"),
        ("a dog \U0001f642 runs", "a dog runs"),
        ("St. Louis, Mo. at 5 p.m.", "st. louis mo. at 5 p.m."),
        ("a \u00bd cup \u2014 full\u2026", "a 1/2 cup full"),
        ("", ""),
        ("   ", ""),
        ("half a pair \ud83d of units", "half a pair of units"),
    ],
)
def test_known_traps(caption, expected):
    assert tokenize([caption, "x"])[0] == expected


def test_no_captions_give_no_captions_and_an_unknown_tokenizer_is_refused():
    assert tokenize([]) == []
    with pytest.raises(ValueError, match="spacy"):
        tokenize(["a"], tokenizer="spacy")


@pytest.mark.skipif(find_java_tokenizer() is None, reason="needs java and pycocoevalcap")
def test_java_tool_agrees_with_python_on_this_machine():
    lines = load("ptb_probes")["inputs"]
    assert tokenize(lines, tokenizer="java") == tokenize(lines)


def test_missing_java_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ptb.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pycocoevalcap"):
        tokenize(["a"], tokenizer="java")
