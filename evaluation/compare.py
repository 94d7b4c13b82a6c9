"""What differs between two results: `python -m evaluation.compare A/results.json B/results.json`.

Published numbers disagree for mundane reasons, so the protocol comes first: prompt, decoding, shots, metric
mode, split, data, weights, library versions. The difference of the primary metric comes with a paired
bootstrap interval over the examples that both scored (for corpus metrics such as CIDEr: over per-example scores).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.table import Table

from evaluation import manifest
from evaluation.core import JsonObject, Record, read_json
from evaluation.metrics.bootstrap import CONFIDENCE, paired_bootstrap
from evaluation.score import per_example_path
from vlgpt.errors import UserError, run_command
from vlgpt.options import Argument, Options, parse

PROTOCOL = ("benchmark", "split", "shots", "n", "num_examples", "ids", "scoring", "notes", "run")


class CompareOptions(Options):
    """The command line."""

    a: Annotated[Path, Argument(is_positional=True)] = Field(description="results.json")
    b: Annotated[Path, Argument(is_positional=True)] = Field(description="results.json")
    seed: int = Field(0, description="of the bootstrap")
    as_json: Annotated[bool, Argument(flag="--json")] = Field(False, description="print JSON")


def compare(a: Path, b: Path, *, seed: int = 0) -> JsonObject:
    """Both results side by side: protocol differences, metrics, and the paired interval of A - B.

    Raises UserError when the two are results of different benchmarks.
    """
    left, right = read_json(a), read_json(b)
    if left["benchmark"] != right["benchmark"]:
        raise UserError(
            f"{a} is a result of {left['benchmark']}, {b} of {right['benchmark']}: nothing to compare"
        )
    names = [name for name in left["metrics"] if name in right["metrics"]]
    values = {name: (left["metrics"][name]["value"], right["metrics"][name]["value"]) for name in names}
    protocols = [{key: result.get(key) for key in PROTOCOL} for result in (left, right)]
    return {
        "benchmark": left["benchmark"],
        "primary": left["primary"],
        "protocol": manifest.differences(*protocols),
        "metrics": {name: {"a": x, "b": y, "difference": x - y} for name, (x, y) in values.items()},
        "paired": _paired(a, b, seed=seed),
    }


def _paired(a: Path, b: Path, *, seed: int) -> JsonObject | None:
    """Bootstrap of the mean difference over the examples of both; None where examples have no scores."""
    files = per_example_path(a), per_example_path(b)
    if not all(file.is_file() for file in files):
        return None
    left, right = (read_json(file) for file in files)
    ids = [id for id in left if id in right]
    if not ids:
        return None
    interval = paired_bootstrap([left[id] for id in ids], [right[id] for id in ids], seed=seed)
    return {
        "num_pairs": len(ids),
        "only_in_a": len(left) - len(ids),
        "only_in_b": len(right) - len(ids),
        "difference": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "confidence": CONFIDENCE,
        "is_significant": interval.low > 0 or interval.high < 0,
    }


def show(comparison: Record, console: Console) -> None:
    """The comparison as text: first what makes the two incomparable."""
    console.print(f"{comparison['benchmark']}: {len(comparison['protocol'])} differences in protocol (A | B)")
    for line in comparison["protocol"]:
        console.print(f"  {line}", markup=False, highlight=False)
    table = Table("metric", "A", "B", "A - B")
    for name, row in comparison["metrics"].items():
        table.add_row(name, f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}")
    console.print(table)
    if paired := comparison["paired"]:
        verdict = "they differ" if paired["is_significant"] else "they may be equal"
        console.print(
            f"{comparison['primary']}, {paired['num_pairs']} pairs: {paired['difference']:+.4f} "
            f"({paired['confidence']:.0%} interval {paired['low']:+.4f} to {paired['high']:+.4f}): {verdict}",
            markup=False,
        )
    else:
        console.print("no per-example scores: no interval")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: prints the comparison, as a table or as JSON."""
    description = (__doc__ or "").split("\n")[0]
    options = parse(CompareOptions, arguments, prog="python -m evaluation.compare", description=description)
    comparison = compare(options.a, options.b, seed=options.seed)
    if options.as_json:
        print(json.dumps(comparison, indent=1, ensure_ascii=False))
    else:
        show(comparison, Console())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
