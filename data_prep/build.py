"""python -m data_prep.build SOURCE --input ... --output DIR: one source -> a folder of verified shards.

It may be killed at any moment, run again, and split over any number of tasks: the bytes are always the same.
Shards that are there are never made again; the task that finds the last shard finished verifies all of them
and seals the folder.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.filters import FilterSettings, RecordFilter
from data_prep.images import ImageSettings
from data_prep.job import BuildJob, ShardBuilder, claim_folder, has_failures, is_failure, num_failures
from data_prep.options import TokenizerOptions
from data_prep.sources import SOURCES, source_class
from vlgpt.errors import UserError, run_command
from vlgpt.files import expand_paths
from vlgpt.log import configure, get_logger
from vlgpt.options import (
    Argument,
    ArrayOptions,
    Option,
    add_options,
    chosen,
    make_parser,
    model_options,
    read_options,
    signature_options,
)
from vlgpt.processes import STOPPED, WHOLE, Mark, Share, Stopped, StopSignals, run_workers
from vlgpt.registry import is_dotted
from vlgpt.shards import Manifest, ShardReport, write_manifest
from vlgpt.shards.manifest import MANIFEST, SUCCESS, read_manifest, read_report
from vlgpt.shards.schema import MAX_RECORDS_PER_SHARD
from vlgpt.shards.writer import load_tar_writer

MIN_RECORDS_TO_JUDGE = 1000
CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
MAX_CRASHES = 100
NUM_BAD_SHOWN = 3
console = Console(stderr=True)


class BuildOptions(ArrayOptions, TokenizerOptions):
    """The command line, apart from the options of the source, of its images and of the filters."""

    source: Annotated[str, Argument(is_positional=True, metavar="SOURCE")] = Field(
        description=f"{', '.join(SOURCES)}, or package.module:Class of your own"
    )
    input: tuple[Path, ...] = Field((), description="files or folders to read")
    output: Path = Field(description="folder of the data set")
    name: str | None = Field(None, description="name in the manifest (default: the output folder's name)")
    num_workers: int = Field(1, ge=0, le=1024, description="processes of this task")
    shard_size: int = Field(5000, ge=1, le=MAX_RECORDS_PER_SHARD, description="input records per shard")
    tokenizer: str | None = Field(
        None, description="tokenizer folder or hub name: stores token lengths per part"
    )
    retry_failed: bool = Field(False, description="read records again that failed before")
    max_bad_fraction: float = Field(0.01, description="of all records")
    verify: Literal["hash", "size"] = Field("hash", description="how shards are verified at the end")

    @field_validator("input")
    @classmethod
    def _find_inputs(cls, given: tuple[Path, ...]) -> tuple[Path, ...]:
        """Braces and stars that the shell did not expand are expanded here."""
        found: list[Path] = []
        for name in given:
            paths = [name] if "://" in str(name) else expand_paths(name)
            missing = [path for path in paths if "://" not in str(path) and not path.exists()]
            if missing or not paths:
                raise UserError(f"--input {missing[0] if missing else name} does not exist")
            found += paths
        return tuple(found)


class TooManyBad(Exception):
    """More records were lost to damage than the user allows."""


class WorkerDied(Exception):
    """A worker was killed from outside (most often by a lack of memory) or failed in an unforeseen way."""


def build(
    job: BuildJob,
    *,
    name: str,
    share: Share = WHOLE,
    num_workers: int = 1,
    retry_failed: bool = False,
    max_bad_fraction: float = 0.01,
    hash_tars: bool = True,
) -> Manifest | None:
    """Build this task's shards; returns the manifest if the data set is now complete, else None.

    A data set that is already complete is not built again, unless `retry_failed`.
    Raises UserError (settings, input), Stopped, and TooManyBad: between shards once 1,000 records of this task are
    judged, and at the end over the finished shards of all tasks.
    """
    claim_folder(job)
    if (job.folder / SUCCESS).is_file() and not retry_failed:
        return read_manifest((job.folder / MANIFEST).read_bytes(), where=str(job.folder / MANIFEST))
    mine = share.of(job.num_shards)
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

        _run_shards(job, todo, num_workers=num_workers, retry=retry_failed, on_report=on_report)
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
        f"the first: {_first_bad(reports)}; "
        "repair the input and run with --retry-failed, or allow more"
    )


def _first_bad(reports: Sequence[ShardReport]) -> str:
    ordered = sorted(reports, key=lambda report: report.first_record)
    drops = (drop for report in ordered for drop in report.drops().values() if is_failure(drop[0]))
    return ", ".join(f"{reason} ({name})" for reason, name in itertools.islice(drops, NUM_BAD_SHOWN))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"))
    return Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)


def _run_shards(
    job: BuildJob,
    shards: Sequence[int],
    *,
    num_workers: int,
    retry: bool,
    on_report: Callable[[ShardReport], None],
) -> None:
    """Build the shards, calling `on_report` for each as it is finished.

    A worker that its own decoder killed (segmentation fault and the like) is started again without the record that
    it worked on. Raises UserError from a worker, Stopped, and WorkerDied for any other death.
    """
    if num_workers == 0:
        builder = ShardBuilder(job)
        for shard in shards:
            on_report(builder.build(shard, retry=retry))
        return
    todo = [list(shards[first::num_workers]) for first in range(min(num_workers, len(shards)))]
    marks = [Mark(1) for _ in todo]
    crashed: set[int] = set()

    def work(worker: int) -> Callable[[], Iterator[ShardReport]]:
        known = replace(job, crashed=job.crashed | crashed)
        return partial(_build_shards, known, list(todo[worker]), retry, marks[worker])

    def on_item(worker: int, report: ShardReport) -> None:
        todo[worker].remove(int(report.name))
        on_report(report)

    def on_death(worker: int, exit_code: int) -> Callable[[], Iterator[ShardReport]]:
        if exit_code == STOPPED:
            raise Stopped
        record = marks[worker].get()
        if record is None or -exit_code not in CRASH_SIGNALS:
            where = "between records" if record is None else f"at input record {record[0]}"
            raise WorkerDied(f"a worker ended with exit code {exit_code} {where}; run the build again")
        crashed.add(record[0])
        get_logger(__name__).warning(
            "input record %d killed a worker (signal %d); it is dropped", record[0], -exit_code
        )
        if len(crashed) > MAX_CRASHES:
            raise WorkerDied(f"{len(crashed)} input records killed a worker; the last is {record[0]}")
        return work(worker)

    load_tar_writer()
    # forked: sources may hold anything, and nothing is pickled on the way in
    run_workers([work(worker) for worker in range(len(todo))], on_item=on_item, on_death=on_death)


def _build_shards(job: BuildJob, shards: Sequence[int], retry: bool, mark: Mark) -> Iterator[ShardReport]:
    """What one worker does. A stop signal is obeyed between two records."""
    with StopSignals() as stop:

        def on_record(number: int) -> None:
            mark.set((number,))
            if stop.is_requested:
                raise Stopped

        builder = ShardBuilder(job, on_record=on_record)
        for shard in shards:
            try:
                report = builder.build(shard, retry=retry)
            except OSError as error:
                raise UserError(str(error)) from error
            except Exception as error:
                error.add_note(f"at input record {mark.get()}")
                raise
            mark.set(None)
            yield report


def _parser(source: type | None) -> argparse.ArgumentParser:
    parser = make_parser("python -m data_prep.build", source.__doc__ if source else __doc__)
    add_options(parser, model_options(BuildOptions))
    if source:
        add_options(parser, signature_options(source), title="source")
    add_options(parser, _image_options(source), title="images")
    add_options(parser, model_options(FilterSettings), title="filters")
    return parser


def _image_options(source: type | None) -> list[Option]:
    """The settings' fields; a source may have other defaults (`image_format = "png"`)."""
    options = model_options(ImageSettings)
    return [replace(option, default=getattr(source, option.name, option.default)) for option in options]


def make_job(options: BuildOptions, arguments: argparse.Namespace, source_type: type) -> BuildJob:
    """The job that the command line asks for. Raises UserError."""
    filters = read_options(FilterSettings, arguments)
    images = read_options(ImageSettings, arguments)
    if images.fast and (missing := [name for name in ("simplejpeg", "cv2") if find_spec(name) is None]):
        raise UserError(f"--fast needs {' and '.join(missing)}: pip install vlgpt[fast]")
    # reads the lists of the filters: a missing one is reported before a long scan of the source
    RecordFilter(filters)
    source_options = chosen(arguments, signature_options(source_type))
    source = source_type(options.input, **source_options)
    if not len(source):
        raise UserError(
            f"source {options.source} found no records in {[str(path) for path in options.input]}"
        )
    return BuildJob(
        folder=options.output,
        source=source,
        source_name=options.source,
        source_options=source_options,
        inputs=options.input,
        images=images,
        filters=filters,
        shard_size=options.shard_size,
        tokenizer=options.load_tokenizer(),
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
    options = read_options(BuildOptions, arguments)
    job = make_job(options, arguments, source_class(options.source))
    try:
        manifest = build(
            job,
            name=options.name or options.output.resolve().name,
            share=options.share,
            num_workers=options.num_workers,
            retry_failed=options.retry_failed,
            max_bad_fraction=options.max_bad_fraction,
            hash_tars=options.verify == "hash",
        )
    except (TooManyBad, WorkerDied) as error:
        help_ = f"; list them: python -m data_prep.check --bad {options.output}" * isinstance(
            error, TooManyBad
        )
        console.print(f"error: {error}{help_}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except (Stopped, KeyboardInterrupt):
        console.print("stopped; run the same command again to continue", highlight=False, soft_wrap=True)
        return STOPPED
    if manifest is None:
        console.print(f"task {options.task_index} of {options.num_tasks} is done; other tasks are not yet")
    else:
        console.print(summary(options.output, manifest), highlight=False, soft_wrap=True)
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
