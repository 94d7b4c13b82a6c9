"""The house rules, read from the syntax trees: who may import whom, sizes, and what never stands in the code."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.processes import ROOT

PACKAGES = ("vlgpt", "data_prep", "evaluation", "launchers", "demo")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FUNCTION_LINES = 80

# Layers of the library: a module imports its own package, lower layers, and names to its left in its own cell.
LAYERS: list[list[list[str]]] = [
    [
        [
            "errors",
            "seeds",
            "log",
            "files",
            "commits",
            "processes",
            "options",
            "html",
            "registry",
            "document",
            "registry",
            "settings",
            "config",
        ]
    ],
    [["image_formats", "images", "turns", "tokens", "batch", "shards"]],
    [["data"], ["models"]],
    [["model_card", "decoding", "export", "stages", "chat", "hf"]],
    [["planning", "train"]],
    [["doctor", "server"]],
    [["cli", "__main__"]],
]
ONE_IMPORTER = {
    "deepspeed": {"vlgpt/train/engine.py"},
    "diffusers": {"vlgpt/models/diffusion.py"},
    "peft": {"vlgpt/models/multimodal_lm.py"},
    "open_clip": {"vlgpt/models/encoders.py", "demo/clip.py"},
    "uvicorn": {"vlgpt/server/app.py"},
    "fastapi": {"vlgpt/server/app.py"},
    "starlette": {"vlgpt/server/app.py", "vlgpt/chat/page.py"},
    "prometheus_client": {"vlgpt/server/metrics.py"},
    "gradio": {"vlgpt/chat/page.py"},
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Every absolute module name a file imports, with the line; relative imports are an error."""
    found = []
    for node in ast.walk(tree_of(path)):
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


def test_a_module_imports_only_lower_layers_and_names_to_its_left():
    offenders = []
    for path in (p for p in FILES if p.is_relative_to(ROOT / "vlgpt")):
        own = part_of(path)
        for name, line in imports(path):
            if name.split(".")[0] in ("data_prep", "evaluation", "launchers", "tests"):
                offenders.append(f"{path}:{line} imports {name}")
            if not name.startswith("vlgpt.") or name.split(".")[1] == own:
                continue
            other = name.split(".")[1]
            if own == "__init__" or not is_below(other, own):
                offenders.append(f"{path}:{line}: vlgpt.{own} may not import vlgpt.{other}")
    assert not offenders, "\n".join(offenders)


def is_below(other: str, own: str) -> bool:
    (layer, cell, position), (their_layer, their_cell, their_position) = place(own), place(other)
    return their_layer < layer or (their_layer == layer and their_cell == cell and their_position < position)


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """Names that a module imports when it is imported itself: outside functions and `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from () if is_for_types else imported_at_once(child)


def test_no_module_imports_itself_through_others():
    """Cycles work by luck: which module of one is imported first decides whether its names are there."""
    graph = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = ".".join(parts).removesuffix(".__init__")
        wanted = set(imported_at_once(tree_of(path)))
        packages = {name[:at] for name in wanted for at in range(len(name)) if name[at] == "."}
        graph[own] = (wanted | {name for name in packages if not own.startswith(f"{name}.")}) - {own}
    while leaves := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        for name in leaves:
            del graph[name]
    while roots := graph.keys() - {name for wanted in graph.values() for name in wanted}:
        for name in roots:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_one_importer_of_each_heavy_library():
    offenders = []
    for path in FILES:
        relative = path.relative_to(ROOT).as_posix()
        for name, line in imports(path):
            top = name.split(".")[0]
            is_allowed = (
                relative in ONE_IMPORTER.get(top, {relative})
                and (top not in ("tarfile", "webdataset") or relative.startswith("vlgpt/shards/"))
                and (not name.startswith("torch.distributed") or relative.startswith("vlgpt/train/"))
                and top not in ("dill", "joblib", "cloudpickle")
            )
            if not is_allowed:
                offenders.append(f"{relative}:{line} imports {name}")
    assert not offenders, "\n".join(offenders)


def test_data_prep_and_evaluation_stay_apart():
    forbidden = {"data_prep": ("vlgpt.train", "evaluation"), "evaluation": ("vlgpt.train", "data_prep")}
    offenders = [
        f"{path}:{line} imports {name}"
        for path in FILES
        for name, line in imports(path)
        if name.startswith(forbidden.get(path.relative_to(ROOT).parts[0], ("no module",)))
    ]
    assert not offenders, "\n".join(offenders)


def test_functions_stay_readable():
    offenders = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    offenders.append(f"{path}:{node.lineno} {node.name} has {lines} lines")
    assert not offenders, "\n".join(offenders)


def test_loads_stay_safe_no_error_is_swallowed_and_the_library_does_not_print():
    unsafe = re.compile(r"trust_remote_code\s*=\s*True|\bpickle\.(load|Unpickler\b)|weights_only\s*=\s*False")
    offenders = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        offenders += [f"{path}: {found[0]}" for found in unsafe.finditer(text)]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                offenders.append(f"{path}:{node.lineno}: bare except")
            is_print = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            )
            if is_print and path.is_relative_to(ROOT / "vlgpt"):
                offenders.append(f"{path}:{node.lineno} prints")
    assert not offenders, "\n".join(offenders)


def test_no_module_of_the_library_but_the_command_line_and_its_options_uses_argparse():
    allowed = {ROOT / "vlgpt" / "cli.py", ROOT / "vlgpt" / "options.py"}
    users = {
        path for path in FILES if "argparse" in dict(imports(path)) and path.is_relative_to(ROOT / "vlgpt")
    }
    assert not users - allowed


def test_launchers_are_thin():
    launchers = [*(ROOT / "launchers").glob("*.py"), ROOT / "demo" / "train_parts.py"]
    assert [path for path in launchers if len(path.read_text().splitlines()) > 20] == []


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


def test_every_folder_of_tests_is_a_package():
    """So a module is imported as `tests.folder.name`: two folders may hold the same name, and none is on the path."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    paths = [
        path for path in (ROOT / "tests").rglob("*.py") if re.search(r"^sys\.path", path.read_text(), re.M)
    ]
    assert paths == [], "import from tests.helpers"


def test_every_name_of_the_walk_of_one_image_exists():
    walk = (
        (ROOT / "docs" / "architecture.md").read_text().split("## The walk of one image")[1].split("\n## ")[0]
    )
    stops = [line for line in walk.splitlines() if re.match(r"\| \d+ \|", line)]
    assert 10 <= len(stops) <= 25
    missing = []
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", walk):
        names = [
            node.name
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        missing += [] if name in names else [f"{file}::{name}"]
    assert not missing, "\n".join(missing)


def test_every_file_that_the_docs_name_exists():
    """A path with a folder, from the root or from a package."""
    bases = (ROOT, *(ROOT / package for package in PACKAGES))
    missing = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("demo/*.md")]:
        if page.name == "CHANGELOG.md":
            continue
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            for path in re.findall(
                r"(?<![\w/.{*-])[a-z_][\w-]*/[\w/.-]+\.(?:py|yaml|sh|sbatch)\b(?![*{])", line
            ):
                is_of_readers = path.startswith("mylab/")  # docs/extending.md
                if not is_of_readers and not any((base / path).exists() for base in bases):
                    missing.append(f"{page.name}:{number} {path}")
    assert not missing, "\n".join(missing)
