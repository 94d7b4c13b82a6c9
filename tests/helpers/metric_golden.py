"""Inputs with the outputs of official evaluators; `source` in each file names the code that was run."""

import json
from typing import Any

from tests.helpers.processes import ROOT

FOLDER = ROOT / "tests" / "assets" / "golden"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
