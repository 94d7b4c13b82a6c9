"""The token classes of the Stanford English tokenizer (CoreNLP 3.4.1) as a table of regular expressions.

The Java tool is a longest-match scanner: at each position the rule that consumes most characters (what it
only looks at counts too) gives the next token, and the earlier rule wins a draw. The classes below are
written from the tool's documentation and from its observed output on probes: every character of the basic
plane between two letters, every word of 2 to 4 letters before a full stop, and random mixtures.
Rules that only add or rename punctuation which COCO removes afterwards are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    """Group 1 is the text to take, group 2 what must follow (it counts for the longest match)."""

    pattern: re.Pattern[str]
    write: Callable[[str], str]
    num_given_back: int = 0


# Marks and modifiers that the scanner counts as letters besides the Unicode letters.
_LETTER_LIKE = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u036f\u0375\u0378-\u0379\u0384-\u0385\u03f6\u0483-\u0487"
    "\u055a-\u055f\u0591-\u05bd"
    "\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ef\u06fa-\u06ff\u070f"
    "\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962-\u0963"
    "\u0981-\u0983\u09bc\u09be-\u09c4\u09c7-\u09c8\u09cb-\u09cd\u09d7\u09e2-\u09e3\u0a01-\u0a03\u0a3c"
    "\u0a3e-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8\u0bca-\u0bcd\u0c01-\u0c03"
    "\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e30-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ebc\u0ec8-\u0ecd"
)
# ... and letters that came into Unicode after the version it knows (6.3), whatever Python knows.
_NEWER_LETTERS = re.compile(
    "[\u037f\u0528-\u052f\u0560\u0588\u05ef\u0860-\u086a\u0870-\u088f\u08a1\u08ad-\u08c9\u0978\u0980\u09fc\u0af9"
    "\u0c34\u0c5a-\u0c5d\u0c80\u0cdc\u0cdd\u0d04\u0d54-\u0d56\u0d5f\u0de6-\u0def\u0e86\u0e89\u0e8c\u0e8e-\u0e93\u0e98"
    "\u0ea0\u0ea8\u0ea9\u0eac\u13f5\u13f8-\u13fd\u16f1-\u16f8\u170d\u171f\u1878\u191d\u191e\u19b0-\u19c0\u19c8\u19c9"
    "\u1b4c\u1c80-\u1c8a\u1c90-\u1cbf\u1cf2\u1cf3\u1cfa\u2c2f\u2c5f\u312e\u312f\u31bb-\u31bf\u4db6-\u4dbf\u9fcd-\u9fff"
    "\ua698-\ua69d\ua78f\ua794-\ua79f\ua7ab-\ua7f7\ua8fd\ua8fe\ua9e0-\ua9e4\ua9e6-\ua9fe\uaa7e\uaa7f\uab30-\uab5a"
    "\uab5c-\uab69\uab70-\uabbf]"
)
# Symbols that stand alone; every other character that no rule knows (pictographs, controls) is dropped.
_SYMBOLS = (
    r"%&+|~\^\\=/\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00ba\u00bf\u00d7\u00f7\u037e\u0387"
    r"\u0589\u05be\u05c0\u05c3\u05c6"
    r"\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d"
    r"\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042"
    r"\u2044\u207a-\u207e\u208a-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
    r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
SPACES = " \t\u00a0\u2000-\u200a\u3000"


def _words(text: str) -> list[str]:
    return text.split()


def _ranges(categories: str) -> str:
    """Regular-expression ranges of the basic plane's characters in a category of Unicode 6.3: str -> str."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        letter = chr(code)
        if unicodedata.category(letter).startswith(categories) and not _NEWER_LETTERS.match(letter):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


# The last two are marks since Unicode 9, letters to the tool.
_L = _ranges("L") + "\u1885\u1886"
_D = _ranges("Nd")
_LETTER = rf"(?:[{_L}{_LETTER_LIKE}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_WORD = rf"{_LETTER}(?:{_LETTER}|[{_D}])*(?:[.!?]{_LETTER}(?:{_LETTER}|[{_D}])*)*"
_AN = rf"[{_L}{_D}]"
_APOS = "(?:['\u0092\u2019]|(?i:&apos;))"
_APOS_ANY = "(?:['`\u0092\u2019\u0091\u2018\u201b]|(?i:&apos;))"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_NUM = rf"(?:[{_D}]*(?:[.:,\u00ad\u066b\u066c][{_D}]+)+|[{_D}]+)"
_ACRONYM = (
    r"(?:(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S)|(?i:U\.S\.-(?:U\.S\.S\.R|U\.K))"
    r"|[A-Za-z](?:\.[A-Za-z])+)"
)
_THING_PART = rf"(?:[dDoOlL]{_APOS_ANY}{_AN})?{_AN}+"
_THING = rf"{_THING_PART}(?:{_HYPHEN}{_THING_PART})*"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
_COMPOUND = r"[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
_AUX = rf"{_APOS}(?:re|ve|ll|RE|VE|LL|Re|Ve|Ll|rE|vE|lL|[msdMSD])"
_NT = rf"[nN]{_APOS_ANY}[tT]"
_IN_SENTENCE = "[,;:\u3001]"
_LINK = '[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]'

# Abbreviations that keep their full stop, found by trying all words of up to four letters and longer ones.
_ABBREVIATIONS = _words("""
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn ct dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt
    wis wisc wyo
    inc co cos corp ltd plc rt bancorp bhd assn univ intl sys pty pte ptys ptes ppty ppte pptys pptes
    tel est ext sq jr sr bros esq ph.d ed.d etc al seq bldg rd blvd
""")
_CAPITALISED_ABBREVIATIONS = _words("ark az del ill la mass miss ore pa tex wash")
# ... and those that a name follows: the scanner looks less far ahead for them.
_TITLES = _words("""
    mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj
    sgt cpl pvt capt pres lieut hon brig cmdr comdr pfc spc supt supts det adj adv asst assoc ens insp
    mlle mme msgr sfc
    ph ft mt st ste ave dept invt elec natl mfg mtg vs alex wm jos cie a.k.a cf treas
""")
# Words that begin a sentence: a single letter with a full stop before them is no initial ("plan B. The dog").
_SENTENCE_STARTS = _words("""
    About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More
    Mr. Ms. Now Once One Other Our She Since So Some Such That Their The Then There These They
    This We When While
    What Yet You
""")
_FILE_ENDINGS = _words("""
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt
    ps py sql tar txt wav x xml zip
""")
_BEFORE_NUMBER = _words("ca figs fig prop nos no art pp op")


def _any_of(words: list[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _capitalised(words: list[str]) -> str:
    """Words whose first letter is a capital and whose others are of any case."""
    return "|".join(
        f"{word[0].upper()}(?i:{re.escape(word[1:])})" for word in sorted(words, key=len, reverse=True)
    )


_CAPITALISED = _capitalised(_CAPITALISED_ABBREVIATIONS)
_STARTS = _capitalised(_SENTENCE_STARTS)


def _plain(text: str) -> str:
    return text


def _no_soft_hyphen(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _bracketed(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-").replace(" ", "\u00a0")


def _no_space(text: str) -> str:
    return text.replace(" ", "\u00a0")


def _ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


_QUOTES = str.maketrans(
    {"\u0091": "`", "\u2018": "`", "\u201b": "`", "\u2039": "`", "\u0092": "'", "\u2019": "'", "\u203a": "'"}
    | {"\u0093": "``", "\u201c": "``", "\u00ab": "``", "\u0094": "''", "\u201d": "''", "\u00bb": "''"}
)
_CURRENCY = str.maketrans({"\u00a2": "cents", "\u00a3": "#"} | dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"))
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_BRACKETS = {
    "(": "-LRB-",
    ")": "-RRB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "{": "-LCB-",
    "}": "-RCB-",
    "&lt;": "<",
    "&gt;": ">",
}


def _straight_apostrophe(text: str) -> str:
    # UPSTREAM: names of quotation marks are found in any case but replaced in lower case only.
    return text.replace("&apos;", "'").translate(_QUOTES)


def _dashes(text: str) -> str:
    return "--" if len(text) in (3, 4) else text


def _rule(
    token: str,
    follow: str = "",
    write: Callable[[str], str] = _plain,
    *,
    num_given_back: int = 0,
    flags: int = 0,
) -> Rule:
    look = f"(?=({follow}))" if follow else "()"
    # re.ASCII: like the tool, ignoring case pairs the letters A-Z only.
    return Rule(re.compile(f"({token}){look}", flags | re.ASCII), write, num_given_back)


_I = re.IGNORECASE
_SGML_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_SGML = (
    rf"<(?:[!?][A-Za-z\-][^>\r\n]*|/{_SGML_NAME}"
    rf"|{_SGML_NAME}(?: +(?:{_SGML_NAME}(?: *= *(?:\"[^\r\n\"]*\"|'[^\r\n']*'))?|['\"][^\r\n'\"]*['\"]))* */?) *>"
)
_PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
)
_FILLED = '[^ \t\n\f\r"<>|(){}.\u00a0]'

RULES: tuple[Rule, ...] = (
    _rule(r"c\+\+|[cf]\#", flags=_I),
    _rule(r"cannot|'twas", num_given_back=3, flags=_I),
    _rule(r"'tis|gonna|gotta|lemme|gimme|wanna", num_given_back=2, flags=_I),
    _rule(_SGML, write=_no_space),
    _rule("&(?:mdash|ndash|MD);|[\u0096\u0097\u2013-\u2015]", write=lambda text: "--", flags=_I),
    _rule("&amp;", write=_ampersand, flags=_I),
    _rule("&nbsp;", write=lambda text: "", flags=_I),
    _rule("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", flags=_I),
    _rule(_WORD, _AUX, _no_soft_hyphen),
    _rule(r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _NT, _no_soft_hyphen),
    _rule(_WORD, write=_no_soft_hyphen),
    # words written with an apostrophe
    _rule(
        f"{_APOS}n{_APOS}?|[lLdDjJ]{_APOS}|(?:Dunkin|somethin|ol){_APOS}|{_APOS}(?:em|till?|cause)", flags=_I
    ),
    _rule(f"{_APOS}[2-9]0s", flags=_I),
    _rule(rf"[A-HJ-XZn]{_APOS_ANY}[{_L}]{{2,}}|[{_L}]+[aeiouyAEIOUY]{_APOS_ANY}[aeiouA-Z][{_L}]*"),
    _rule(r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l", flags=_I),
    _rule(rf"O{_APOS_ANY}o", flags=_I),
    _rule(f"[yY]{_APOS}", f"[{_L}]"),
    # addresses
    _rule('https?://[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},-]', flags=_I),
    _rule(
        rf'(?:(?i:www)\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}'
        rf"|(?:[^ \t\n\f\r\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu))(?:/{_LINK})?"
    ),
    _rule(
        f'(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|(){{}}\u00a0]*@(?:{_FILLED}+\\.)*{_FILLED}+(?:&gt;|>)?',
        flags=_I,
    ),
    _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|\#{_LETTER}+"),
    # 's, n't
    _rule(_AUX, r"[^A-Za-z]", _straight_apostrophe),
    _rule(_NT, "[^A-Za-z]", _straight_apostrophe),
    # numbers
    _rule(rf"[{_D}]{{1,2}}[-/][{_D}]{{1,2}}[-/][{_D}]{{2,4}}"),
    _rule(rf"[-+]?{_NUM}", write=_no_soft_hyphen),
    _rule("[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule(rf"(?:[{_D}]{{1,4}}[- \u00a0])?[{_D}]{{1,4}}(?:\\?/|\u2044)[{_D}]{{1,4}}", write=_no_space),
    _rule("[\u00bc-\u00be\u2153-\u215e]", write=lambda text: _FRACTIONS.get(text, text)),
    _rule(
        rf"-[RL][RCS]B-|C\.D\.s|pro-|anti-|S(?:&amp;|&)P-500|S(?:&amp;|&)Ls|Cap{_APOS}n|c{_APOS}est",
        write=_ampersand,
        flags=_I,
    ),
    _rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule(r"[A-Z]*\$|\#"),
    _rule("[\u00a2\u00a3\u00a4\u0080\u20a0\u20ac]", write=lambda text: text.translate(_CURRENCY)),
    # abbreviations
    _rule(rf"(?:{_any_of(_BEFORE_NUMBER)})\.", rf"[{SPACES}\n]?[{_D}]", flags=_I),
    _rule(r"[A-Za-z]\.", rf"[{SPACES}\n]+(?:{_STARTS}|{_SGML})[{SPACES}\n]", num_given_back=1),
    _rule(rf"(?:(?i:{_any_of(_ABBREVIATIONS)})|{_CAPITALISED})\.", r"(?s:..)"),
    _rule(rf"(?:(?i:{_any_of(_ABBREVIATIONS)})|{_CAPITALISED})\."),
    _rule(rf"(?i:{_any_of(_TITLES)}|[a-z])\."),
    _rule(rf"{_ACRONYM}\."),
    _rule(_ACRONYM, rf"[{SPACES}\n]"),
    _rule(f"{_APOS}[0-9][0-9]", rf"[{SPACES}\n]"),
    _rule(rf"{_AN}+(?:\.{_AN}+)*\.(?i:{_any_of(_FILE_ENDINGS)})", rf"[{SPACES}\n.?!,]"),
    _rule(rf"{_WORD}\.", _IN_SENTENCE, _no_soft_hyphen),
    _rule(_PHONE, write=_bracketed),
    _rule(r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    # brackets, dashes, marks
    _rule(r"[(){}\[\]<>]|&[lg]t;", write=lambda text: _BRACKETS.get(text.lower(), text), flags=_I),
    _rule("-+", write=_dashes),
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", _bracketed),
    _rule(
        r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", write=_bracketed
    ),
    _rule(r"\.{3,5}|\.[ \u00a0](?:\.[ \u00a0]){1,3}\.|[\u0085\u2026]", write=lambda text: "..."),
    _rule(r"@+|\#+|_+|\*+|(?:\\\*){1,3}|[?!]+|<<|>>"),
    _rule(r"[.,;:]"),
    # compounds
    _rule(rf"{_HYPHENATED}\.", _IN_SENTENCE, _no_soft_hyphen),
    _rule(_HYPHENATED, write=_no_soft_hyphen),
    _rule(rf"{_THING}\.", _IN_SENTENCE),
    _rule(_THING),
    _rule(rf"{_COMPOUND}\.", _IN_SENTENCE, _ampersand),
    _rule(_COMPOUND, write=_ampersand),
    # quotation marks: which side they belong to does not matter, COCO removes both; only odd pairs survive
    _rule("'", "[A-Za-z][^ \t\n\r\u00a0]", lambda text: "`"),
    _rule(_AUX, write=_straight_apostrophe),
    _rule(f"''|{_APOS}", write=_straight_apostrophe),
    _rule("[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{1,2}", write=_straight_apostrophe),
    _rule('"|&quot;', write=lambda text: "''" if text in ('"', "&quot;") else text, flags=_I),
    _rule(f"[{_SYMBOLS}]"),
)
