"""The demo's page: `python -m demo.report --run runs/demo --output runs/demo/report.html`.

With `--demo FOLDER` a run on a pre-trained language model is set beside that demo: its values, and marks made of them.
One HTML file (vlgpt.html) with images, loss curves as inline SVG and the metrics. Also writes metrics.json beside the
runs and prints the table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from demo import report_samples as samples
from demo.pass_marks import PASS_MARKS, PassMark, marks_beside
from demo.report_curves import Chart, loss_chart
from demo.report_samples import Answered
from evaluation import manifest
from evaluation.core import Metric, read_json
from vlgpt.errors import UserError, run_command
from vlgpt.files import JsonObject, write_atomic
from vlgpt.html import page
from vlgpt.options import Options, parse

Metrics: TypeAlias = Mapping[str, Metric]
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
    "people. Images are emoji only, on white, with English names; they and the numbers do not transfer to photos."
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
    metrics: Metrics,
    marks: Mapping[str, PassMark],
    demo: Metrics,
) -> list[JsonObject]:
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


def sections(evaluation: Path, data: Path) -> JsonObject:
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
    metrics: Metrics,
    shown: Mapping[str, list[JsonObject]],
    curves: Sequence[Chart],
    timings: Mapping[str, float],
    who: str,
    marks: Mapping[str, PassMark],
    demo: Metrics,
) -> str:
    """The page; `demo` holds the metrics of the run that this one is set beside, or nothing."""
    rows = metric_rows(metrics, marks, demo)
    return page(
        (TEMPLATES / "report.html").read_text(encoding="utf-8"),
        title="VL-GPT demo",
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
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


def print_table(metrics: Metrics, marks: Mapping[str, PassMark]) -> None:
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


class DemoReportOptions(Options):
    """The command line."""

    run: Path = Field(description="the demo's folder, such as runs/demo")
    output: Path = Field(description="report.html")
    evaluation: Path | None = Field(
        None, description="folder of evaluation/run_all.sh (default: RUN/evaluation)"
    )
    data: Path | None = Field(None, description="the demo's shards (default: RUN/data)")
    demo: Path | None = Field(
        None, description="folder of a finished demo to be set beside, such as runs/demo"
    )
    also: tuple[Path, ...] = Field((), description="more metrics (evaluation.text_nll)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.html and metrics.json, print the table."""
    options = parse(
        DemoReportOptions, arguments, prog="python -m demo.report", description=(__doc__ or "").split("\n")[0]
    )
    evaluation = options.evaluation or options.run / "evaluation"
    if not (evaluation / METRICS).is_file():
        raise UserError(
            f"{evaluation / METRICS} not found; evaluate first (demo/jobs.yaml gives the command)"
        )
    metrics: dict[str, Metric] = {}
    for path in (evaluation / METRICS, *options.also):
        metrics |= read_json(path)
    demo = read_json(options.demo / METRICS) if options.demo else {}
    marks = marks_beside(demo) if options.demo else PASS_MARKS
    html = render(
        metrics=metrics,
        shown=sections(evaluation, options.data or options.run / "data"),
        curves=charts(options.run),
        timings=read_timings(options.run),
        who=answered_by(evaluation),
        marks=marks,
        demo=demo,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, html)
    write_atomic(options.run / METRICS, json.dumps(metrics, indent=1) + "\n")
    print_table(metrics, marks)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
