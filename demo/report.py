"""The demo's page of pictures: `python -m demo.report --run runs/demo --output runs/demo/report.html`.

With `--demo FOLDER` a run on a pre-trained language model is set beside that demo: its values, and marks made of them.

One self-contained HTML file: pictures are data: URIs, curves are inline SVG, there is no script and no external
resource, and everything that a model or a data set wrote is escaped. Also writes metrics.json beside the runs
and prints the table.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from demo import report_samples as samples
from demo.pass_marks import PASS_MARKS, PassMark, marks_beside
from demo.report_curves import Chart, loss_chart
from demo.report_samples import Answered
from evaluation import manifest
from evaluation.core import read_json
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic

METRICS = "metrics.json"
LOG_WIDTH = 110
TEMPLATES = Path(__file__).with_name("templates")
RUNS = {
    "clip": "tiny CLIP (the frozen encoders)",
    "judge": "judge CLIP (evaluation only)",
    "decoder": "picture decoder",
    "tokenizer": "stage 1: image tokenizer",
    "pretrain": "stage 2: pre-training",
    "finetune": "stage 3: instruction tuning",
}
ATTRIBUTION = (
    "Noto Emoji (c) Google, Apache-2.0.",
    "Twemoji (c) Twitter, Inc and contributors, CC-BY 4.0.",
    "Names: Unicode CLDR, Unicode-3.0.",
)
CAVEAT = (
    "The words for skin tone and gender are those of the Unicode names of these drawings; they say nothing about "
    "people. Pictures are emoji only, on white, with English names; they and the numbers do not transfer to photos."
)


def read_timings(run: Path) -> dict[str, float]:
    """Seconds of each step: timings.json, or the stamps that the demo leaves while it is still under way."""
    if (run / "timings.json").is_file():
        return {name: float(seconds) for name, seconds in read_json(run / "timings.json").items()}
    stamps = {
        path.name.removesuffix(".done.json"): read_json(path) for path in (run / "steps").glob("*.done.json")
    }
    done = sorted(stamps.items(), key=lambda item: float(item[1].get("run", 0)))
    return {name: float(stamp["seconds"]) for name, stamp in done if "seconds" in stamp}


def charts(run: Path) -> list[Chart]:
    """Loss curves of every training run that has logged."""
    found = [
        loss_chart(title, run / name / "metrics.jsonl")
        for name, title in RUNS.items()
        if (run / name / "metrics.jsonl").is_file()
    ]
    return [chart for chart in found if chart is not None]


def metric_rows(
    metrics: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, PassMark],
    demo: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Rows of the table; `is_met` is None where nothing is demanded, `demo` where that run did not measure."""
    rows = []
    for name, entry in metrics.items():
        mark = marks.get(name)
        rows.append(
            {
                "name": name,
                "value": entry["value"],
                "chance": entry.get("chance"),
                "demo": demo.get(name, {}).get("value"),
                "n": int(entry["n"]),
                "mark": mark.text if mark else "",
                "is_met": mark.is_met(entry) if mark else None,
            }
        )
    return rows


def sections(evaluation: Path, data: Path) -> dict[str, Any]:
    """All examples that the page shows, by section; a part that was not run gives an empty list."""

    def read(name: str) -> Answered | None:
        return Answered.read(evaluation / name, data)

    conditions = [read(f"reconstruction{suffix}") for suffix in ("", "_image_only", "_text_only")]
    draw, caption, vqa, edit, pages = (read(n) for n in ("draw", "caption", "vqa", "edit", "label_pages"))
    return {
        "reconstructions": samples.reconstructions(conditions, 18),
        "drawings": samples.drawings(draw, "unseen", 24) if draw else [],
        "drawings_seen": samples.drawings(draw, "seen", 24) if draw else [],
        "captions": samples.captions(caption, "unseen", 12) if caption else [],
        "captions_seen": samples.captions(caption, "seen", 12) if caption else [],
        "questions": samples.questions(vqa, 3) if vqa else [],
        "edits_tone": samples.edits(edit, "tone", 9) if edit else [],
        "edits_gender": samples.edits(edit, "gender", 9) if edit else [],
        "pages": samples.label_pages(pages, 2, 6) + samples.label_pages(pages, 4, 2) if pages else [],
    }


def answered_by(evaluation: Path) -> str:
    """Who gave the answers: the export with its hash, or the fake that tested the benchmark."""
    identity = (manifest.read(evaluation / "draw") or {}).get("responder", {})
    if identity.get("kind") == "model":
        return f"{identity['export']} ({identity['export_hash'][:12]})"
    return f"no model: the {identity.get('kind', 'unknown')} responder"


def render(
    *,
    metrics: Mapping[str, Any],
    shown: Mapping[str, Any],
    curves: Sequence[Chart],
    timings: Mapping[str, float],
    who: str,
    marks: Mapping[str, PassMark],
    demo: Mapping[str, Any],
) -> str:
    """The page; `demo` holds the metrics of the run that this one is set beside, or nothing."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = metric_rows(metrics, marks, demo)
    return environment.get_template("report.html").render(
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        judged=[row for row in rows if row["is_met"] is not None],
        others=[row for row in rows if row["is_met"] is None],
        charts=curves,
        timings=list(timings.items()),
        longest=max(timings.values(), default=1.0) or 1.0,
        attribution=ATTRIBUTION,
        caveat=CAVEAT,
        who=who,
        has_demo=bool(demo),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        **shown,
    )


def print_table(metrics: Mapping[str, Mapping[str, float]], marks: Mapping[str, PassMark]) -> None:
    """The metrics on the terminal: value, chance, n and, where the demo has one, the pass mark."""
    result = Table("metric", "value", "chance", "n", "pass mark", "", box=box.SIMPLE_HEAD)
    result.columns[0].no_wrap = True
    for column in result.columns[1:4]:
        column.justify = "right"
    for name, entry in metrics.items():
        mark = marks.get(name)
        chance = f"{entry['chance']:.3f}" if "chance" in entry else ""
        verdict = "" if mark is None else "[green]pass[/green]" if mark.is_met(entry) else "[red]below[/red]"
        row = (name, f"{entry['value']:.3f}", chance, str(entry["n"]), mark.text if mark else "", verdict)
        result.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.html and metrics.json, print the table."""
    p = argparse.ArgumentParser(prog="python -m demo.report", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--run", type=Path, required=True, help="the demo's folder, such as runs/demo")
    p.add_argument("--output", type=Path, required=True, help="report.html")
    p.add_argument(
        "--evaluation", type=Path, help="folder of evaluation/run_all.sh (default: RUN/evaluation)"
    )
    p.add_argument("--data", type=Path, help="the demo's shards (default: RUN/data)")
    p.add_argument("--demo", type=Path, help="folder of a finished demo to be set beside, such as runs/demo")
    p.add_argument("--also", type=Path, nargs="*", default=(), help="more metrics (evaluation.text_nll)")
    args = p.parse_args(arguments)
    evaluation = args.evaluation or args.run / "evaluation"
    if not (evaluation / METRICS).is_file():
        raise UserError(
            f"{evaluation / METRICS} not found; evaluate first (demo/jobs.yaml gives the command)"
        )
    metrics = {
        name: entry for path in (evaluation / METRICS, *args.also) for name, entry in read_json(path).items()
    }
    demo = read_json(args.demo / METRICS) if args.demo else {}
    marks = marks_beside(demo) if args.demo else PASS_MARKS
    page = render(
        metrics=metrics,
        shown=sections(evaluation, args.data or args.run / "data"),
        curves=charts(args.run),
        timings=read_timings(args.run),
        who=answered_by(evaluation),
        marks=marks,
        demo=demo,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.output, page.encode())
    write_atomic(args.run / METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    print_table(metrics, marks)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
