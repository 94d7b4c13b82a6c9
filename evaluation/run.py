"""Ask a model every question of a benchmark.

    python -m evaluation.run vqav2 --model EXPORT --data DIR --output OUT

Predictions are written as they come, so a killed run goes on where it stopped; several processes share the
work by example id. The last one to finish merges their files into predictions.jsonl, which
`evaluation.score` reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from evaluation import benchmarks, manifest
from evaluation.core import (
    IMAGE_KINDS,
    Benchmark,
    DecodeSettings,
    Example,
    JsonObject,
    Prediction,
    Prompt,
    Responder,
)
from evaluation.features import ClipFeatures
from evaluation.fewshot import Demonstrator, FewShot, Selection
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
from vlgpt.options import Argument, Options, parse
from vlgpt.processes import Share, run_ranks

Pairs = Annotated[tuple[str, ...], Argument(is_repeated=True, metavar="NAME=VALUE")]


class AnswerOptions(Options):
    """Flags that `evaluation.run` and `evaluation.run_all` share."""

    prompts: str = Field("vlgpt", description="vlgpt (pre-trained), vlgpt-i (instruction-tuned) or a .yaml")
    limit: int | None = Field(None, description="answer a random subset of this size")
    batch_size: int = 8
    draw_batch_size: int = Field(1, description="images drawn at a time (part of the protocol)")
    num_processes: int = 1
    rank: int | None = Field(
        None, description="this process (0 ...); without it all processes are started here"
    )
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _is_one_of_the_processes(self) -> AnswerOptions:
        Share(self.rank or 0, self.num_processes, flag="--rank")
        return self

    def load(self, export: Path) -> ModelResponder:
        """The model of an export folder; processes take turns on the machine's GPUs."""
        device = self.device
        if device == "cuda":
            import torch

            device = f"cuda:{(self.rank or 0) % max(torch.cuda.device_count(), 1)}"
        return ModelResponder.load(
            export, device=device, dtype=self.dtype, draw_batch_size=self.draw_batch_size
        )


class RunOptions(AnswerOptions):
    """The command line."""

    benchmark: Annotated[str, Argument(is_positional=True)] = Field(description=benchmarks.VALID_NAMES)
    model: Path | None = Field(None, description="export folder (vlgpt export)")
    responder: Literal["oracle", "shuffled"] | None = Field(
        None, description="a fake that tests the benchmark, instead of --model"
    )
    data: Path = Field(description="folder with the official files (docs/evaluation.md)")
    output: Path
    option: Pairs = Field((), description="an option of the benchmark")
    decode: Pairs = Field((), description="a decode setting")
    shots: int = Field(0, description="demonstrations before the question")
    dagger: bool = Field(False, description="two demonstrations without their images (paper's dagger)")
    selection: Selection = "random"
    clip: Path | None = Field(None, description="CLIP folder for RICES")
    seed: int = 0

    @model_validator(mode="after")
    def _has_one_who_answers(self) -> RunOptions:
        if (self.model is None) == (self.responder is None):
            raise UserError("give --model FOLDER or --responder, one of the two")
        return self


def run(
    benchmark: Benchmark,
    responder: Responder,
    *,
    examples: Sequence[Example],
    output: Path,
    demonstrator: Demonstrator | None = None,
    decoding: DecodeSettings | None = None,
    batch_size: int = 8,
    num_processes: int = 1,
    rank: int = 0,
    subset: JsonObject | None = None,
) -> Path | None:
    """Answer this process's share of the examples; the path of predictions.jsonl once all shares are done.

    Raises UserError when `output` holds predictions of another protocol.
    """
    decoding = decoding or benchmark.decoding
    if benchmark.kind in IMAGE_KINDS:
        # The manifest records what is drawn with, also where the image decoder decides.
        own = getattr(responder, "drawing", {})
        decoding = replace(decoding, **{key: own[key] for key in own if getattr(decoding, key) is None})
    demonstrator = demonstrator or Demonstrator(benchmark, (), FewShot())
    facts = manifest.build(
        benchmark,
        examples,
        responder=responder,
        decoding=decoding,
        shots=demonstrator.manifest(),
        subset=subset,
    )
    manifest.write_or_check(output, facts)
    for name, content in benchmark.extra_files(examples).items():
        (output / name).write_text(content, encoding="utf-8")
    done = read_shards(output)
    group_size = getattr(responder, "draw_batch_size", 1) if benchmark.kind in IMAGE_KINDS else 1
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

    Images that are made several at a time round differently beside other prompts. So their batches are fixed
    groups of the benchmark's order: one process answers a whole group, and all of it again after a kill within it.
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
    decoding: DecodeSettings,
    output: Path,
) -> list[Prediction]:
    """One prediction for every example, by the benchmark's kind; images go below `output`."""
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
    """At most `limit` examples, a random subset in the benchmark's order: the same for all models and processes."""
    if limit is None or limit >= len(examples):
        return examples
    order = sorted(range(len(examples)), key=lambda at: seeds.address(seed, "limit", examples[at].id))
    return [examples[at] for at in sorted(order[:limit])]


def write_submission(benchmark: Benchmark, predictions_file: Path, data: Path) -> Path | None:
    """The official submission file beside predictions.jsonl, where the benchmark has one.

    Raises UserError when it would not hold exactly one answer to every question of the split.
    """
    predictions = {r["id"]: r for r in read_jsonl(predictions_file)}
    records = benchmark.submission(predictions, data)
    if records is None:
        return None
    ids = [record["id"] for record in benchmark.from_submission(records)]
    check = check_ids(ids, [example.id for example in benchmark.truths(data)])
    if check.missing or check.duplicate:
        raise UserError(f"{benchmark.name}: the submission would be refused by the server ({check})")
    path = predictions_file.with_name("submission.json")
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """["a=1"] -> {"a": "1"}. Raises UserError for a text without "="."""
    if wrong := [text for text in texts if "=" not in text]:
        raise UserError(f"{flag} {wrong[0]!r}: wanted NAME=VALUE")
    return dict(text.split("=", 1) for text in texts)


def changed(decoding: DecodeSettings, changes: JsonObject) -> DecodeSettings:
    """Decode settings with some fields replaced. Raises UserError for an unknown field."""
    names = [field.name for field in fields(DecodeSettings)]
    if unknown := sorted(set(changes) - set(names)):
        raise UserError(f"decoding has no {', '.join(unknown)}; valid: {', '.join(names)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return replace(decoding, **values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: asks the model and writes predictions with their manifest. Raises UserError for wrong options."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(
        RunOptions, arguments, prog="python -m evaluation.run", description=(__doc__ or "").split("\n")[0]
    )
    configure(rank=options.rank or 0)
    if options.num_processes > 1 and options.rank is None:
        return run_ranks("evaluation.run", arguments, options.num_processes)
    benchmark = benchmarks.make(
        options.benchmark, prompt_file=options.prompts, **pairs(options.option, "--option")
    )
    examples = select(benchmark.examples(options.data), limit=options.limit, seed=options.seed)
    few_shot = FewShot(options.shots, options.seed, options.selection)
    if options.dagger:
        few_shot = FewShot.dagger(seed=options.seed)
    pool = benchmark.pool(options.data) if few_shot.shots else ()
    features = None if options.clip is None else ClipFeatures(options.clip, device=options.device).images
    decode = {key: json.loads(value) for key, value in pairs(options.decode, "--decode").items()}
    predictions = run(
        benchmark,
        _responder(options, benchmark, examples),
        examples=examples,
        output=options.output,
        demonstrator=Demonstrator(benchmark, pool, few_shot, features=features),
        decoding=changed(benchmark.decoding, {"seed": options.seed, **decode}),
        batch_size=options.batch_size,
        num_processes=options.num_processes,
        rank=options.rank or 0,
        subset=None if options.limit is None else {"limit": options.limit, "seed": options.seed},
    )
    if predictions is None:
        print(f"{options.output}: this share is done; other processes are still at work")
        return 0
    print(predictions)
    if options.limit is None and (path := write_submission(benchmark, predictions, options.data)):
        print(path)
    return 0


def _responder(options: RunOptions, benchmark: Benchmark, examples: Sequence[Example]) -> Responder:
    if options.model is not None:
        return options.load(options.model)
    if options.responder == "oracle":
        return OracleResponder(benchmark, examples)
    return ShuffledResponder(benchmark, examples, seed=options.seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
