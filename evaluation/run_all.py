"""Every benchmark of a job list that has data, one after another: what evaluation/run_all.sh starts.

Each job (jobs.yaml) has its own folder below OUT, so a killed run continues where it stopped, on any number of
processes. The process that finds all predictions of a job merged scores it; the last one writes report.html and
results.json. A model is loaded once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evaluation import benchmarks, report
from evaluation.core import DataNotFound, read_json
from evaluation.fewshot import Demonstrator, FewShot
from evaluation.responders import ModelResponder, OracleResponder, ShuffledResponder
from evaluation.run import pairs, require_rank, run, select, start_processes, write_submission
from evaluation.score import score_folder
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure, get_logger

JOBS = Path(__file__).with_name("jobs.yaml")
FAKES = {"oracle": OracleResponder, "shuffled": ShuffledResponder}


@dataclass(frozen=True)
class Job:
    """One benchmark with its demonstrations; `missing` names options that were not given.

    `model` names another export than the evaluated one. `sampling_options` are added for a model that does not always
    draw the same image.
    """

    name: str
    benchmark: str
    few_shot: FewShot
    options: Mapping[str, Any] = field(default_factory=dict)
    sampling_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    missing: tuple[str, ...] = ()


JOB_KEYS = {"name", "benchmark", "model", "shots", "seeds", "prompts", "needs", "needs_any", "optional"}
JOB_KEYS |= {"options", "sampling_options"}


def jobs(path: Path, *, prompts: str, given: Mapping[str, str]) -> Iterator[Job]:
    """The jobs of a YAML file for one kind of prompts. Raises UserError for unknown keys."""
    for row in yaml.safe_load(path.read_text(encoding="utf-8")):
        if unknown := sorted(set(row) - JOB_KEYS):
            raise UserError(f"{path}: unknown keys {unknown} in {row}; valid: {sorted(JOB_KEYS)}")
        if prompts not in row.get("prompts", [prompts]):
            continue
        needs, needs_any = row.get("needs", []), row.get("needs_any", [])
        wanted = [*needs, *needs_any, *row.get("optional", ())]
        missing = tuple(name for name in needs if name not in given)
        if needs_any and not set(needs_any) & set(given):
            missing += (" or ".join(needs_any),)
        shots = row.get("shots", 0)
        for seed in row.get("seeds", [0]):
            name = row.get("name") or row["benchmark"].rpartition(":")[2]
            name += f"-{shots}shot-seed{seed}" if shots else ""
            yield Job(
                name=name.replace("daggershot", "dagger"),
                benchmark=row["benchmark"],
                few_shot=FewShot.dagger(seed=seed) if shots == "dagger" else FewShot(int(shots), seed=seed),
                options={**row.get("options", {}), **{key: given[key] for key in wanted if key in given}},
                sampling_options=row.get("sampling_options", {}),
                model=row.get("model", ""),
                missing=missing,
            )


class Models:
    """The exports that are asked, each loaded when a job first needs it; none with a fake."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.fake = args, FAKES.get(args.model)
        self.exports = {"": args.model, **pairs(args.other_model, "--other-model")}
        self.loaded: dict[str, ModelResponder] = {}

    def load(self, name: str) -> ModelResponder:
        """The export that jobs call `name`; "" is the evaluated one."""
        if name not in self.loaded:
            device = self.args.device
            if device == "cuda":
                import torch

                device = f"cuda:{(self.args.rank or 0) % max(torch.cuda.device_count(), 1)}"
            self.loaded[name] = ModelResponder.load(
                Path(self.exports[name]),
                device=device,
                dtype=self.args.dtype,
                draw_batch_size=self.args.draw_batch_size,
            )
        return self.loaded[name]


def run_job(job: Job, models: Models, args: argparse.Namespace) -> str | None:
    """Answer this process's share of a job, and score it when it is complete.

    -> why it was left out, or None.
    """
    if job.missing:
        return f"needs the option {', '.join(job.missing)}"
    if models.fake is None and job.model not in models.exports:
        return f"needs --other-model {job.model}=EXPORT"
    model = None if models.fake else models.load(job.model)
    is_sampling = model is not None and not model.is_deterministic
    options = {**job.options, **(job.sampling_options if is_sampling else {})}
    benchmark = benchmarks.make(job.benchmark, prompt_file=args.prompts, **options)
    try:
        examples = select(benchmark.examples(args.data), limit=args.limit, seed=0)
        pool = benchmark.pool(args.data) if job.few_shot.shots else ()
        demonstrator = Demonstrator(benchmark, pool, job.few_shot)
    except DataNotFound as error:
        return str(error)
    output = args.output / job.name
    predictions = run(
        benchmark,
        model or FAKES[args.model](benchmark, examples),
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
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option that jobs name"
    )
    p.add_argument(
        "--other-model", action="append", default=[], metavar="NAME=EXPORT", help="a model that jobs name"
    )
    p.add_argument("--metrics", type=Path, help="JSON file for all metrics of all jobs")
    p.add_argument("--limit", type=int, help="a random subset of this size of each benchmark")
    p.add_argument("--num-beams", type=int, help="instead of each benchmark's own number of beams")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument(
        "--draw-batch-size", type=int, default=1, help="pictures drawn at a time (part of the protocol)"
    )
    p.add_argument("--num-processes", type=int, default=1)
    p.add_argument("--rank", type=int, help="this process; without it all are started here")
    p.add_argument("--threads", type=int, help="torch threads of each process")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    configure(rank=args.rank or 0)
    require_rank(args.rank, args.num_processes)
    if args.num_processes > 1 and args.rank is None:
        own = sys.argv[1:] if arguments is None else arguments
        return start_processes("evaluation.run_all", own, args.num_processes)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    given = {name: value for name in ("clip", "inception", "fd_clip") if (value := getattr(args, name))}
    given |= pairs(args.option, "--option")
    models = Models(args)
    planned = list(jobs(args.jobs, prompts=args.prompts, given=given))
    skipped: dict[str, str] = {}
    failed: list[str] = []
    for job in planned:
        try:
            reason = run_job(job, models, args)
        except UserError as error:
            # The others still run; the report gives the reason, and the exit code is 2.
            failed.append(job.name)
            reason = f"failed: {error}"
        if reason:
            skipped[job.name] = reason
            get_logger("evaluation").warning("%s left out: %s", job.name, reason)
    todo = [job.name for job in planned if job.name not in skipped]
    if open_jobs := [name for name in todo if not (args.output / name / "results.json").is_file()]:
        print(f"other processes are still at work on {', '.join(open_jobs)}")
        return 0
    if not todo:
        raise UserError(f"no benchmark has data below {args.data}; docs/evaluation.md lists the files")
    if args.metrics:
        write_metrics(args.metrics, [args.output / name / "results.json" for name in todo])
    for path in report.write(args.output, data=args.data, names=todo, skipped=skipped):
        print(path)
    return 2 if failed else 0


def write_metrics(path: Path, results: Sequence[Path]) -> None:
    """All metrics of all jobs by name, in order. Raises UserError when two jobs measure one name."""
    metrics: dict[str, Any] = {}
    for file in results:
        found = read_json(file)["metrics"]
        if twice := sorted(found.keys() & metrics.keys()):
            raise UserError(
                f"--metrics {path}: {file.parent.name} measures {twice[0]} again; leave --metrics out"
            )
        metrics |= found
    write_atomic(path, (json.dumps(metrics, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run_command(main))
