"""The house rules, read from the syntax trees: who may import whom, sizes, and what never stands in the code."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("vlgpt", "data_prep", "evaluation", "launchers")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FUNCTION_LINES = 80

# Layers of the library: a module imports its own package, lower layers, and names to its left in its own cell.
LAYERS: list[list[list[str]]] = [
    [["seeds", "log", "files", "document", "settings", "config"]],
    [["images", "turns", "tokens", "batch", "shards"]],
    [["data"], ["models"]],
    [["stages", "model_card", "decoding", "generate", "chat", "hf", "export"]],
    [["train", "planning"]],
    [["doctor", "server"]],
    [["cli", "__main__"]],
]
ONE_IMPORTER = {
    "deepspeed": {"vlgpt/train/engine.py"},
    "diffusers": {"vlgpt/models/diffusion.py"},
    "peft": {"vlgpt/models/multimodal_lm.py"},
    "open_clip": {"vlgpt/models/encoders.py"},
    "uvicorn": {"vlgpt/server/app.py"},
    "fastapi": {"vlgpt/server/app.py"},
    "starlette": {"vlgpt/server/app.py", "launchers/chat.py"},
    "prometheus_client": {"vlgpt/server/metrics.py"},
    "gradio": {"launchers/chat.py", "launchers/chat_page.py"},
}


def imports(path: Path) -> list[tuple[str, int]]:
    """Every absolute module name a file imports, with the line; relative imports are an error."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            if module == "vlgpt":
                found += [(f"vlgpt.{alias.name}", node.lineno) for alias in node.names]
            else:
                found.append((module, node.lineno))
    return found


def place(name: str) -> tuple[int, int, int]:
    """Layer, cell and position of a top-level name of vlgpt."""
    for layer, cells in enumerate(LAYERS):
        for cell, names in enumerate(cells):
            if name in names:
                return layer, cell, names.index(name)
    raise AssertionError(f"vlgpt.{name} has no place in the layers: add it to DESIGN and to this test")


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "vlgpt").parts
    return relative[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "vlgpt")], ids=str)
def test_a_module_imports_only_lower_layers_and_names_to_its_left(path):
    own = part_of(path)
    if own == "__init__":
        assert not [name for name, _ in imports(path) if name.startswith("vlgpt")]
        return
    for name, line in imports(path):
        if not name.startswith("vlgpt."):
            assert name.split(".")[0] not in ("data_prep", "evaluation", "launchers", "tests"), (
                f"{path}:{line}"
            )
            continue
        other = name.split(".")[1]
        if other == own:
            continue
        (layer, cell, position), (their_layer, their_cell, their_position) = place(own), place(other)
        is_left = their_layer == layer and their_cell == cell and their_position < position
        assert their_layer < layer or is_left, f"{path}:{line}: vlgpt.{own} may not import vlgpt.{other}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_one_importer_of_each_heavy_library(path):
    relative = path.relative_to(ROOT).as_posix()
    for name, line in imports(path):
        top = name.split(".")[0]
        if top in ONE_IMPORTER:
            assert relative in ONE_IMPORTER[top], f"{relative}:{line} imports {top}"
        if top in ("tarfile", "webdataset"):
            assert relative.startswith("vlgpt/shards/"), f"{relative}:{line} imports {top}"
        if name.startswith("torch.distributed"):
            assert relative.startswith("vlgpt/train/"), f"{relative}:{line} imports torch.distributed"
        assert top not in ("dill", "joblib", "cloudpickle"), f"{relative}:{line} imports {top}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_data_prep_and_evaluation_stay_apart(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = {
        "data_prep": ("vlgpt.train", "evaluation"),
        "evaluation": ("vlgpt.train", "data_prep"),
    }.get(package, ())
    for name, line in imports(path):
        assert not name.startswith(tuple(forbidden)) or not forbidden, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_stay_readable_and_loads_stay_safe(path):
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines"
        if isinstance(node, ast.ExceptHandler):
            is_bare = node.type is None
            assert not is_bare, f"{path}:{node.lineno}: bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert not path.is_relative_to(ROOT / "vlgpt"), f"{path}:{node.lineno} prints"
    assert not re.search(r"trust_remote_code\s*=\s*True", text), path
    assert not re.search(r"\bpickle\.(load|Unpickler\b)", text), path
    assert not re.search(r"weights_only\s*=\s*False", text), path


def test_no_module_of_the_library_but_the_command_line_uses_argparse():
    users = [
        p.name
        for p in FILES
        if p.is_relative_to(ROOT / "vlgpt")
        for name, _ in imports(p)
        if name == "argparse"
    ]
    assert set(users) <= {"cli.py"}


def test_launchers_are_thin():
    for name in ("train_tokenizer", "pretrain", "finetune", "train_demo_parts"):
        assert len((ROOT / "launchers" / f"{name}.py").read_text().splitlines()) <= 20


def test_every_deviation_from_the_paper_names_its_section_and_stands_in_the_docs():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page.split("## Where we leave the paper")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([\w/]+\.(?:py|yaml))`", table))
    marked, without = set(), []
    for path in [*FILES, *(ROOT / "launchers").rglob("*.yaml")]:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        for mark in re.finditer("PAPER:", text):
            marked.add(name)
            if not re.search("§|table", text[mark.start() : mark.start() + 220]):
                without.append(f"{name}:{text.count(chr(10), 0, mark.start()) + 1}")
    assert not without, "no section of the paper beside these marks"
    assert marked == listed


def test_modules_of_the_tests_have_names_of_their_own():
    """pytest puts every test folder on the path: of two modules with one name, the second would never be imported."""
    names = Counter(
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if path.name not in ("conftest.py", "__init__.py")
    )
    assert [name for name, count in names.items() if count > 1] == []
