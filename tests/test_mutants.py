"""The list of mutants stays true: every line to be broken is still there, and so is every test that must fail."""

import ast
from collections import Counter

import pytest

from tests.helpers.processes import ROOT
from tests.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.law)
def test_a_mutant_has_its_line_and_its_test(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, f"{mutant.file} holds the text to be broken not exactly once"
    broken = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(source)), "the mutant changes nothing"
    file, _, name = mutant.tests.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not name or name.partition("[")[0] in tests, f"{file} has no test {name}"


def test_no_law_is_listed_twice() -> None:
    assert not [law for law, count in Counter(mutant.law for mutant in MUTANTS).items() if count > 1]
