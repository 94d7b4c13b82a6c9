"""Measures of the source tree, as a table: `make measure`, or `python benchmarks/house.py [ROOT...]` for other trees.

The figures tell a maintainer where the tree grows hard to read: long files and functions, untyped or undocumented
public names, comments that are missing, import cycles, one class name with two meanings. Tests are left out, except
for their size. A goal stands beside each figure that has one.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"tests", "test", ".git", "build", "dist", "runs"}
# Files that decide numbers: a reader needs the reason for every choice in them.
ALGORITHMIC = (
    "vlgpt/commits.py",
    "vlgpt/data/mixture.py",
    "vlgpt/data/packing.py",
    "vlgpt/data/stream.py",
    "vlgpt/decoding/beams.py",
    "vlgpt/decoding/cache.py",
    "vlgpt/models/language_models.py",
    "vlgpt/models/layers.py",
    "vlgpt/models/losses.py",
    "vlgpt/models/multimodal_lm.py",
    "vlgpt/processes.py",
    "vlgpt/seeds.py",
    "vlgpt/train/engine.py",
    "vlgpt/train/loop.py",
    "data_prep/dedup.py",
    "data_prep/hashes.py",
    "evaluation/metrics/captions.py",
    "evaluation/metrics/fid.py",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One Python file, read and parsed."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> list[Function]:
        """All functions and methods, nested ones too."""
        return [n for n in ast.walk(self.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def classes(self) -> list[ast.ClassDef]:
        """All classes, nested ones too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]


def read_sources(root: Path) -> list[SourceFile]:
    """All Python files below `root` that are not tests."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part in SKIPPED or part.startswith(".") for part in parts):
            continue
        text = path.read_text(encoding="utf-8")
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(SourceFile(path, module, text, ast.parse(text)))
    return found


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def public_definitions(source: SourceFile) -> Iterator[Function | ast.ClassDef]:
    """Classes, functions and methods whose names, and whose classes' names, have no leading underscore."""

    def visit(body: Sequence[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_"):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body)

    yield from visit(source.tree.body)


def is_accessor(node: Function | ast.ClassDef) -> bool:
    """A property of one statement or an overload: its name and type say all."""
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
    return bool(names & {"overload", "setter"}) or ("property" in names and len(node.body) == 1)


def num_comments(source: SourceFile) -> int:
    """Comment lines, on lines of their own or behind code; marks for tools are not counted."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return sum(not comment.startswith(("# noqa", "# type:", "#!", "# ---")) for comment in comments)


def num_any(source: SourceFile) -> int:
    """How often the code names `Any`, imports not counted."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(source.tree))


def import_graph(sources: Sequence[SourceFile]) -> dict[str, set[str]]:
    """Module -> modules of this tree that it imports, at once or inside a function; a package stands for its
    __init__, which any import from it runs first.
    """
    known = {source.module for source in sources}
    graph: dict[str, set[str]] = {}
    for source in sources:
        found: set[str] = set()
        for node in (statement for part in source.tree.body for statement in executed(part)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        parents = {name[:end] for name in found & known for end, char in enumerate(name) if char == "."}
        graph[source.module] = ((found | parents) & known) - {source.module}
        if source.module.count("."):  # a module may import from the package that it lies in
            graph[source.module] -= {source.module[:end] for end, c in enumerate(source.module) if c == "."}
    return graph


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but for what stands there for type checkers only."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from executed(child)


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972), largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                cycles.append(sorted(component))

    sys.setrecursionlimit(10_000)
    for module in sorted(graph):
        if module not in index:
            visit(module)
    return sorted(cycles, key=len, reverse=True)


def shared_class_names(sources: Sequence[SourceFile]) -> dict[str, list[str]]:
    """Public class names that more than one module defines."""
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(source.module)
    return {name: modules for name, modules in places.items() if len(modules) > 1}


def measure(root: Path) -> dict[str, tuple[str, str]]:
    """Measure -> figure and goal, as they are printed."""
    sources = read_sources(root)
    product = [source for source in sources if not source.module.startswith("demo")]
    lines = [source.num_lines for source in sources]
    functions = [node for source in sources for node in source.functions()]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    public = [n for source in sources for n in public_definitions(source) if not is_accessor(n)]
    thousand = sum(lines) / 1000
    algorithmic = [s for s in sources if s.path.relative_to(root).as_posix() in ALGORITHMIC]
    reasons = sum(map(num_comments, algorithmic))
    cycles = import_cycles(import_graph(sources))
    typed = sum(node.returns is not None or node.name == "__init__" for node in functions)
    documented = sum(ast.get_docstring(node) is not None for node in public)
    num_product, num_tests = sum(s.num_lines for s in product), count_test_lines(root)
    return {
        "files / lines": (f"{len(sources)} / {sum(lines)}", ""),
        "lines outside demo/": (str(num_product), "<= 29000"),
        "lines of tests, share of these": (
            f"{num_tests}, {num_tests / max(num_product, 1):.2f}",
            "<= 0.55",
        ),
        "file median / p95 lines": (f"{quantile(lines, 0.5)} / {quantile(lines, 0.95)}", "132 / 307"),
        "function median / p95 / max lines": (
            f"{quantile(lengths, 0.5)} / {quantile(lengths, 0.95)} / {max(lengths)}",
            "7 / 28 / 80",
        ),
        "return types": (f"{100 * typed / len(functions):.1f} %", "100 %"),
        "public docstrings": (f"{100 * documented / len(public):.1f} %", ">= 95 %"),
        "comment lines per 1k, algorithmic files": (
            f"{reasons / max(sum(s.num_lines for s in algorithmic) / 1000, 0.001):.1f}",
            ">= 40",
        ),
        "comment lines per 1k, all": (f"{sum(map(num_comments, sources)) / thousand:.1f}", ""),
        "Any per 1k": (f"{sum(map(num_any, sources)) / thousand:.1f}", "<= 6"),
        "import cycles (modules in the largest)": (
            f"{len(cycles)} ({len(cycles[0]) if cycles else 0})",
            "0",
        ),
        "class names with two meanings": (str(len(shared_class_names(sources))), "0"),
    }


def count_test_lines(root: Path) -> int:
    """Lines of all Python files below `tests/`."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (root / "tests").rglob("*.py"))


def offenders(root: Path) -> dict[str, list[str]]:
    """What stands against each goal, for a maintainer who wants to lower a figure."""
    sources = read_sources(root)
    found: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for node in public_definitions(source):
            if not is_accessor(node) and ast.get_docstring(node) is None:
                found["no docstring"].append(f"{source.module}.{node.name}:{node.lineno}")
        for function in source.functions():
            if function.returns is None and function.name != "__init__":
                found["no return type"].append(f"{source.module}.{function.name}:{function.lineno}")
    for name, modules in shared_class_names(sources).items():
        found["class name with two meanings"].append(f"{name}: {', '.join(modules)}")
    for cycle in import_cycles(import_graph(sources)):
        found["import cycle"].append(" <-> ".join(cycle))
    counted = Counter({source.module: num_any(source) for source in sources})
    found["Any"] = [f"{module}: {count}" for module, count in counted.most_common(20) if count]
    return found


def main() -> int:
    """Command line: prints the measures, with `--offenders` also what misses each goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("roots", nargs="*", type=Path, default=[Path()], help="trees (default: this one)")
    parser.add_argument("--offenders", action="store_true", help="list what stands against each goal")
    arguments = parser.parse_args()
    for root in arguments.roots:
        print(f"{root.resolve().name}")
        for name, (figure, goal) in measure(root).items():
            print(f"  {name:45s} {figure:20s} {goal}")
        if arguments.offenders:
            for kind, names in offenders(root).items():
                print(f"  {kind} ({len(names)})", *names, sep="\n    ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
