"""report.html and results.json of many results: our numbers beside the paper's tables, and examples with
pictures.

The page is one file without scripts: text is escaped by jinja2, pictures are embedded, and its content
security policy forbids everything else, so a hostile caption or reply stays text.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from evaluation import benchmarks
from evaluation.core import read_json
from evaluation.report_examples import pick, view
from evaluation.score import per_example_path, read_predictions
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic

PAPER = Path(__file__).with_name("paper_values.yaml")
TEMPLATES = Path(__file__).with_name("templates")


def write(output: Path, *, data: Path, names: Sequence[str], skipped: Mapping[str, str]) -> tuple[Path, Path]:
    """Write results.json and report.html of the jobs `names` (folders below `output`).

    Raises UserError when one has no results.json.
    """
    results = {name: read_json(output / name / "results.json") for name in names}
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    summary = {
        "results": results,
        "few_shot": few_shot_means(results),
        "skipped": dict(skipped),
        "paper": paper,
    }
    json_path, html_path = output / "results.json", output / "report.html"
    write_atomic(json_path, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    sections = [_section(name, result, output / name, data) for name, result in results.items()]
    page = render(
        models=models(results),
        overview=overview(results, paper),
        tables=tables(results, paper),
        sections=sections,
        skipped=skipped,
    )
    write_atomic(html_path, page.encode())
    return json_path, html_path


def render(**content: Any) -> str:
    """The page, everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html").render(style=style, style_hash=digest, **content)


def models(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Every model (or fake) that answered, with what identifies it."""
    found: dict[str, dict[str, str]] = {}
    for result in results.values():
        run = result.get("run") or {}
        who = run.get("responder") or {"kind": "predictions of unknown origin"}
        facts = {
            key: str(who[key]) for key in ("export_hash", "dtype", "template", "tokenizer") if key in who
        }
        name = "/".join(Path(who["export"]).parts[-2:]) if "export" in who else who["kind"]
        found.setdefault(json.dumps(who, sort_keys=True), {"name": name, **facts})
    return list(found.values())


def overview(results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each zero-shot result: ours, chance, and the paper's rows where it has that benchmark."""
    columns = paper["table_2"]["columns"]
    lines = []
    for name, result in results.items():
        entry = result["metrics"].get(result["primary"])
        if result["shots"] != "0" or entry is None:
            continue
        at = columns.index(result["benchmark"]) if result["benchmark"] in columns else None
        papers = {
            row: None if at is None else paper["table_2"]["rows"][row][at]
            for row in ("VL-GPT", "VL-GPT-I", "Emu")
        }
        lines.append(
            {"name": name, "metric": result["primary"], "split": result["split"], **entry, "papers": papers}
        )
    return lines


@dataclass(frozen=True)
class Table:
    """One of the paper's tables with our row at the end."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    ours: list[tuple[float, str] | None]

    @property
    def best(self) -> list[float | None]:
        """The paper's best value of each column; FID is the only one where lower is better."""
        values = [[row[at] for _, row in self.rows if row[at] is not None] for at in range(len(self.columns))]
        pick_of = [min if "generation" in column else max for column in self.columns]
        return [choose(column) if column else None for choose, column in zip(pick_of, values)]  # type: ignore[type-var]


PROTOCOL = ("prompt", "second_prompt", "decoding", "shots", "responder", "questions", "subset")
TITLES = {
    "table_1": "Table 1: reconstruction, 100 x CLIP cosine",
    "table_2": "Table 2: understanding and generation",
    "table_3": "Table 3: few-shot VQA, mean of the seeds",
}


def tables(results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Any]) -> list[Table]:
    """Tables 1-3 of the paper; ours with a remark where split or size differ from the paper's."""
    found = []
    for key, title in TITLES.items():
        columns = paper[key]["columns"]
        ours = [_our_value(column, results, paper) for column in columns]
        if any(ours):
            found.append(Table(title, columns, list(paper[key]["rows"].items()), ours))
            if key == "table_2":
                dagger = [_our_value(f"{column} dagger", results, paper) for column in columns]
                if any(dagger):
                    found.append(Table(f"{title}, dagger rows", columns, _dagger_rows(paper), dagger))
    return found


def _dagger_rows(paper: Mapping[str, Any]) -> list[tuple[str, list[float | None]]]:
    return [(name, row) for name, row in paper["table_2"]["rows"].items() if "dagger" in name]


def _our_value(
    column: str, results: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Any]
) -> tuple[float, str] | None:
    """Our primary metric for a column such as "vqav2", "vqav2 dagger" or "vqav2 k=4", and what to bear in
    mind."""
    benchmark, _, shots = column.partition(" ")
    shots = shots.removeprefix("k=") or "0"
    matching = [r for r in results.values() if r["benchmark"] == benchmark and r["shots"] == shots]
    values = [r["metrics"][r["primary"]]["value"] for r in matching if r["primary"] in r["metrics"]]
    if not values:
        return None
    remarks = []
    wanted = paper["table_5"]["rows"].get(benchmark)
    first = matching[0]
    if wanted and not _is_split(first["split"], wanted[0]):
        remarks.append(f"split {first['split']}, paper: {wanted[0]}")
    if first["n"] < first["num_examples"]:
        remarks.append(f"{first['n']} of {first['num_examples']} examples")
    if len(values) > 1:
        remarks.append(f"std {np.std(values):.2f} over {len(values)} seeds")
    return float(np.mean(values)), "; ".join(remarks)


def _is_split(ours: str, paper: str) -> bool:
    """Whether names such as "val2014" and "val", "testdev_balanced" and "test-dev" mean the same split."""
    a, b = (re.sub("[^a-z]", "", name.split(" ")[0].lower()) for name in (ours, paper))
    return a == b or a.removesuffix("balanced") == b


def few_shot_means(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds of each few-shot setting."""
    groups: dict[str, list[float]] = {}
    for result in results.values():
        if result["shots"] != "0" and result["primary"] in result["metrics"]:
            key = f"{result['benchmark']} {result['shots']}"
            groups.setdefault(key, []).append(result["metrics"][result["primary"]]["value"])
    return {
        key: {"mean": float(np.mean(values)), "std": float(np.std(values)), "num_seeds": len(values)}
        for key, values in groups.items()
    }


def _section(name: str, result: Mapping[str, Any], folder: Path, data: Path) -> dict[str, Any]:
    """What the page shows of one result."""
    options = (result.get("run") or {}).get("options") or result["scoring"]["options"]
    benchmark = benchmarks.make(result["benchmark"], **options)
    per_example: dict[str, float] = read_json(per_example_path(folder / "results.json"))
    predictions = {r["id"]: r for r in read_predictions(folder, benchmark)}
    examples = {e.id: e for e in benchmark.examples(data) if e.id in predictions}
    picked = pick(per_example, list(examples), higher_is_better=result["higher_is_better"])
    run = result.get("run") or {}
    protocol = {key: run.get(key) for key in PROTOCOL}
    protocol |= {
        "scoring": result["scoring"]["options"],
        "notes": result["notes"],
        "versions": run.get("versions"),
    }
    return {
        "name": name,
        "result": result,
        "breakdown": {group: _bars(rows) for group, rows in result["breakdown"].items()},
        "protocol": list(_leaves(protocol)),
        "examples": {
            why: [
                {**view(benchmark, examples[id], predictions[id]), "score": per_example.get(id)} for id in ids
            ]
            for why, ids in picked.items()
        },
    }


def _bars(rows: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A breakdown with the length of each bar in percent of the longest."""
    longest = max((abs(entry["value"]) for entry in rows.values()), default=0.0) or 1.0
    return [
        {"name": name, **entry, "bar": 100 * abs(entry["value"]) / longest} for name, entry in rows.items()
    ]


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """ "decoding.num_beams", "5": every leaf of a nested record, without the empty ones."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m evaluation.report", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("output", type=Path, help="folder of evaluation/run_all.sh")
    p.add_argument("--data", type=Path, required=True)
    args = p.parse_args(arguments)
    names = sorted(path.parent.name for path in args.output.glob("*/results.json"))
    if not names:
        raise UserError(f"no results.json below {args.output}; run evaluation/run_all.sh first")
    for path in write(args.output, data=args.data, names=names, skipped={}):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
