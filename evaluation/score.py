"""Score saved predictions: `python -m evaluation.score vqav2 --data DIR --predictions FILE --output
results.json`.

Takes our predictions.jsonl, the benchmark's official submission file (.json) or, for drawn pictures, a
folder of PNG files named by id. No model is loaded. Ids must fit the benchmark exactly unless `--partial`
is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation import benchmarks, manifest
from evaluation.core import Benchmark, Prediction, no_garbage_collection, read_json
from evaluation.fewshot import label_of
from evaluation.predictions import IdCheck, check_ids, read_jsonl
from evaluation.run import pairs, select
from vlgpt.errors import UserError, run_command
from vlgpt.files import sha256_file, write_atomic

IMAGE_KINDS = ("image", "reconstruction")


def score(
    benchmark: Benchmark,
    records: Sequence[Prediction],
    data: Path,
    *,
    is_partial: bool = False,
    run: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The result of a benchmark, JSON-ready, and its primary metric by example.

    Raises UserError that lists missing, duplicate and foreign ids (with `is_partial` they are only
    recorded, and the first of duplicates counts).
    """
    examples = benchmark.truths(data)
    subset = (run or {}).get("subset")
    wanted = select(examples, limit=subset["limit"], seed=subset["seed"]) if subset else examples
    ids = [example.id for example in wanted]
    check = check_ids([record["id"] for record in records], ids)
    if check and not is_partial:
        raise UserError(
            f"{benchmark.name}: {check}. Fix the predictions, or score what is there with --partial"
        )
    first: dict[str, Prediction] = {}
    for record in records:
        first.setdefault(record["id"], record)
    predictions = {id: first[id] for id in ids if id in first}
    if not predictions:
        raise UserError(
            f"{benchmark.name}: no prediction belongs to one of the {len(ids)} examples ({check})"
        )
    with benchmark.remembering(data, examples):
        scores = benchmark.score(predictions, data)
    template = benchmark.template
    result = {
        "benchmark": benchmarks.reference(benchmark),
        "split": benchmark.split,
        "shots": label_of((run or {}).get("shots", {})),
        "primary": benchmark.primary,
        "higher_is_better": benchmark.higher_is_better,
        "metrics": scores.metrics,
        "breakdown": scores.breakdown,
        "notes": scores.notes,
        "n": len(predictions),
        "num_examples": len(examples),
        "ids": _id_report(check, is_partial=is_partial),
        "scoring": {
            "options": benchmark.options(),
            "prompt": {"id": template.id, "hash": template.hash},
            "versions": manifest.library_versions(),
        },
        "run": run,
    }
    return result, scores.per_example


def _id_report(check: IdCheck, *, is_partial: bool) -> dict[str, Any]:
    return {"is_partial": is_partial, **{name: list(ids) for name, ids in asdict(check).items()}}


def read_predictions(path: Path, benchmark: Benchmark) -> list[Prediction]:
    """Predictions from predictions.jsonl, an official submission file or a folder of pictures.

    Raises UserError for a missing file, another format, or a picture path that leaves the predictions'
    folder.
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
        raise UserError(f"prediction {record['id']!r}: picture {record['image']!r} is outside {folder}")
    return {**record, "image": str(image)}


def score_folder(benchmark: Benchmark, folder: Path, data: Path) -> dict[str, Any]:
    """Score `folder`/predictions.jsonl into `folder`/results.json, unless that belongs to these very predictions
    and options already; the result."""
    results, predictions = folder / "results.json", folder / "predictions.jsonl"
    sha256 = sha256_file(predictions)
    if results.is_file():
        result = read_json(results)
        is_same_file = result.get("predictions", {}).get("sha256") == sha256
        if is_same_file and result["scoring"]["options"] == benchmark.options():
            return result
    records = read_predictions(predictions, benchmark)
    result, per_example = score(benchmark, records, data, run=manifest.read(folder))
    result["predictions"] = {"file": predictions.name, "sha256": sha256}
    write_results(result, per_example, results)
    return result


def write_results(result: dict[str, Any], per_example: Mapping[str, float], output: Path) -> None:
    """results.json, and beside it the score of every example (for paired comparisons and reports)."""
    output.parent.mkdir(parents=True, exist_ok=True)
    per_example_path(output).write_text(json.dumps(per_example, ensure_ascii=False), encoding="utf-8")
    write_atomic(output, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def per_example_path(results: Path) -> Path:
    return results.with_name(f"{results.stem}.per_example.json")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m evaluation.score", description=(__doc__ or "").split("\n")[0])
    p.add_argument("benchmark", help=", ".join(benchmarks.REGISTRY))
    p.add_argument(
        "--data", type=Path, required=True, help="folder with the official files (docs/evaluation.md)"
    )
    p.add_argument("--predictions", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True, help="results.json")
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the benchmark"
    )
    p.add_argument(
        "--partial", action="store_true", help="score what is there; missing and foreign ids are recorded"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    folder = args.predictions if args.predictions.is_dir() else args.predictions.parent
    run = manifest.read(folder)
    if run is not None and run["benchmark"] != args.benchmark:
        raise UserError(f"{folder} holds predictions of {run['benchmark']}, not of {args.benchmark}")
    options = {**(run["options"] if run else {}), **pairs(args.option, "--option")}
    benchmark = benchmarks.make(args.benchmark, **options)
    with no_garbage_collection():
        records = read_predictions(args.predictions, benchmark)
        result, per_example = score(benchmark, records, args.data, is_partial=args.partial, run=run)
    if args.predictions.is_file():
        result["predictions"] = {"file": args.predictions.name, "sha256": sha256_file(args.predictions)}
    write_results(result, per_example, args.output)
    for name, entry in result["metrics"].items():
        chance = f"  (chance {entry['chance']:.2f})" if "chance" in entry else ""
        print(f"{name:24} {entry['value']:10.4f}  n={entry['n']}{chance}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
