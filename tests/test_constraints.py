"""The versions that the tests run with are those that setup.py promises."""

import runpy

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.processes import ROOT
from vlgpt.doctor.environment import PACKAGES


@pytest.fixture
def requirements(monkeypatch):
    """What setup.py asks for, of the packages that a developer's environment holds."""
    kept = {}
    monkeypatch.setattr(setuptools, "setup", kept.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    extra = kept["extras_require"]["dev"]
    return {canonicalize_name(r.name): r for r in map(Requirement, [*kept["install_requires"], *extra])}


def pinned(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_every_requirement_is_pinned_inside_its_range(requirements, file):
    versions = pinned(file)
    for name, requirement in requirements.items():
        assert name in versions, f"{file} lacks {name}"
        assert versions[name] in requirement.specifier, f"{file} has {versions[name]}, wanted {requirement}"


def test_the_oldest_versions_are_the_lower_bounds(requirements):
    """Else a bound would promise what no test has seen."""
    versions, tools = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for name, requirement in requirements.items():
        lowest = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==")]
        is_tool = versions[name] == tools[name]
        assert is_tool or lowest == [versions[name]], f"{requirement}: tested with {versions[name]}"


def test_the_doctor_asks_for_the_lower_bounds(requirements):
    """Else it would call an environment sound that setup.py refuses."""
    for name, oldest, _, _ in PACKAGES:
        requirement = requirements[canonicalize_name(name)]
        lowest = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert lowest == [Version(oldest)], name
