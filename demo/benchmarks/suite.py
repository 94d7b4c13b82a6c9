"""The demo's benchmark: all emoji benchmarks with one command, `python -m evaluation.run emoji --model ...`.

    OUTPUT/NAME/predictions.jsonl, run.json, results.json, images/   each part, as evaluation.run and .score write it
    OUTPUT/metrics.json                                             {"name": {"value", "chance", "n"}}

A killed run goes on where it stopped. With the demo's folders only --model, --data and --output are needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from demo.pass_marks import PASS_MARKS, PassMark
from evaluation import benchmarks
from evaluation.core import Benchmark, Decoding, Prompt, Responder, read_json
from evaluation.responders import ModelResponder, OracleResponder, ShuffledResponder
from evaluation.run import run
from evaluation.score import score_folder
from vlgpt.errors import UserError
from vlgpt.files import write_atomic
from vlgpt.log import configure

METRICS = "metrics.json"
LOG_WIDTH = 110
NUM_IMAGE_SEEDS = 3
MAX_SHOTS = 4  # pictures that the demo's label pages show
DRAW_BATCH_SIZE = 32  # pictures made at a time: part of the protocol, see ModelResponder
DETERMINISTIC_HEADS, DETERMINISTIC_DECODERS = ("linear", "mlp"), ("ConvDecoder",)


@dataclass(frozen=True)
class Part:
    """One benchmark of the suite; `is_pretrained`: asked of the stage-2 export."""

    name: str
    benchmark: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_pretrained: bool = False


PARTS = (
    Part("reconstruction", "emoji_reconstruction"),
    Part("reconstruction_image_only", "emoji_reconstruction", {"conditions": "image", "limit": 150}),
    Part("reconstruction_text_only", "emoji_reconstruction", {"conditions": "text", "limit": 150}),
    Part("caption", "emoji_caption"),
    Part("vqa", "emoji_vqa"),
    Part("draw", "emoji_draw"),
    Part("edit", "emoji_edit"),
    Part("label_pages", "emoji_label_pages", is_pretrained=True),
)
RANDOM_LABELS = Part(
    "label_pages_random", "emoji_label_pages", {"has_random_labels": True}, is_pretrained=True
)


class CountedResponder:
    """Another responder, with every answered prompt shown on a progress bar."""

    def __init__(self, responder: Responder, progress: Progress, task: Any):
        self._responder, self._progress, self._task = responder, progress, task
        self.identity = responder.identity
        self.draw_batch_size: int = getattr(responder, "draw_batch_size", 1)
        self.drawing: Mapping[str, float] = getattr(responder, "drawing", {})

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        return self._counted(self._responder.generate(prompts, decoding))

    def draw(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Any]:
        return self._counted(self._responder.draw(prompts, decoding))

    def reconstruct(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Any]:
        return self._counted(self._responder.reconstruct(prompts, decoding))

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> Any:
        return self._responder.rank(prompt, candidates, normalise=normalise)

    def _counted(self, answers: list[Any]) -> list[Any]:
        self._progress.advance(self._task, len(answers))
        return answers


def plan(
    *, judge: Path, has_pretrained: bool, image_seeds: int, limit: int | None, max_shots: int = MAX_SHOTS
) -> Iterator[tuple[Part, Benchmark]]:
    """The parts of this run with their benchmarks; more pictures a page than the demo's bring random labels along."""
    for part in PARTS if max_shots <= MAX_SHOTS else (*PARTS, RANDOM_LABELS):
        if part.is_pretrained and not has_pretrained:
            continue
        options = {**part.options, "judge": str(judge)}
        if part.is_pretrained:
            options["max_shots"] = max_shots
        if part.benchmark == "emoji_draw":
            options["image_seeds"] = image_seeds
        if limit is not None:
            options["limit"] = limit
        yield part, benchmarks.make(part.benchmark, **options)


def run_part(
    part: Part,
    benchmark: Benchmark,
    responder: Responder,
    *,
    data: Path,
    output: Path,
    batch_size: int,
    seed: int,
    num_processes: int = 1,
    rank: int = 0,
) -> dict[str, dict[str, float]] | None:
    """Answer this process's share of one part and, once it is complete, score it: its metrics, else None."""
    folder = output / part.name
    predictions = run(
        benchmark,
        responder,
        examples=benchmark.examples(data),
        output=folder,
        decoding=benchmark.decoding.replace(seed=seed),
        batch_size=batch_size,
        num_processes=num_processes,
        rank=rank,
    )
    return None if predictions is None else score_folder(benchmark, folder, data)["metrics"]


def num_image_seeds(export: Path) -> int:
    """1 for an export that always draws the same picture, 3 for one that samples."""
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    decoder = (config.get("picture_decoder") or {}).get("class", "")
    is_fixed = config.get("head", "linear") in DETERMINISTIC_HEADS and decoder in DETERMINISTIC_DECODERS
    return 1 if is_fixed else NUM_IMAGE_SEEDS


def part_names(output: Path) -> list[str]:
    """Folders of the parts that a run has begun below `output`, in the suite's order."""
    return [part.name for part in (*PARTS, RANDOM_LABELS) if (output / part.name / "run.json").is_file()]


def has_data(data: Path) -> bool:
    """Whether `evaluation/run_all.sh` can run the suite on this folder."""
    return (data / "instructions-unseen" / "manifest.json").is_file()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m evaluation.run emoji", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("--model", type=Path, help="instruction-tuned export (stage 3)")
    p.add_argument(
        "--responder", choices=("oracle", "shuffled"), help="a fake instead, to test the benchmark"
    )
    p.add_argument("--pretrained", type=Path, help="stage-2 export, for label pages (default: beside DATA)")
    p.add_argument("--judge", type=Path, help="CLIP folder that nothing else uses (default: beside DATA)")
    p.add_argument(
        "--data", type=Path, required=True, help="folder with instructions-unseen, pairs-train, ..."
    )
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--limit", type=int, help="examples of each kind and split at most (0: all there are)")
    p.add_argument(
        "--max-shots",
        type=int,
        default=MAX_SHOTS,
        help=f"pictures on a label page (default: {MAX_SHOTS}); 8 also asks pages with random labels",
    )
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--num-processes", type=int, default=1, help="processes that share the work")
    p.add_argument("--rank", type=int, default=0, help="which of them this is")
    p.add_argument("--threads", type=int, default=1, help="torch threads")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the language model"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, write metrics.json and print the table."""
    args = parser().parse_args(arguments)
    configure()
    if (args.model is None) == (args.responder is None):
        raise UserError("give --model EXPORT (or --responder oracle to test the benchmark itself)")
    judge = args.judge or args.data.parent / "judge" / "result"
    if not judge.is_dir():
        raise UserError(f"judge CLIP {judge} not found; give --judge FOLDER (a CLIP that nothing else uses)")
    pretrained = args.pretrained or args.data.parent / "pretrain" / "result"
    if args.pretrained is not None and not pretrained.is_dir():
        raise UserError(f"--pretrained {pretrained} not found; give the stage-2 export, or leave it out")
    import torch

    torch.set_num_threads(args.threads)
    parts = list(
        plan(
            judge=judge,
            has_pretrained=pretrained.is_dir() or args.responder is not None,
            image_seeds=num_image_seeds(args.model) if args.model else 1,
            limit=args.limit,
            max_shots=args.max_shots,
        )
    )
    _run_parts(parts, args, pretrained)
    results = [args.output / part.name / "results.json" for part, _ in parts]
    if not all(path.is_file() for path in results):
        print(f"{args.output}: this share is done; other processes are still at work")
        return 0
    metrics = {name: entry for path in results for name, entry in read_json(path)["metrics"].items()}
    write_atomic(args.output / METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    print_table(metrics)
    return 0


def _run_parts(parts: Sequence[tuple[Part, Benchmark]], args: argparse.Namespace, pretrained: Path) -> None:
    loaded: dict[Path, Responder] = {}

    def responder_of(part: Part, benchmark: Benchmark) -> Responder:
        if args.responder:
            fake = OracleResponder if args.responder == "oracle" else ShuffledResponder
            return fake(benchmark, benchmark.examples(args.data))
        export = pretrained if part.is_pretrained else args.model
        if export not in loaded:
            loaded[export] = ModelResponder.load(export, dtype=args.dtype, draw_batch_size=DRAW_BATCH_SIZE)
        return loaded[export]

    columns = (TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = sum(len(benchmark.examples(args.data)) for _, benchmark in parts)
        everything = progress.add_task("emoji benchmarks", total=total)
        for part, benchmark in parts:
            progress.update(everything, description=f"emoji {part.name}")
            responder = CountedResponder(responder_of(part, benchmark), progress, everything)
            run_part(
                part,
                benchmark,
                responder,
                data=args.data,
                output=args.output,
                batch_size=args.batch_size,
                seed=args.seed,
                num_processes=args.num_processes,
                rank=args.rank,
            )


def print_table(
    metrics: Mapping[str, Mapping[str, float]], marks: Mapping[str, PassMark] = PASS_MARKS
) -> None:
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
