"""report.html and results.json of many results: our numbers beside the paper's tables, and examples with images.

The page is one file without scripts, and what data sets and models wrote stays text (`vlgpt/html.py`).
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import yaml
from PIL import Image
from pydantic import Field

from evaluation import benchmarks
from evaluation.core import (
    IMAGE_KINDS,
    Benchmark,
    Example,
    JsonObject,
    Metric,
    Prediction,
    Record,
    read_image,
    read_json,
)
from evaluation.score import per_example_path, read_predictions
from vlgpt import seeds
from vlgpt.document import ImagePart
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.html import page
from vlgpt.images import data_uri, thumbnail
from vlgpt.options import Argument, Options, parse

PAPER = Path(__file__).with_name("paper_values.yaml")
TEMPLATES = Path(__file__).with_name("templates")
NUM_EXAMPLES = {"best": 7, "worst": 7, "random": 6}
THUMBNAIL_PX = 200
MAX_TEXT = 600
PROTOCOL = ("prompt", "second_prompt", "decoding", "shots", "responder", "questions", "subset")
TITLES = {
    "table_1": "Table 1: reconstruction, 100 x CLIP cosine",
    "table_2": "Table 2: understanding and generation",
    "table_3": "Table 3: few-shot VQA, mean of the seeds",
}
Results: TypeAlias = Mapping[str, Record]
"""Results by job name."""


class ReportOptions(Options):
    """The command line."""

    output: Annotated[Path, Argument(is_positional=True)] = Field(
        description="folder of evaluation/run_all.sh"
    )
    data: Path


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
    write_atomic(json_path, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    html = page(
        (TEMPLATES / "report.html").read_text(encoding="utf-8"),
        title="VL-GPT evaluation",
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        models=models(results),
        overview=overview(results, paper),
        few_shot=summary["few_shot"],
        tables=tables(results, paper),
        sections=[_section(name, result, output / name, data) for name, result in results.items()],
        skipped=skipped,
    )
    write_atomic(html_path, html)
    return json_path, html_path


def models(results: Results) -> list[dict[str, str]]:
    """Every model (or fake) that answered, with what identifies it."""
    found: dict[str, dict[str, str]] = {}
    for result in results.values():
        who = (result.get("run") or {}).get("responder") or {"kind": "predictions of unknown origin"}
        facts = {
            key: str(who[key]) for key in ("export_hash", "dtype", "template", "tokenizer") if key in who
        }
        name = "/".join(Path(who["export"]).parts[-2:]) if "export" in who else who["kind"]
        found.setdefault(json.dumps(who, sort_keys=True), {"name": name, **facts})
    return list(found.values())


def overview(results: Results, paper: Record) -> list[JsonObject]:
    """One line for each zero-shot result: ours, chance, and the paper's rows where it has that benchmark."""
    columns, rows = paper["table_2"]["columns"], paper["table_2"]["rows"]
    lines = []
    for name, result in results.items():
        entry = result["metrics"].get(result["primary"])
        if result["shots"] != "0" or entry is None:
            continue
        at = columns.index(result["benchmark"]) if result["benchmark"] in columns else None
        papers = {row: None if at is None else rows[row][at] for row in ("VL-GPT", "VL-GPT-I", "Emu")}
        line = {"name": name, "metric": result["primary"], "split": result["split"]}
        lines.append({**line, **entry, "papers": papers})
    return lines


@dataclass(frozen=True)
class Table:
    """One of the paper's tables with our row at the end: a value and a remark, None for an empty cell."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    ours: list[tuple[float, str] | None]

    @property
    def best(self) -> list[float | None]:
        """The paper's best value of each column; FID is the only one where lower is better."""
        best: list[float | None] = []
        for at, column in enumerate(self.columns):
            values = [value for _, row in self.rows if (value := row[at]) is not None]
            choose = min if "generation" in column else max
            best.append(choose(values) if values else None)
        return best


def tables(results: Results, paper: Record) -> list[Table]:
    """Tables 1-3 of the paper; ours with a remark where split or size differ from the paper's."""
    found = []
    for key, title in TITLES.items():
        columns, rows = paper[key]["columns"], list(paper[key]["rows"].items())
        ours = [_our_value(column, results, paper) for column in columns]
        if not any(ours):
            continue
        found.append(Table(title, columns, rows, ours))
        dagger = [_our_value(f"{column} dagger", results, paper) for column in columns]
        if key == "table_2" and any(dagger):
            rows = [(name, row) for name, row in rows if "dagger" in name]
            found.append(Table(f"{title}, dagger rows", columns, rows, dagger))
    return found


def _our_value(column: str, results: Results, paper: Record) -> tuple[float, str] | None:
    """Our primary metric for a column such as "vqav2", "vqav2 dagger" or "vqav2 k=4", and a remark."""
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


def few_shot_means(results: Results) -> dict[str, dict[str, float]]:
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


def _section(name: str, result: Record, folder: Path, data: Path) -> JsonObject:
    """What the page shows of one result."""
    run = result.get("run") or {}
    options = run.get("options") or result["scoring"]["options"]
    benchmark = benchmarks.make(result["benchmark"], **options)
    per_example: dict[str, float] = read_json(per_example_path(folder / "results.json"))
    predictions = {r["id"]: r for r in read_predictions(folder, benchmark)}
    examples = {e.id: e for e in benchmark.examples(data) if e.id in predictions}
    protocol = {key: run.get(key) for key in PROTOCOL}
    protocol |= {"scoring": result["scoring"]["options"], "notes": result["notes"]}
    protocol["versions"] = run.get("versions")
    picked = pick(per_example, list(examples), higher_is_better=result["higher_is_better"])
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


def _bars(rows: Mapping[str, Metric]) -> list[JsonObject]:
    """A breakdown with the length of each bar in percent of the longest."""
    longest = max((abs(entry["value"]) for entry in rows.values()), default=0.0) or 1.0
    return [
        {"name": name, **entry, "bar": 100 * abs(entry["value"]) / longest} for name, entry in rows.items()
    ]


def _leaves(record: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    """("decoding.num_beams", "5"): every leaf of a nested record, without the empty ones."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pick(
    per_example: Mapping[str, float], ids: Sequence[str], *, higher_is_better: bool = True
) -> dict[str, list[str]]:
    """Best, worst and random ids, each at most once; without scores only random ones."""
    sign = -1 if higher_is_better else 1
    order = sorted((id for id in ids if id in per_example), key=lambda id: (sign * per_example[id], id))
    random = sorted(ids, key=lambda id: seeds.address("report", id))
    ranked = {"best": order, "worst": order[::-1], "random": random}
    taken: set[str] = set()
    picked: dict[str, list[str]] = {}
    for why, count in NUM_EXAMPLES.items():
        fresh = [id for id in ranked[why] if id not in taken][:count]
        taken.update(fresh)
        if fresh:
            picked[why] = fresh
    return picked


def view(benchmark: Benchmark, example: Example, prediction: Prediction) -> JsonObject:
    """One example for people: the question with its images, the answer, the best possible answer."""
    texts = ["[image]" if isinstance(p, ImagePart) else p.text for p in example.prompt.document.parts]
    images = [("given", _shown(read_image(image))) for image in example.prompt.images[-1:]]
    answer = truth = ""
    ideal = None if example.truth is None else benchmark.ideal(example)
    if benchmark.kind in IMAGE_KINDS:
        if prediction.get("image"):
            images.append(("made", _shown(read_image(Path(prediction["image"])))))
        else:
            answer = "(no image)"
        if ideal is not None and benchmark.kind == "image":
            images.append(("true", _shown(read_image(ideal))))
    elif benchmark.kind == "rank":
        options = example.info["options"]
        best = np.argsort(-np.asarray(prediction["scores"]), kind="stable")[:3]
        answer = " | ".join(options[i] for i in best)
        truth = "" if ideal is None else options[int(np.argmax(ideal))]
    else:
        answer = prediction["text"]
        truth = "" if ideal is None else ideal
    return {
        "id": example.id,
        "question": _shorten(" ".join(texts)),
        "answer": _shorten(answer),
        "truth": _shorten(truth),
        "images": images,
    }


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def _shown(image: Image.Image) -> str:
    """A small JPEG as a data: address."""
    buffer = io.BytesIO()
    thumbnail(image, THUMBNAIL_PX).save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), kind="jpeg")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: writes the report and the results file. Raises UserError when the folder has no results."""
    description = (__doc__ or "").split("\n")[0]
    options = parse(ReportOptions, arguments, prog="python -m evaluation.report", description=description)
    names = sorted(path.parent.name for path in options.output.glob("*/results.json"))
    if not names:
        raise UserError(f"no results.json below {options.output}; run evaluation/run_all.sh first")
    for path in write(options.output, data=options.data, names=names, skipped={}):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
