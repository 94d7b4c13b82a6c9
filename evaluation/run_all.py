"""Every benchmark that has data, one after another, with one loaded model: what evaluation/run_all.sh starts.

Each job (jobs.yaml) has its own folder below OUT, so a killed run goes on where it stopped, on any number
of processes. Whoever finds all predictions of a job merged scores it; the last one writes report.html and
results.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation import benchmarks, report
from evaluation.core import DataNotFound, Responder
from evaluation.fewshot import Demonstrator, FewShot
from evaluation.responders import ModelResponder, OracleResponder, ShuffledResponder
from evaluation.run import require_rank, run, select, write_submission
from evaluation.score import score_folder
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure, get_logger
from vlgpt.processes import run_ranks

JOBS = Path(__file__).with_name("jobs.yaml")


@dataclass(frozen=True)
class Job:
    """One benchmark with its demonstrations. `missing` names options that were not given."""

    name: str
    benchmark: str
    few_shot: FewShot
    options: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def jobs(path: Path, *, prompts: str, given: Mapping[str, str]) -> Iterator[Job]:
    """The jobs of a YAML file for one model kind. Raises UserError for unknown keys."""
    known = {"benchmark", "shots", "seeds", "prompts", "needs", "needs_any", "optional", "options"}
    for row in yaml.safe_load(path.read_text(encoding="utf-8")):
        if unknown := sorted(set(row) - known):
            raise UserError(f"{path}: unknown keys {unknown} in {row}; valid: {sorted(known)}")
        if prompts not in row.get("prompts", [prompts]):
            continue
        needs, needs_any = row.get("needs", []), row.get("needs_any", [])
        wanted = [*needs, *needs_any, *row.get("optional", ())]
        options = {**row.get("options", {}), **{name: given[name] for name in wanted if name in given}}
        missing = tuple(name for name in needs if name not in given)
        if needs_any and not set(needs_any) & set(given):
            missing += (" or ".join(needs_any),)
        shots = row.get("shots", 0)
        for seed in row.get("seeds", [0]):
            few_shot = FewShot.dagger(seed=seed) if shots == "dagger" else FewShot(int(shots), seed=seed)
            name = row["benchmark"] + (f"-{shots}shot-seed{seed}" if shots else "")
            yield Job(name.replace("daggershot", "dagger"), row["benchmark"], few_shot, options, missing)


def run_job(job: Job, responder_of: Any, args: argparse.Namespace) -> str | None:
    """Answer this process's share of a job, and score it when it is complete; why it was left out, or
    None."""
    if job.missing:
        return f"needs the option {', '.join(job.missing)}"
    benchmark = benchmarks.make(job.benchmark, prompt_file=args.prompts, **job.options)
    try:
        examples = select(benchmark.examples(args.data), limit=args.limit, seed=0)
        pool = benchmark.pool(args.data) if job.few_shot.shots else ()
        demonstrator = Demonstrator(benchmark, pool, job.few_shot)
    except DataNotFound as error:
        return str(error)
    output = args.output / job.name
    predictions = run(
        benchmark,
        responder_of(benchmark, examples),
        examples=examples,
        output=output,
        demonstrator=demonstrator,
        decoding=benchmark.decoding.replace(**({"num_beams": args.num_beams} if args.num_beams else {})),
        batch_size=args.batch_size,
        num_processes=args.num_processes,
        rank=args.rank or 0,
        subset=None if args.limit is None else {"limit": args.limit, "seed": 0},
    )
    if predictions is None:
        return None
    if args.limit is None:
        write_submission(benchmark, predictions, args.data)
    result = score_folder(benchmark, output, args.data)
    primary = result["metrics"].get(result["primary"], {})
    get_logger("evaluation").info(
        "%s: %s %s", job.name, result["primary"], primary.get("value", "not measured")
    )
    return None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="evaluation/run_all.sh", description=(__doc__ or "").split("\n")[0])
    p.add_argument("model", help="export folder; `oracle` or `shuffled` test the benchmarks themselves")
    p.add_argument("data", type=Path, help="folder with the official files (docs/evaluation.md)")
    p.add_argument("output", type=Path)
    p.add_argument("--prompts", default="vlgpt", help="vlgpt (pre-trained) or vlgpt-i (instruction-tuned)")
    p.add_argument("--jobs", type=Path, default=JOBS, help="another job list")
    p.add_argument("--clip", help="CLIP ViT-L/14 folder: reconstruction, edits, CLIP score")
    p.add_argument("--inception", help="weights of the FID Inception")
    p.add_argument("--fd-clip", help="CLIP folder as extractor of a Frechet distance")
    p.add_argument("--limit", type=int, help="a random subset of this size of each benchmark")
    p.add_argument("--num-beams", type=int, help="instead of each benchmark's own number of beams")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument(
        "--draw-batch-size", type=int, default=1, help="pictures drawn at a time (part of the protocol)"
    )
    p.add_argument("--num-processes", type=int, default=1)
    p.add_argument("--rank", type=int, help="this process; without it all are started here")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    configure(rank=args.rank or 0)
    require_rank(args.rank, args.num_processes)
    if args.num_processes > 1 and args.rank is None:
        own = sys.argv[1:] if arguments is None else arguments
        return run_ranks("evaluation.run_all", own, args.num_processes)
    parts = _run_suites(args)
    given = {name: value for name in ("clip", "inception", "fd_clip") if (value := getattr(args, name))}
    responder_of = _responders(args)
    planned = list(jobs(args.jobs, prompts=args.prompts, given=given))
    skipped: dict[str, str] = {}
    failed: list[str] = []
    for job in planned:
        try:
            reason = run_job(job, responder_of, args)
        except (
            UserError
        ) as error:  # the others still run; the reason stands in the report, the exit code is 2
            failed.append(job.name)
            reason = f"failed: {error}"
        if reason:
            skipped[job.name] = reason
            get_logger("evaluation").warning("%s left out: %s", job.name, reason)
    todo = parts + [job.name for job in planned if job.name not in skipped]
    if open_jobs := [name for name in todo if not (args.output / name / "results.json").is_file()]:
        print(f"other processes are still at work on {', '.join(open_jobs)}")
        return 0
    if not todo:
        raise UserError(f"no benchmark has data below {args.data}; docs/evaluation.md lists the files")
    for path in report.write(args.output, data=args.data, names=todo, skipped=skipped):
        print(path)
    return 2 if failed else 0


def _run_suites(args: argparse.Namespace) -> list[str]:
    """Run the suites whose data is there; the folders below the output that their parts have."""
    names = []
    who = "--responder" if args.model in ("oracle", "shuffled") else "--model"
    for name in benchmarks.suites_of(args.data):
        flags = [who, args.model, "--data", str(args.data), "--output", str(args.output)]
        flags += ["--num-processes", str(args.num_processes), "--rank", str(args.rank or 0)]
        if args.limit is not None:
            flags += ["--limit", str(args.limit)]
        benchmarks.suite(name).main(flags)
        names += benchmarks.suite(name).part_names(args.output)
    return names


def _responders(args: argparse.Namespace) -> Any:
    """A function (benchmark, examples) -> Responder; a model is loaded once."""
    if args.model == "oracle":
        return OracleResponder
    if args.model == "shuffled":
        return ShuffledResponder
    device = args.device
    if device == "cuda":
        import torch

        device = f"cuda:{(args.rank or 0) % max(torch.cuda.device_count(), 1)}"
    responder: Responder = ModelResponder.load(
        Path(args.model), device=device, dtype=args.dtype, draw_batch_size=args.draw_batch_size
    )
    return lambda benchmark, examples: responder


if __name__ == "__main__":
    sys.exit(run_command(main))
