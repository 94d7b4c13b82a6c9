"""docs/troubleshooting.md has an entry for every message that training raises or logs as an error."""

import ast
import json
import re

import pytest

from tests.helpers.processes import ROOT
from vlgpt.config import load_run
from vlgpt.train.ds_config import lint, merge_config, read_config

PAGE = re.sub(r"\s+", " ", (ROOT / "docs" / "troubleshooting.md").read_text())
ERRORS = ("UserError", "TrainingStopped", "CommitFailed", "FileNotFoundError", "ValueError", "OSError")
LOGGED = ("error", "warning")
FILES = [
    *sorted((ROOT / "vlgpt" / "train").glob("*.py")),
    ROOT / "vlgpt" / "commits.py",
    ROOT / "evaluation" / "training_probe.py",
]


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


def test_every_message_has_an_entry():
    found = {f"{path.name}:{line}": piece for path in FILES for line, piece in messages(path)}
    assert len(found) > 35 and any("is taken twice" in piece for piece in found.values())
    missing = [f"{place}: {piece}" for place, piece in found.items() if piece not in PAGE]
    assert not missing, "write into docs/troubleshooting.md:\n" + "\n".join(missing)


# ------------------------------------------------------------------------------------------------- commands of the page

TRAINING = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [
    line
    for line in TRAINING.splitlines()
    if re.match(r"(deepspeed|torchrun|sbatch|python) .*launchers/", line)
]


def number(command, option):
    found = re.search(rf"{option}[ =](\d+)", command)
    return int(found[1]) if found else 1


def world_size(command):
    if command.startswith("sbatch"):
        return number(command, "--nodes") * number(command, "--ntasks-per-node")
    return number(command, "--num_gpus") * number(command, "--nproc_per_node") * number(command, "--nnodes")


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_every_command_of_the_training_page_starts_a_run_that_divides_its_batch(command):
    words = command.split()
    launcher = next(w for w in words if re.fullmatch(r"launchers/(train_tokenizer|pretrain|finetune)\.py", w))
    config, json_file = words[words.index("--config") + 1], words[words.index("--deepspeed") + 1]
    settings = load_run(ROOT / config, [word for word in words if re.match(r"[a-z_.]+=", word)])
    assert (ROOT / launcher).is_file()
    assert settings.accumulation(world_size(command)) >= 1
    merged = merge_config(
        settings, read_config(ROOT / json_file), world_size=world_size(command), source=json_file
    )
    assert lint(merged, source=json_file) == []


def test_the_page_covers_three_stages_on_8_32_and_4_gpus():
    found = {(re.search(r"launchers/(\w+)\.py --deep", c)[1], world_size(c)) for c in COMMANDS}
    stages = ("train_tokenizer", "pretrain", "finetune")
    assert {(stage, size) for stage in stages for size in (8, 32, 4)} <= found


def test_every_key_of_the_deepspeed_files_is_explained():
    for path in (ROOT / "ds_configs").glob("*.json"):
        content = json.loads(path.read_text())
        for key in [*content, *content["zero_optimization"]]:
            assert key == "zero_optimization" or f"`{key}" in TRAINING, f"{path.name}: {key}"
