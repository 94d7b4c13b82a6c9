"""Normalising of VQA answers, quirk by quirk as in GT-Vision-Lab/VQA (vqaEval.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

from vlgpt.errors import UserError

Stem = Literal["none", "porter"]

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# UPSTREAM: written "(?!<=\d)" for a look-behind, so it only looks ahead: "5." loses its full stop, ".5" keeps it.
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")
# UPSTREAM: re.UNICODE is passed as `count`, so only the first 32 full stops go.
_MAX_FULL_STOPS = int(re.UNICODE)
_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_MAX_CACHED = 1 << 18


def normaliser(*, stem: Stem = "none", has_backticks: bool = False) -> Callable[[str], str]:
    """All steps as one function: line breaks, punctuation, stem, digits, articles, contractions.

    Results are remembered, since a data set repeats its few thousand answers. Raises ValueError for an unknown stem.
    """
    step = punctuation_step(stem=stem)
    table = _BACKTICK_CONTRACTIONS if has_backticks else CONTRACTIONS

    @lru_cache(maxsize=_MAX_CACHED)
    def full(text: str) -> str:
        return digits_articles(step(clean(text)), table)

    return full


def punctuation_step(*, stem: Stem = "none") -> Callable[[str], str]:
    """Punctuation, then for OK-VQA the stemmer on the whole string; results are remembered.

    The stem is that of NLTK's Porter stemmer in its default mode, as Emu and LAVIS use it: a phrase is one word
    to it, so only its end changes ("fire hydrants" -> "fire hydr"). Raises ValueError for an unknown stem.
    """
    if stem not in ("none", "porter"):
        raise ValueError(f"stem is {stem!r}; wanted 'none' or 'porter'")
    stemmed = _porter() if stem == "porter" else str

    @lru_cache(maxsize=_MAX_CACHED)
    def step(text: str) -> str:
        return stemmed(punctuation(text))

    return step


def _porter() -> Callable[[str], str]:
    # Imported here: NLTK takes over a second to import, and only OK-VQA needs it.
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise UserError(
            "OK-VQA's stemmer needs nltk: pip install 'vlgpt[eval]', or --option stem=none"
        ) from error
    return PorterStemmer().stem


def clean(text: str) -> str:
    """The text on one line, without surrounding spaces."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
    """Each mark goes, or becomes a space where it stands between letters and no number has a comma."""
    is_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            is_dropped = is_number_with_comma or mark + " " in text or " " + mark in text
            result = result.replace(mark, "" if is_dropped else " ")
    return _FULL_STOP.sub("", result, count=_MAX_FULL_STOPS)


def digits_articles(text: str, contractions: Mapping[str, str]) -> str:
    """Lower case, number words as digits, no articles, apostrophes put into contractions."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


# Written form, then what it becomes. UPSTREAM: the words in capitals can never match lower-cased text and
# are left out; "somebody'd" loses its apostrophe; the forms of "'ow's'at" are there.
_TABLE = """
aint ain't; arent aren't; cant can't; couldve could've; couldnt couldn't; couldn'tve couldn't've
couldnt've couldn't've; didnt didn't; doesnt doesn't; dont don't; hadnt hadn't; hadnt've hadn't've
hadn'tve hadn't've; hasnt hasn't; havent haven't; hed he'd; hed've he'd've; he'dve he'd've; hes he's
howd how'd; howll how'll; hows how's; isnt isn't; itd it'd; itd've it'd've; it'dve it'd've; itll it'll
let's let's; maam ma'am; mightnt mightn't; mightnt've mightn't've; mightn'tve mightn't've; mightve might've
mustnt mustn't; mustve must've; neednt needn't; notve not've; oclock o'clock; oughtnt oughtn't
ow's'at 'ow's'at; 'ows'at 'ow's'at; 'ow'sat 'ow's'at; shant shan't; shed've she'd've; she'dve she'd've
she's she's; shouldve should've; shouldnt shouldn't; shouldnt've shouldn't've; shouldn'tve shouldn't've
somebody'd somebodyd; somebodyd've somebody'd've; somebody'dve somebody'd've; somebodyll somebody'll
somebodys somebody's; someoned someone'd; someoned've someone'd've; someone'dve someone'd've
someonell someone'll; someones someone's; somethingd something'd; somethingd've something'd've
something'dve something'd've; somethingll something'll; thats that's; thered there'd; thered've there'd've
there'dve there'd've; therere there're; theres there's; theyd they'd; theyd've they'd've; they'dve they'd've
theyll they'll; theyre they're; theyve they've; twas 'twas; wasnt wasn't; wed've we'd've; we'dve we'd've
weve we've; werent weren't; whatll what'll; whatre what're; whats what's; whatve what've; whens when's
whered where'd; wheres where's; whereve where've; whod who'd; whod've who'd've; who'dve who'd've
wholl who'll; whos who's; whove who've; whyll why'll; whyre why're; whys why's; wont won't; wouldve would've
wouldnt wouldn't; wouldnt've wouldn't've; wouldn'tve wouldn't've; yall y'all; yall'll y'all'll
y'allll y'all'll; yall'd've y'all'd've; y'alld've y'all'd've; y'all'dve y'all'd've; youd you'd
youd've you'd've; you'dve you'd've; youll you'll; youre you're; youve you've
"""
CONTRACTIONS = dict(line.split() for line in _TABLE.strip().replace("; ", "\n").splitlines())
_STRAIGHT_IN_BACKTICK_COPY = frozenset(
    ["aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"]
)
_KEY_STRAIGHT_IN_BACKTICK_COPY = frozenset(["couldn'tve", "hadn'tve"])
_BACKTICK_CONTRACTIONS = {
    (key if key in _KEY_STRAIGHT_IN_BACKTICK_COPY else key.replace("'", "`")): (
        value if key in _STRAIGHT_IN_BACKTICK_COPY else value.replace("'", "`")
    )
    for key, value in CONTRACTIONS.items()
}
