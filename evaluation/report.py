"""report.html and results.json of many results: our numbers beside the paper's tables, and examples with
pictures.

The page is one file without scripts: text is escaped by jinja2, pictures are embedded, and its content
security policy forbids everything else, so a hostile caption or reply stays text.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image

from evaluation import benchmarks
from evaluation.core import Benchmark, Example, Prediction, read_image, read_json
from evaluation.score import per_example_path, read_predictions
from vlgpt import seeds
from vlgpt.document import ImagePart
from vlgpt.log import UserError, run_command
from vlgpt.shards.atomic import write_atomic

PAPER = Path(__file__).with_name("paper_values.yaml")
TEMPLATES = Path(__file__).with_name("templates")
NUM_EXAMPLES = {"best": 7, "worst": 7, "random": 6}
THUMBNAIL_PX = 160
MAX_TEXT = 600
PICTURE_KINDS = ("image", "reconstruction")


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
    page = render(tables=tables(results, paper), sections=sections, skipped=skipped)
    write_atomic(html_path, page.encode())
    return json_path, html_path


def render(
    *, tables: Sequence[Table], sections: Sequence[Mapping[str, Any]], skipped: Mapping[str, str]
) -> str:
    """The page, everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        style=style, style_hash=digest, tables=tables, sections=sections, skipped=skipped
    )


@dataclass(frozen=True)
class Table:
    """One of the paper's tables with our row at the end."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    ours: list[tuple[float, str] | None]


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
    picked = pick(per_example, list(examples))
    run = result.get("run") or {}
    protocol = {
        key: run.get(key) for key in ("prompt", "decoding", "shots", "responder", "questions", "subset")
    }
    protocol |= {
        "scoring": result["scoring"]["options"],
        "notes": result["notes"],
        "versions": run.get("versions"),
    }
    return {
        "name": name,
        "result": result,
        "protocol": [
            (key, json.dumps(value, ensure_ascii=False)) for key, value in protocol.items() if value
        ],
        "examples": [
            {**view(benchmark, examples[id], predictions[id]), "why": why, "score": per_example.get(id)}
            for why, id in picked
        ],
    }


def pick(per_example: Mapping[str, float], ids: Sequence[str]) -> list[tuple[str, str]]:
    """Best, worst and random ids, each at most once; without scores only random ones."""
    order = sorted((id for id in ids if id in per_example), key=lambda id: (-per_example[id], id))
    ranked = {
        "best": order,
        "worst": order[::-1],
        "random": sorted(ids, key=lambda id: seeds.address("report", id)),
    }
    taken: dict[str, str] = {}
    for why, count in NUM_EXAMPLES.items():
        fresh = [id for id in ranked[why] if id not in taken]
        taken |= dict.fromkeys(fresh[:count], why)
    return [(why, id) for id, why in taken.items()]


def view(benchmark: Benchmark, example: Example, prediction: Prediction) -> dict[str, Any]:
    """One example for people: the question with its pictures, the answer, the best possible answer."""
    document = example.prompt.document
    texts = ["[picture]" if isinstance(part, ImagePart) else part.text for part in document.parts]
    shown: dict[str, Any] = {
        "id": example.id,
        "question": _shorten(" ".join(texts)),
        "pictures": [thumbnail(read_image(image)) for image in example.prompt.images[-1:]],
        "answer": "",
        "truth": "",
        "answer_picture": None,
        "truth_picture": None,
    }
    ideal = None if example.truth is None else benchmark.ideal(example)
    if benchmark.kind in PICTURE_KINDS:
        if prediction.get("image"):
            shown["answer_picture"] = thumbnail(read_image(Path(prediction["image"])))
        shown["truth_picture"] = thumbnail(read_image(ideal)) if ideal is not None else None
    elif benchmark.kind == "rank":
        options = example.info["options"]
        best = np.argsort(-np.asarray(prediction["scores"]), kind="stable")[:3]
        shown["answer"] = " | ".join(options[i] for i in best)
        shown["truth"] = "" if ideal is None else options[int(np.argmax(ideal))]
    else:
        shown["answer"], shown["truth"] = (
            _shorten(prediction["text"]),
            "" if ideal is None else _shorten(ideal),
        )
    return shown


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ..."


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as a data: address."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
