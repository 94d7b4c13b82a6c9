"""The Porter stemmer in the variant of NLTK's `PorterStemmer()` default mode, for OK-VQA.

Source: M. Porter, "An algorithm for suffix stripping" (1980), with the changes that NLTK documents as its
extensions (irregular words, `ies`/`ied` of short words, `y` after a consonant, `fulli`, `logi`, `bli`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Condition = Callable[[str], bool]
Suffixes = Sequence[tuple[str, str, Condition]]

_IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning", "howe": "howe",
    "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip


def stem(word: str) -> str:
    """Stem of the lower-cased text. A phrase is one word here: only its end changes ("fire hydrants")."""
    word = word.lower()
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past_and_ing, _final_y, _double_suffixes, _step_3, _step_4, _final_e, _double_l):
        word = step(word)
    return word


def _is_consonant(word: str, index: int) -> bool:
    if word[index] in "aeiou":
        return False
    return word[index] != "y" or index == 0 or not _is_consonant(word, index - 1)


def _shape(word: str) -> str:
    """One letter per character, c for consonant and v for vowel."""
    letters: list[str] = []
    for index, letter in enumerate(word):
        is_consonant = letter not in "aeiou" and (letter != "y" or index == 0 or letters[-1] == "v")
        letters.append("c" if is_consonant else "v")
    return "".join(letters)


def _measure(word: str) -> int:
    """Number of vowel-consonant changes: the paper's m."""
    return _shape(word).count("vc")


def _has_vowel(word: str) -> bool:
    return "v" in _shape(word)


def _ends_double_consonant(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _is_consonant(word, len(word) - 1)


def _ends_cvc(word: str) -> bool:
    shape = _shape(word)
    return (shape.endswith("cvc") and word[-1] not in "wxy") or shape == "vc"


def _positive(stem: str) -> bool:
    return _measure(stem) > 0


def _above_one(stem: str) -> bool:
    return _measure(stem) > 1


def _replace_first(word: str, rules: Suffixes) -> str:
    """The first suffix that fits decides, also where its condition then fails."""
    for suffix, new, condition in rules:
        if word.endswith(suffix):
            base = word[: len(word) - len(suffix)]
            return base + new if condition(base) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    for suffix, new in (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")):
        if word.endswith(suffix):
            return word[: len(word) - len(suffix)] + new
    return word


def _past_and_ing(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _positive(word[:-3]) else word
    for suffix in ("ed", "ing"):
        base = word[: len(word) - len(suffix)]
        if word.endswith(suffix) and _has_vowel(base):
            break
    else:
        return word
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if _ends_double_consonant(base):
        return base if base[-1] in "lsz" else base[:-1]
    return base + "e" if _measure(base) == 1 and _ends_cvc(base) else base


def _final_y(word: str) -> str:
    base = word[:-1]
    if word.endswith("y") and len(base) > 1 and _is_consonant(base, len(base) - 1):
        return base + "i"
    return word


def _double_suffixes(word: str) -> str:
    if word.endswith("alli") and _positive(word[:-4]):
        return _double_suffixes(word[:-2])
    rules: Suffixes = [
        *((suffix, new, _positive) for suffix, new in _STEP_2),
        ("logi", "log", lambda base: _positive(word[:-3])),
    ]
    return _replace_first(word, rules)


_STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"),
    ("aliti", "al"), ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_STEP_3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""),
    ("ness", ""),
)  # fmt: skip
_STEP_4_BEFORE_ION = ("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent")
_STEP_4_AFTER_ION = ("ou", "ism", "ate", "iti", "ous", "ive", "ize")


def _step_3(word: str) -> str:
    return _replace_first(word, [(suffix, new, _positive) for suffix, new in _STEP_3])


def _step_4(word: str) -> str:
    def drops_ion(base: str) -> bool:
        return _above_one(base) and base[-1:] in ("s", "t")

    rules: Suffixes = [
        *((suffix, "", _above_one) for suffix in _STEP_4_BEFORE_ION),
        ("ion", "", drops_ion),
        *((suffix, "", _above_one) for suffix in _STEP_4_AFTER_ION),
    ]
    return _replace_first(word, rules)


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    base = word[:-1]
    if _above_one(base) or (_measure(base) == 1 and not _ends_cvc(base)):
        return base
    return word


def _double_l(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _above_one(word[:-1]) else word
