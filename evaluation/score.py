"""Score saved predictions: `python -m evaluation.score vqav2 --data DIR --predictions FILE --output results.json`.

Takes our predictions.jsonl, the benchmark's official submission file (.json) or, for drawn images, a folder of PNG
files named by id. No model is loaded. Ids must fit the benchmark exactly unless `--partial` is given.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from evaluation import benchmarks, manifest
from evaluation.core import IMAGE_KINDS, Benchmark, JsonObject, Prediction, no_garbage_collection, read_json
from evaluation.fewshot import label_of
from evaluation.manifest import Manifest
from evaluation.predictions import check_ids, read_jsonl
from evaluation.run import Pairs, pairs, select
from vlgpt.errors import UserError, run_command
from vlgpt.files import sha256_file, write_atomic
from vlgpt.options import Argument, Options, parse


class ScoreOptions(Options):
    """The command line."""

    benchmark: Annotated[str, Argument(is_positional=True)] = Field(description=benchmarks.VALID_NAMES)
    data: Path = Field(description="folder with the official files (docs/evaluation.md)")
    predictions: Path
    output: Path = Field(description="results.json")
    option: Pairs = Field((), description="an option of the benchmark")
    partial: bool = Field(False, description="score what is there; missing and foreign ids are recorded")


def score(
    benchmark: Benchmark,
    records: Sequence[Prediction],
    data: Path,
    *,
    is_partial: bool = False,
    run: Manifest | None = None,
) -> tuple[JsonObject, dict[str, float]]:
    """The result of a benchmark, JSON-ready, and its primary metric by example.

    Raises UserError that lists missing, duplicate and foreign ids (with `is_partial` they are only
    recorded, and the first of duplicates counts).
    """
    run_facts = run or {}
    examples = benchmark.truths(data)
    subset = run_facts.get("subset")
    wanted = select(examples, limit=subset["limit"], seed=subset["seed"]) if subset else examples
    check = check_ids([record["id"] for record in records], [example.id for example in wanted])
    if check and not is_partial:
        raise UserError(
            f"{benchmark.name}: {check}. Fix the predictions, or score what is there with --partial"
        )
    first: dict[str, Prediction] = {}
    for record in records:
        first.setdefault(record["id"], record)
    answered = [example for example in wanted if example.id in first]
    if not answered:
        raise UserError(
            f"{benchmark.name}: no prediction belongs to one of the {len(wanted)} examples ({check})"
        )
    scores = benchmark.score(answered, {example.id: first[example.id] for example in answered}, data)
    template = benchmark.template
    result = {
        "benchmark": benchmarks.reference(benchmark),
        "split": benchmark.split,
        "shots": label_of(run_facts.get("shots", {})),
        "primary": benchmark.primary,
        "higher_is_better": benchmark.higher_is_better,
        "metrics": scores.metrics,
        "breakdown": scores.breakdown,
        "notes": scores.notes,
        "n": len(answered),
        "num_examples": len(examples),
        "ids": {"is_partial": is_partial, **{name: list(ids) for name, ids in asdict(check).items()}},
        "scoring": {
            "options": benchmark.options(),
            "prompt": {"id": template.id, "hash": template.hash},
            "versions": manifest.library_versions(),
        },
        "run": run,
    }
    return result, scores.per_example


def read_predictions(path: Path, benchmark: Benchmark) -> list[Prediction]:
    """Predictions from predictions.jsonl, an official submission file or a folder of images.

    Raises UserError for a missing file, another format, or an image path that leaves the predictions' folder.
    """
    if path.is_dir():
        if benchmark.kind in IMAGE_KINDS and not (path / "predictions.jsonl").is_file():
            return [{"id": file.stem, "image": str(file)} for file in sorted(path.glob("*.png"))]
        path = path / "predictions.jsonl"
    if not path.is_file():
        raise UserError(f"predictions {path} not found; run evaluation.run to its end first")
    if path.suffix == ".jsonl":
        return [_with_full_path(record, path.parent) for record in read_jsonl(path)]
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(f"{path}: a submission file is a JSON list, found {type(content).__name__}")
    try:
        return benchmark.from_submission(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not the submission format of {benchmark.name} ({error!r})") from error


def _with_full_path(record: Prediction, folder: Path) -> Prediction:
    if not record.get("image"):
        return record
    image = (folder / record["image"]).resolve()
    if not image.is_relative_to(folder.resolve()):
        raise UserError(f"prediction {record['id']!r}: image {record['image']!r} is outside {folder}")
    return {**record, "image": str(image)}


def score_files(
    benchmark: Benchmark, predictions: Path, data: Path, output: Path, *, is_partial: bool = False
) -> JsonObject:
    """Score predictions (see `read_predictions`) into the file `output`; the result."""
    folder = predictions if predictions.is_dir() else predictions.parent
    with no_garbage_collection():
        records = read_predictions(predictions, benchmark)
        result, per_example = score(
            benchmark, records, data, is_partial=is_partial, run=manifest.read(folder)
        )
    if predictions.is_file():
        result["predictions"] = {"file": predictions.name, "sha256": sha256_file(predictions)}
    write_results(result, per_example, output)
    return result


def score_folder(benchmark: Benchmark, folder: Path, data: Path) -> JsonObject:
    """Score `folder`/predictions.jsonl into `folder`/results.json; the result.

    An existing results.json is kept where it belongs to these very predictions and options.
    """
    results, predictions = folder / "results.json", folder / "predictions.jsonl"
    if results.is_file():
        result = read_json(results)
        is_same_file = result.get("predictions", {}).get("sha256") == sha256_file(predictions)
        if is_same_file and result["scoring"]["options"] == benchmark.options():
            return result
    return score_files(benchmark, predictions, data, results)


def write_results(result: JsonObject, per_example: Mapping[str, float], output: Path) -> None:
    """results.json, and beside it the score of every example (for paired comparisons and reports)."""
    output.parent.mkdir(parents=True, exist_ok=True)
    per_example_path(output).write_text(json.dumps(per_example, ensure_ascii=False), encoding="utf-8")
    write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def per_example_path(results: Path) -> Path:
    """Where the scores by example lie."""
    return results.with_name(f"{results.stem}.per_example.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: writes results.json and prints the metrics. Raises UserError for another benchmark's
    predictions.
    """
    description = (__doc__ or "").split("\n")[0]
    options = parse(ScoreOptions, arguments, prog="python -m evaluation.score", description=description)
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    run = manifest.read(folder)
    if run is not None and run["benchmark"] != options.benchmark:
        raise UserError(f"{folder} holds predictions of {run['benchmark']}, not of {options.benchmark}")
    given = {**(run["options"] if run else {}), **pairs(options.option, "--option")}
    benchmark = benchmarks.make(options.benchmark, **given)
    result = score_files(
        benchmark, options.predictions, options.data, options.output, is_partial=options.partial
    )
    for name, entry in result["metrics"].items():
        chance = f"  (chance {entry['chance']:.2f})" if "chance" in entry else ""
        print(f"{name:24} {entry['value']:10.4f}  n={entry['n']}{chance}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
