"""Caption tokenisation as in pycocoevalcap 1.2: Stanford tokenizer 3.4.1, lower case, punctuation removed.

`tokenize` runs in pure Python (the default) or calls the original Java tool. The Python scanner gives the
Java tool's output on real captions and on almost any random mixture of characters (docs/evaluation.md has the
counts).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from evaluation.metrics.ptb_rules import RULES

TokenizerName = Literal["python", "java"]

# UPSTREAM: pycocoevalcap/tokenizer/ptbtokenizer.py; it lists brackets in upper case ("-LRB-") too, but the
# tool writes them in lower case, so they are never removed from captions.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
# A match means that a token may depend on the text behind the next space: numbers and phone numbers, dots, tags,
# single letters with a full stop ("plan B. The"), abbreviations before a number at the end of a line.
_SPACED_CONTEXT = re.compile(
    r"[\d)] \d|\. [.\d]|[<\t\u00a0\u2000-\u200a\u3000]"
    r"|(?:(?<![A-Za-z])|(?<=['\u2019][sdmSDM]))[A-Za-z]\.(?: +[A-Z]| *$)|(?i:ca|figs?|prop|nos?|art|pp|op)\.$"
)
_SIMPLE_WORD = re.compile(r"[A-Za-z]+,?")
_PLAIN_WORD = re.compile("[A-Za-z]+(?= )")
_SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_MAX_CACHED = 500_000
JAVA_TIMEOUT_S = 600.0

_cache: dict[str, tuple[str, ...]] = {}


def tokenize(captions: Sequence[str], *, tokenizer: TokenizerName = "python") -> list[str]:
    """Tokenise captions for CIDEr, BLEU and ROUGE: in input order, tokens joined by one space.

    Line-break characters inside a caption become spaces first. In the original tool a carriage return or
    U+2028 starts a new line, which silently gives every later caption to the wrong image.

    Raises ValueError for an unknown tokenizer, FileNotFoundError where the Java tool is not installed.
    """
    lines = [_LINE_BREAKS.sub(" ", caption) for caption in captions]
    if tokenizer == "java":
        return _tokenize_java(lines)
    if tokenizer != "python":
        raise ValueError(f"tokenizer is {tokenizer!r}; wanted 'python' or 'java'")
    return [_tokenize_line(lines, index) for index in range(len(lines))]


def _tokenize_line(lines: Sequence[str], index: int) -> str:
    line = lines[index]
    if index + 1 == len(lines) or _SPACED_CONTEXT.search(line):
        # UPSTREAM: the tool reads all captions as one text; a final "D." loses its full stop if "A ..." is next.
        follow = "\n" + "\n".join(lines[index + 1 : index + 3]) + "\n" if index + 1 < len(lines) else ""
        return " ".join(_without_punctuation(scan(line, follow)))
    # All other captions are cut at spaces: captions repeat their words, so nearly every chunk is in the cache.
    tokens: list[str] = []
    for chunk in line.split(" "):
        if chunk:
            known = _cache.get(chunk)
            tokens.extend(known if known is not None else _tokenize_chunk(chunk))
    return " ".join(tokens)


def _without_punctuation(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(token for token in tokens if token not in PUNCTUATION)


def _tokenize_chunk(chunk: str) -> tuple[str, ...]:
    """Tokens of text without spaces that is followed by a space; the result is cached."""
    word = chunk.rstrip(",").lower()
    if _SIMPLE_WORD.fullmatch(chunk) and word not in _SPLIT_WORDS:
        tokens: tuple[str, ...] = (word,)
    else:
        tokens = _without_punctuation(scan(chunk, " "))
    if len(_cache) < _MAX_CACHED:
        _cache[chunk] = tokens
    return tokens


def scan(text: str, follow: str = "\n") -> list[str]:
    """All tokens of `text` in lower case, punctuation included; `follow` is only looked at."""
    units = _utf16_units(text)
    end, padded = len(units), units + _utf16_units(follow)
    tokens, position = [], 0
    while position < end:
        if padded[position] == " ":
            position += 1
            continue
        # Most words take this short way: no rule that begins with a letter can cross a space.
        plain = _PLAIN_WORD.match(padded, position)
        if plain is not None and plain.group().lower() not in _SPLIT_WORDS:
            tokens.append(plain.group().lower())
            position = plain.end()
            continue
        longest, found = 0, None
        for rule in RULES:
            match = rule.pattern.match(padded, position)
            if match is not None and match.end(2) - position > longest:
                longest, found = match.end(2) - position, (rule, match.group(1))
        # The tool drops what no rule knows: pictographs, control characters, unusual spaces.
        if found is None:
            position += 1
            continue
        rule, taken = found
        taken = taken[: len(taken) - rule.num_given_back]
        position += len(taken)
        token = rule.write(taken)
        if token:
            tokens.append(_from_utf16_units(token).lower())
    return tokens


def _utf16_units(text: str) -> str:
    """One character per 16-bit unit, as Java sees text."""
    # Without this, a pictograph (two units) would count as one character for the longest match.
    if not text or max(text) <= "\uffff":
        return text
    encoded = text.encode("utf-16-le", "surrogatepass")
    return "".join(map(chr, struct.unpack(f"<{len(encoded) // 2}H", encoded)))


def _from_utf16_units(text: str) -> str:
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def find_java_tokenizer() -> Path | None:
    """The jar inside an installed pycocoevalcap, or None where it or `java` is missing."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or shutil.which("java") is None:
        return None
    for folder in spec.submodule_search_locations or ():
        jar = Path(folder) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
        if jar.is_file():
            return jar
    return None


def _tokenize_java(lines: Sequence[str]) -> list[str]:
    jar = find_java_tokenizer()
    if jar is None:
        raise FileNotFoundError(
            "tokenizer 'java' needs a `java` command and pycocoevalcap (pip install pycocoevalcap); "
            "install them or use tokenizer 'python'"
        )
    if not lines:
        return []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "captions.txt"
        source.write_text("\n".join(lines), encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", str(source)]
        done = subprocess.run(command, capture_output=True, check=True, timeout=JAVA_TIMEOUT_S)
    output = done.stdout.decode("utf-8").split("\n")
    if len(output) < len(lines):
        raise RuntimeError(f"the Java tokenizer gave {len(output)} lines for {len(lines)} captions")
    return [" ".join(_without_punctuation(line.rstrip().split(" "))) for line in output[: len(lines)]]
