"""Every benchmark of a job list that has data, one after another: what evaluation/run_all.sh starts.

Each job (jobs.yaml) has its own folder below OUT, so a killed run continues where it stopped, on any number of
processes. The process that finds all predictions of a job merged scores it; the last one writes report.html and
results.json. A model is loaded once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from evaluation import benchmarks, report
from evaluation.core import DataNotFound, Metric, Record, read_json
from evaluation.fewshot import Demonstrator, FewShot
from evaluation.responders import ModelResponder, OracleResponder, ShuffledResponder
from evaluation.run import AnswerOptions, Pairs, changed, pairs, run, select, write_submission
from evaluation.score import score_folder
from vlgpt.config import read_yaml, validate
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure, get_logger
from vlgpt.options import Argument, parse
from vlgpt.processes import run_ranks
from vlgpt.settings import Settings

JOBS = Path(__file__).with_name("jobs.yaml")
FAKES = {"oracle": OracleResponder, "shuffled": ShuffledResponder}


class RunAllOptions(AnswerOptions):
    """The command line."""

    model: Annotated[str, Argument(is_positional=True)] = Field(
        description="export folder; `oracle` or `shuffled` test the benchmarks themselves"
    )
    data: Annotated[Path, Argument(is_positional=True)] = Field(
        description="folder with the official files (docs/evaluation.md)"
    )
    output: Annotated[Path, Argument(is_positional=True)]
    jobs: Path = Field(JOBS, description="another job list")
    clip: str | None = Field(None, description="CLIP ViT-L/14 folder: reconstruction, edits, CLIP score")
    inception: str | None = Field(None, description="weights of the FID Inception")
    fd_clip: str | None = Field(None, description="CLIP folder as extractor of a Frechet distance")
    option: Pairs = Field((), description="an option that jobs name")
    other_model: Pairs = Field((), description="the export of a model that jobs name")
    metrics: Path | None = Field(None, description="JSON file for all metrics of all jobs")
    num_beams: int | None = Field(None, description="instead of each benchmark's own number of beams")
    threads: int | None = Field(None, description="torch threads of each process")


class JobRow(Settings):
    """One line of a job list; jobs.yaml says what each key is for."""

    benchmark: str
    name: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    sampling_options: dict[str, Any] = Field(default_factory=dict)
    needs: tuple[str, ...] = ()
    needs_any: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    model: str = ""
    prompts: tuple[str, ...] | None = None
    shots: int | Literal["dagger"] = 0
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Job:
    """One benchmark with its demonstrations; `missing` names options that were not given.

    `model` names another export than the evaluated one. `sampling_options` are added for a model that does not always
    draw the same image.
    """

    name: str
    benchmark: str
    few_shot: FewShot
    options: Record = field(default_factory=dict)
    sampling_options: Record = field(default_factory=dict)
    model: str = ""
    missing: tuple[str, ...] = ()


def jobs(path: Path, *, prompts: str, given: Mapping[str, str]) -> Iterator[Job]:
    """The jobs of a YAML file for one kind of prompts. Raises UserError for a file that is no job list."""
    rows = read_yaml(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: a job list is a YAML list, found {type(rows).__name__}; see {JOBS}")
    for number, values in enumerate(rows, 1):
        row = validate(JobRow, values, where=f"{path}, job {number}")
        if row.prompts is not None and prompts not in row.prompts:
            continue
        wanted = [*row.needs, *row.needs_any, *row.optional]
        missing = tuple(name for name in row.needs if name not in given)
        if row.needs_any and not set(row.needs_any) & set(given):
            missing += (" or ".join(row.needs_any),)
        shots = row.shots
        for seed in row.seeds:
            name = row.name or row.benchmark.rpartition(":")[2]
            name += f"-{shots}shot-seed{seed}" if shots else ""
            yield Job(
                name=name.replace("daggershot", "dagger"),
                benchmark=row.benchmark,
                few_shot=FewShot(shots, seed=seed) if isinstance(shots, int) else FewShot.dagger(seed=seed),
                options={**row.options, **{key: given[key] for key in wanted if key in given}},
                sampling_options=row.sampling_options,
                model=row.model,
                missing=missing,
            )


class Models:
    """The exports that are asked, each loaded when a job first needs it; none with a fake."""

    def __init__(self, options: RunAllOptions):
        self.options, self.fake = options, FAKES.get(options.model)
        self.exports = {"": options.model, **pairs(options.other_model, "--other-model")}
        self.loaded: dict[str, ModelResponder] = {}

    def load(self, name: str) -> ModelResponder:
        """The export that jobs call `name`; "" is the evaluated one."""
        if name not in self.loaded:
            self.loaded[name] = self.options.load(Path(self.exports[name]))
        return self.loaded[name]


def run_job(job: Job, models: Models, options: RunAllOptions) -> str | None:
    """Answer this process's share of a job, and score it when it is complete.

    -> why it was left out, or None.
    """
    if job.missing:
        return f"needs the option {', '.join(job.missing)}"
    if models.fake is None and job.model not in models.exports:
        return f"needs --other-model {job.model}=EXPORT"
    model = None if models.fake else models.load(job.model)
    is_sampling = model is not None and not model.is_deterministic
    benchmark = benchmarks.make(
        job.benchmark,
        prompt_file=options.prompts,
        **{**job.options, **(job.sampling_options if is_sampling else {})},
    )
    try:
        examples = select(benchmark.examples(options.data), limit=options.limit, seed=0)
        pool = benchmark.pool(options.data) if job.few_shot.shots else ()
        demonstrator = Demonstrator(benchmark, pool, job.few_shot)
    except DataNotFound as error:
        return str(error)
    output = options.output / job.name
    predictions = run(
        benchmark,
        model or FAKES[options.model](benchmark, examples),
        examples=examples,
        output=output,
        demonstrator=demonstrator,
        decoding=changed(benchmark.decoding, {"num_beams": options.num_beams} if options.num_beams else {}),
        batch_size=options.batch_size,
        num_processes=options.num_processes,
        rank=options.rank or 0,
        subset=None if options.limit is None else {"limit": options.limit, "seed": 0},
    )
    if predictions is None:
        return None
    if options.limit is None:
        write_submission(benchmark, predictions, options.data)
    result = score_folder(benchmark, output, options.data)
    primary = result["metrics"].get(result["primary"], {})
    get_logger("evaluation").info(
        "%s: %s %s", job.name, result["primary"], primary.get("value", "not measured")
    )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: 0 when every job that has data is done, 2 when one failed."""
    own = list(sys.argv[1:] if arguments is None else arguments)
    description = (__doc__ or "").split("\n")[0]
    options = parse(RunAllOptions, own, prog="evaluation/run_all.sh", description=description)
    configure(rank=options.rank or 0)
    if options.num_processes > 1 and options.rank is None:
        return run_ranks("evaluation.run_all", own, options.num_processes)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    given = {name: value for name in ("clip", "inception", "fd_clip") if (value := getattr(options, name))}
    given |= pairs(options.option, "--option")
    models = Models(options)
    planned = list(jobs(options.jobs, prompts=options.prompts, given=given))
    skipped: dict[str, str] = {}
    failed: list[str] = []
    for job in planned:
        try:
            reason = run_job(job, models, options)
        except UserError as error:
            # The others still run; the report gives the reason, and the exit code is 2.
            failed.append(job.name)
            reason = f"failed: {error}"
        if reason:
            skipped[job.name] = reason
            get_logger("evaluation").warning("%s left out: %s", job.name, reason)
    todo = [job.name for job in planned if job.name not in skipped]
    if open_jobs := [name for name in todo if not (options.output / name / "results.json").is_file()]:
        print(f"other processes are still at work on {', '.join(open_jobs)}")
        return 0
    if not todo:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items()) or "it has no jobs"
        raise UserError(f"no job of {options.jobs} could run on {options.data}: {reasons}")
    if options.metrics:
        write_metrics(options.metrics, [options.output / name / "results.json" for name in todo])
    for path in report.write(options.output, data=options.data, names=todo, skipped=skipped):
        print(path)
    return 2 if failed else 0


def write_metrics(path: Path, results: Sequence[Path]) -> None:
    """All metrics of all jobs by name, in order. Raises UserError when two jobs measure one name."""
    metrics: dict[str, Metric] = {}
    for file in results:
        found = read_json(file)["metrics"]
        if twice := sorted(found.keys() & metrics.keys()):
            raise UserError(
                f"--metrics {path}: {file.parent.name} measures {twice[0]} again; leave --metrics out"
            )
        metrics |= found
    write_atomic(path, json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
