"""Ask a model every question of a benchmark.

    python -m evaluation.run vqav2 --model EXPORT --data DIR --output OUT

Predictions are written as they come, so a killed run goes on where it stopped; several processes share the
work by example id. The last one to finish merges their files into predictions.jsonl, which
`evaluation.score` reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import benchmarks, manifest
from evaluation.core import Benchmark, Decoding, Example, Prediction, Prompt, Responder
from evaluation.fewshot import Demonstrator, FewShot
from evaluation.predictions import (
    PredictionLog,
    check_ids,
    merge,
    process_of,
    read_jsonl,
    read_shards,
    save_image,
)
from evaluation.responders import ModelResponder, OracleResponder, ShuffledResponder
from vlgpt import seeds
from vlgpt.errors import UserError, run_command
from vlgpt.log import configure, get_logger

PICTURE_KINDS = ("image", "reconstruction")


def run(
    benchmark: Benchmark,
    responder: Responder,
    *,
    examples: Sequence[Example],
    output: Path,
    demonstrator: Demonstrator | None = None,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    num_processes: int = 1,
    rank: int = 0,
    subset: dict[str, Any] | None = None,
) -> Path | None:
    """Answer this process's share of the examples; the path of predictions.jsonl once all shares are done.

    Raises UserError when `output` holds predictions of another protocol.
    """
    decoding = decoding or benchmark.decoding
    if benchmark.kind in PICTURE_KINDS:  # recorded as it is drawn
        own = getattr(responder, "drawing", {})
        decoding = decoding.replace(**{key: own[key] for key in own if getattr(decoding, key) is None})
    demonstrator = demonstrator or Demonstrator(benchmark, (), FewShot())
    shots = demonstrator.manifest()
    manifest.write_or_check(
        output,
        manifest.build(
            benchmark, examples, responder=responder, decoding=decoding, shots=shots, subset=subset
        ),
    )
    for name, content in benchmark.extra_files(examples).items():
        (output / name).write_text(content, encoding="utf-8")
    done = read_shards(output)
    group_size = getattr(responder, "draw_batch_size", 1) if benchmark.kind in PICTURE_KINDS else 1
    batches = _batches(
        examples, done, group_size=group_size, batch_size=batch_size, num_processes=num_processes, rank=rank
    )
    logger = get_logger("evaluation")
    logger.info("%s: %d of %d examples to answer here", benchmark.name, sum(map(len, batches)), len(examples))
    log = PredictionLog(output, rank=rank, num_processes=num_processes)
    try:
        for number, batch in enumerate(batches, 1):
            asked = [demonstrator.prompt(example) for example in batch]
            answers = answer(benchmark, responder, batch, [prompt for prompt, _ in asked], decoding, output)
            for record, (_, shot_ids) in zip(answers, asked):
                if shot_ids:
                    record["shots"] = shot_ids
            log.write(record for record in answers if record["id"] not in done)
            if number % 100 == 0:
                logger.info("%s: %d of %d batches", benchmark.name, number, len(batches))
    finally:
        log.close()
    return merge(output, [example.id for example in examples])


def _batches(
    examples: Sequence[Example],
    done: Container[str],
    *,
    group_size: int,
    batch_size: int,
    num_processes: int,
    rank: int,
) -> list[Sequence[Example]]:
    """What this process still has to ask, in batches.

    Pictures that are made several at a time round differently beside other prompts. So their batches are fixed
    groups of the benchmark's order: one group is answered by one process, and whole again when a kill cut it.
    """
    groups = [examples[start : start + group_size] for start in range(0, len(examples), group_size)]
    mine = [group for group in groups if process_of(group[0].id, num_processes=num_processes) == rank]
    todo = [group for group in mine if any(example.id not in done for example in group)]
    if group_size > 1:
        return todo
    single = [group[0] for group in todo]
    return [single[start : start + batch_size] for start in range(0, len(single), batch_size)]


def answer(
    benchmark: Benchmark,
    responder: Responder,
    examples: Sequence[Example],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    output: Path,
) -> list[Prediction]:
    """One prediction for every example, by the benchmark's kind."""
    ids = [example.id for example in examples]
    if benchmark.kind == "text":
        texts = responder.generate(prompts, decoding)
        return [
            {"id": example.id, "text": text, **_second_answer(benchmark, responder, example)}
            for example, text in zip(examples, texts)
        ]
    if benchmark.kind == "rank":
        normalise = getattr(benchmark, "normalise", "sum")
        scores = [
            responder.rank(prompt, benchmark.candidates(example), normalise=normalise)
            for prompt, example in zip(prompts, examples)
        ]
        return [{"id": id, "scores": [float(value) for value in row]} for id, row in zip(ids, scores)]
    draw = responder.reconstruct if benchmark.kind == "reconstruction" else responder.draw
    images = draw(prompts, decoding)
    return [{"id": id, "image": image and save_image(output, id, image)} for id, image in zip(ids, images)]


def _second_answer(benchmark: Benchmark, responder: Responder, example: Example) -> dict[str, float]:
    """The share of the first candidate of the second question, where the benchmark asks one."""
    second = benchmark.second_question(example)
    if second is None:
        return {}
    scores = responder.rank(second.prompt, second.candidates, normalise="sum")
    weights = np.exp(scores - scores.max())
    return {second.key: float(weights[0] / weights.sum())}


def select(examples: Sequence[Example], *, limit: int | None, seed: int) -> Sequence[Example]:
    """At most `limit` examples, a random subset in the benchmark's order: the same for every model and
    process."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = set(
        sorted(range(len(examples)), key=lambda i: seeds.address(seed, "limit", examples[i].id))[:limit]
    )
    return [example for i, example in enumerate(examples) if i in chosen]


def write_submission(benchmark: Benchmark, predictions_file: Path, data: Path) -> Path | None:
    """The official submission file beside predictions.jsonl, where the benchmark has one."""
    predictions = {r["id"]: r for r in read_jsonl(predictions_file)}
    records = benchmark.submission(predictions, data)
    if records is None:
        return None
    check = check_ids([record["id"] for record in benchmark.from_submission(records)], predictions)
    if check.missing or check.duplicate:
        raise UserError(f"{benchmark.name}: the submission would be refused by the server ({check})")
    path = predictions_file.with_name("submission.json")
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m evaluation.run", description=(__doc__ or "").split("\n")[0])
    p.add_argument("benchmark", help=f"{', '.join(benchmarks.REGISTRY)}, or package.module:Class of your own")
    who = p.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", type=Path, help="export folder (vlgpt export)")
    who.add_argument("--responder", choices=("oracle", "shuffled"), help="a fake that tests the benchmark")
    p.add_argument(
        "--data", type=Path, required=True, help="folder with the official files (docs/evaluation.md)"
    )
    p.add_argument("--output", type=Path, required=True)
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the benchmark"
    )
    p.add_argument("--decode", action="append", default=[], metavar="NAME=VALUE", help="a decode setting")
    p.add_argument(
        "--prompts", default="vlgpt", help="vlgpt (pre-trained), vlgpt-i (instruction-tuned) or a .yaml"
    )
    p.add_argument("--shots", type=int, default=0)
    p.add_argument(
        "--dagger", action="store_true", help="two demonstrations without their pictures (paper's dagger)"
    )
    p.add_argument("--selection", choices=("random", "rices"), default="random")
    p.add_argument("--clip", type=Path, help="CLIP folder for RICES")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--limit", type=int, help="answer a random subset of this size")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument(
        "--draw-batch-size", type=int, default=1, help="pictures drawn at a time (part of the protocol)"
    )
    p.add_argument("--num-processes", type=int, default=1)
    p.add_argument("--rank", type=int, help="this process (0 ...); without it all processes are started here")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    return p


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """["a=1"] -> {"a": "1"}. Raises UserError for a text without "="."""
    if wrong := [text for text in texts if "=" not in text]:
        raise UserError(f"{flag} {wrong[0]!r}: wanted NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    configure(rank=args.rank or 0)
    require_rank(args.rank, args.num_processes)
    if args.num_processes > 1 and args.rank is None:
        return start_processes("evaluation.run", arguments, args.num_processes)
    benchmark = benchmarks.make(args.benchmark, prompt_file=args.prompts, **pairs(args.option, "--option"))
    examples = select(benchmark.examples(args.data), limit=args.limit, seed=args.seed)
    few_shot = FewShot(args.shots, args.seed, args.selection)
    if args.dagger:
        few_shot = FewShot.dagger(seed=args.seed)
    pool = benchmark.pool(args.data) if few_shot.shots else ()
    changes: dict[str, Any] = {key: json.loads(v) for key, v in pairs(args.decode, "--decode").items()}
    predictions = run(
        benchmark,
        _responder(args, benchmark, examples),
        examples=examples,
        output=args.output,
        demonstrator=Demonstrator(benchmark, pool, few_shot, features=_features(args)),
        decoding=benchmark.decoding.replace(seed=args.seed).replace(**changes),
        batch_size=args.batch_size,
        num_processes=args.num_processes,
        rank=args.rank or 0,
        subset=None if args.limit is None else {"limit": args.limit, "seed": args.seed},
    )
    if predictions is None:
        print(f"{args.output}: this share is done; other processes are still at work")
        return 0
    print(predictions)
    if args.limit is None and (path := write_submission(benchmark, predictions, args.data)):
        print(path)
    return 0


def _responder(args: argparse.Namespace, benchmark: Benchmark, examples: Sequence[Example]) -> Responder:
    if args.responder == "oracle":
        return OracleResponder(benchmark, examples)
    if args.responder == "shuffled":
        return ShuffledResponder(benchmark, examples, seed=args.seed)
    device = args.device
    if device == "cuda":
        import torch

        device = f"cuda:{(args.rank or 0) % max(torch.cuda.device_count(), 1)}"
    return ModelResponder.load(
        args.model, device=device, dtype=args.dtype, draw_batch_size=args.draw_batch_size
    )


def _features(args: argparse.Namespace) -> Any:
    if args.clip is None:
        return None
    from evaluation.features import ClipFeatures

    return ClipFeatures(args.clip, device=args.device).images


def require_rank(rank: int | None, num_processes: int) -> None:
    """Raises UserError for a rank whose share nobody counts: it would be left out without a word."""
    if not 0 <= (rank or 0) < num_processes:
        raise UserError(
            f"--rank must be between 0 and {num_processes - 1}, found {rank}; SLURM arrays start at 0, and "
            "some tasks of N again are NUM_TASKS=N sbatch --array=3,5"
        )


def start_processes(module: str, arguments: Sequence[str], num_processes: int) -> int:
    """Run the module once per rank on this machine; the worst exit code."""
    commands = [
        [sys.executable, "-m", module, *arguments, "--rank", str(rank)] for rank in range(num_processes)
    ]
    children = [subprocess.Popen(command) for command in commands]
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(run_command(main))
