"""docs/troubleshooting.md has an entry for every message that training raises or logs as an error."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = re.sub(r"\s+", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
ERRORS = ("UserError", "TrainingStopped", "NotEnoughSpace", "FileNotFoundError", "ValueError", "OSError")
LOGGED = ("error", "warning")
FILES = [*sorted((ROOT / "vlgpt" / "train").glob("*.py")), ROOT / "evaluation" / "training_probe.py"]


def literal_parts(node):
    """The texts between the values of a string, an f-string or a %-format."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[-\d.,]*[a-z]", node.value)
    if isinstance(node, ast.JoinedStr):
        return [p for value in node.values if isinstance(value, ast.Constant) for p in literal_parts(value)]
    if isinstance(node, ast.BinOp):
        return literal_parts(node.left) + literal_parts(node.right)
    return []


def spoken(node):
    """The string of a call that raises or logs, of an assigned refusal, or of a returned contradiction."""
    if isinstance(node, ast.Call) and node.args:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        is_log = name in LOGGED and "ogger" in ast.unparse(node.func)
        return node.args[0] if name in ERRORS or is_log else None
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("refusal", "damage"):
        return node.value
    return node.value if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr) else None


def messages(path):
    """(line, longest fixed piece of the message) of everything raised, refused or logged in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = spoken(node)
        pieces = [re.sub(r"\s+", " ", p).strip(" :;,.()'\"") for p in literal_parts(text)] if text else []
        piece = max(pieces, key=len, default="")
        if len(piece) >= 10:
            yield node.lineno, piece


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_message_has_an_entry(path):
    missing = [f"{path.name}:{line}: {piece}" for line, piece in messages(path) if piece not in PAGE]
    assert not missing, "write into docs/troubleshooting.md:\n" + "\n".join(missing)


def test_the_reader_of_messages_finds_them():
    found = [piece for path in FILES for _, piece in messages(path)]
    assert len(found) > 35
    assert any("is taken twice" in piece for piece in found)
