"""python -m data_prep.build SOURCE --input ... --output DIR: one source -> a folder of verified shards.

It may be killed at any moment, run again, and split over any number of tasks: the bytes are always the same.
Shards that are there are never made again; the task that finds the last shard finished verifies all of them
and seals the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.filters import FilterSettings, RecordFilter
from data_prep.job import Job, claim_folder, has_failures, is_failure, num_failures
from data_prep.options import Option, add_options, chosen, constructor_options, make_settings, model_options
from data_prep.pictures import PictureSettings
from data_prep.sources import SOURCES, source_class
from data_prep.workers import STOPPED, Stopped, WorkerDied, run_shards
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure
from vlgpt.registry import is_dotted
from vlgpt.shards import Manifest, ShardReport, write_manifest
from vlgpt.shards.manifest import MANIFEST, SUCCESS, read_manifest, read_report
from vlgpt.shards.schema import MAX_RECORDS_PER_SHARD, MAX_SHARDS

MIN_RECORDS_TO_JUDGE = 1000
console = Console(stderr=True)


class TooManyBad(Exception):
    """More records were lost to damage than the user allows."""


def build(
    job: Job,
    *,
    name: str,
    task_index: int = 0,
    num_tasks: int = 1,
    num_workers: int = 1,
    retry_failed: bool = False,
    max_bad_fraction: float = 0.01,
    hash_tars: bool = True,
) -> Manifest | None:
    """Build this task's shards; returns the manifest if the data set is now complete, else None.

    Raises UserError (settings, input), TooManyBad (after the shards of this task) and Stopped.
    """
    claim_folder(job)
    if (job.folder / SUCCESS).is_file() and not retry_failed:
        return read_manifest((job.folder / MANIFEST).read_bytes(), where=str(job.folder / MANIFEST))
    mine = range(task_index, job.num_shards, num_tasks)
    reports = {shard: read_report(job.folder, shard) for shard in mine}
    todo = [
        shard
        for shard, report in reports.items()
        if report is None or (retry_failed and has_failures(report))
    ]
    if todo:
        (job.folder / SUCCESS).unlink(missing_ok=True)
    _judge([report for report in reports.values() if report], max_bad_fraction, at_least=MIN_RECORDS_TO_JUDGE)
    with _progress() as progress:
        bar = progress.add_task(job.folder.name, total=len(mine), completed=len(mine) - len(todo))

        def on_report(report: ShardReport) -> None:
            reports[int(report.name)] = report
            progress.advance(bar)
            progress.refresh()
            done = [report for report in reports.values() if report]
            _judge(done, max_bad_fraction, at_least=MIN_RECORDS_TO_JUDGE)

        run_shards(job, todo, num_workers=num_workers, retry=retry_failed, on_report=on_report)
    everything = [read_report(job.folder, shard) for shard in range(job.num_shards)]
    finished = [report for report in everything if report]
    _judge(finished, max_bad_fraction, at_least=1)
    if len(finished) < job.num_shards:
        return None
    return write_manifest(
        job.folder,
        name=name,
        licence=job.source.licence,
        versions=job.versions(),
        build=job.settings(),
        num_shards=job.num_shards,
        hash_tars=hash_tars,
    )


def _judge(reports: Sequence[ShardReport], max_bad_fraction: float, *, at_least: int) -> None:
    records, failed = sum(report.num_records for report in reports), sum(map(num_failures, reports))
    if records < at_least or failed <= max_bad_fraction * records:
        return
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update({reason: count for reason, count in report.dropped.items() if is_failure(reason)})
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    raise TooManyBad(
        f"{failed} of {records} records are bad ({listed}), more than --max-bad-fraction {max_bad_fraction}; "
        "repair the input and run with --retry-failed, or allow more"
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"))
    return Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)


def _parser(source: type | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description=source.__doc__ if source else __doc__,
        allow_abbrev=False,
    )
    names = f"{', '.join(SOURCES)}, or package.module:Class of your own"
    parser.add_argument("source", type=_source_name, metavar="SOURCE", help=names)
    parser.add_argument("--input", type=Path, nargs="+", default=(), help="files or folders to read")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--name", help="name in the manifest (default: the output folder's name)")
    parser.add_argument("--task-index", type=int, default=0, help="this task, from 0 (default: 0)")
    parser.add_argument("--num-tasks", type=int, default=1, help="tasks that share the work (default: 1)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes of this task (default: 1)")
    parser.add_argument(
        "--shard-size", type=int, default=5000, help="input records per shard (default: 5000)"
    )
    parser.add_argument("--tokenizer", help="tokenizer folder or hub name: stores token lengths per part")
    parser.add_argument(
        "--template", default="vlgpt", help="chat template of the run, own: the tokenizer's (default: vlgpt)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="read records again that failed before")
    parser.add_argument("--max-bad-fraction", type=float, default=0.01, help="of all records (default: 0.01)")
    parser.add_argument(
        "--verify", choices=("hash", "size"), default="hash", help="how shards are verified at the end"
    )
    if source:
        add_options(parser, "source", constructor_options(source))
    add_options(parser, "pictures", _picture_options(source))
    add_options(parser, "filters", model_options(FilterSettings))
    return parser


def _source_name(name: str) -> str:
    try:
        source_class(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _picture_options(source: type | None) -> list[Option]:
    """The settings' fields; a source may have other defaults (`image_format = "png"`)."""
    options = model_options(PictureSettings)
    return [replace(option, default=getattr(source, option.name, option.default)) for option in options]


def make_job(arguments: argparse.Namespace, source_type: type) -> Job:
    """The job that the command line asks for. Raises UserError."""
    options = chosen(arguments, constructor_options(source_type))
    for name, value, low, high in (
        ("--shard-size", arguments.shard_size, 1, MAX_RECORDS_PER_SHARD),
        ("--num-tasks", arguments.num_tasks, 1, MAX_SHARDS),
        ("--task-index", arguments.task_index, 0, arguments.num_tasks - 1),
        ("--num-workers", arguments.num_workers, 0, 1024),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} must be between {low} and {high}, found {value}")
    for path in arguments.input:
        if not path.exists() and "://" not in str(path):
            raise UserError(f"--input {path} does not exist")
    filters = make_settings(FilterSettings, arguments)
    pictures = make_settings(PictureSettings, arguments)
    if pictures.fast and (missing := [name for name in ("simplejpeg", "cv2") if find_spec(name) is None]):
        raise UserError(f"--fast needs {' and '.join(missing)}: pip install vlgpt[fast]")
    RecordFilter(filters)  # reads its lists: a missing one is better known now
    source = source_type(tuple(arguments.input), **options)
    if not len(source):
        raise UserError(
            f"source {arguments.source} found no records in {[str(path) for path in arguments.input]}"
        )
    tokenizer = None
    if arguments.tokenizer:
        from vlgpt.tokens import DocumentTokenizer

        tokenizer = DocumentTokenizer.load(arguments.tokenizer, template=arguments.template)
    return Job(
        folder=arguments.output,
        source=source,
        source_name=arguments.source,
        source_options=options,
        inputs=tuple(arguments.input),
        pictures=pictures,
        filters=filters,
        shard_size=arguments.shard_size,
        tokenizer=tokenizer,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 built (or this task's share), 1 too many bad records or a dead worker, 2 wrong use, 75
    stopped by a signal.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = next((argument for argument in argv if argument in SOURCES or is_dotted(argument)), None)
    source_type = source_class(name) if name else None
    arguments = _parser(source_type).parse_args(argv)
    configure()
    job = make_job(arguments, source_class(arguments.source))
    try:
        manifest = build(
            job,
            name=arguments.name or arguments.output.resolve().name,
            task_index=arguments.task_index,
            num_tasks=arguments.num_tasks,
            num_workers=arguments.num_workers,
            retry_failed=arguments.retry_failed,
            max_bad_fraction=arguments.max_bad_fraction,
            hash_tars=arguments.verify == "hash",
        )
    except (TooManyBad, WorkerDied) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1
    except (Stopped, KeyboardInterrupt):
        console.print("stopped; run the same command again to continue", highlight=False, soft_wrap=True)
        return STOPPED
    if manifest is None:
        console.print(
            f"task {arguments.task_index} of {arguments.num_tasks} is done; other tasks are not yet"
        )
    else:
        console.print(summary(arguments.output, manifest), highlight=False, soft_wrap=True)
    return 0


def summary(folder: Path, manifest: Manifest) -> str:
    """One line with the counts; what was dropped is named."""
    dropped = ", ".join(f"{reason} {count}" for reason, count in manifest.dropped.items()) or "nothing"
    return (
        f"{folder}: {manifest.num_samples} of {manifest.num_records} documents with {manifest.num_images} "
        "images, "
        f"{manifest.num_bytes / 1e6:.1f} MB in {len(manifest.shards)} shards; dropped: {dropped}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
