"""The list of mutants stays true: every line to be broken is still there, and so is every test that must fail."""

import ast
from collections import Counter
from functools import cache

from tests.helpers.processes import ROOT
from tests.mutants import MUTANTS, Mutant


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def fault_of(mutant: Mutant) -> str | None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        return f"{mutant.file} holds the text to be broken not exactly once"
    if ast.dump(ast.parse(source.replace(mutant.old, mutant.new))) == ast.dump(ast.parse(source)):
        return "the mutant changes nothing"
    file, _, name = mutant.tests.partition("::")
    return f"{file} has no test {name}" if name and name.partition("[")[0] not in names_in(file) else None


def test_every_mutant_has_its_line_and_its_test() -> None:
    faults = {mutant.law: fault for mutant in MUTANTS if (fault := fault_of(mutant))}
    assert not faults, "\n".join(f"{law}: {fault}" for law, fault in faults.items())


def test_no_law_is_listed_twice() -> None:
    assert not [law for law, count in Counter(mutant.law for mutant in MUTANTS).items() if count > 1]
