"""`make demo-lm`: stages 2 and 3 of the paper on a real language model, SmolLM2-135M-Instruct, on 2 CPU cores.

Runs like `make demo` (demo/run.py) and builds on what that has made: shards, image tokenizer, encoders and judge
are taken when they are finished and made when not. Everything new lies in runs/demo-lm. Text ability is kept by
replaying the language model's own replies, and measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field

from demo import run as demo
from demo.run import ZERO2, Step
from vlgpt.options import Options, parse

ROOT = Path("runs/demo-lm")
CONFIGS = "demo/configs/lm"
TRAINED = ("pairs-train", "documents-train", "instructions-train")


def training(name: str, *, after: tuple[str, ...], port: int) -> Step:
    """Stage 2 or 3 through the deepspeed launcher."""
    config = f"{CONFIGS}/{name}.yaml"
    command = f"deepspeed --master_port {port} launchers/{name}.py {ZERO2} --config {config}"
    return Step(f"lm-{name}", command, f"{ROOT}/{name}", after, (config,))


def own_steps() -> list[Step]:
    """What comes on top of the demo."""
    model, chats, data = f"{ROOT}/smollm2", f"{ROOT}/data/chats", f"{ROOT}/data"
    shards = " ".join(f"{demo.ROOT}/data/{name}" for name in TRAINED)
    # An index holds the lengths of one tokenizer: files are linked, and indexes replaced beside the demo's own.
    link = f"sh -c 'mkdir -p {data} && cp --archive --link --force {shards} {data}'"
    index = f"python -m data_prep.index {' '.join(f'{data}/{name}' for name in TRAINED)} --tokenizer {model}"
    index += " --template own"
    ask = f"python -m demo.chats --model {model} --output {data} --threads 2"
    # Chats have no images: their features are empty, but the loader asks every source for them.
    empty = f"python -m data_prep.features {chats}-train --encoder {demo.ROOT}/clip/result --features patches"
    evaluate = demo.evaluation(
        f"{ROOT}/finetune/result", pretrained=f"{ROOT}/pretrain/result", output=f"{ROOT}/evaluation"
    )
    # The demo has built all held-out shards for its own evaluation.
    nll = f"python -m evaluation.text_nll {ROOT}/finetune/result --base {model} --data {chats}-held-out"
    report = f"python -m demo.report --run {ROOT} --output {ROOT}/report.html --data {demo.ROOT}/data"
    return [
        Step("lm-model", f"python -m demo.smollm2 {model}", model),
        Step("lm-data", link, " ".join(f"{data}/{name}" for name in TRAINED), ("features", "features-2")),
        Step("lm-lengths", index, "", ("lm-data", "lm-model")),
        Step("lm-chats", ask, f"{chats}-train {chats}-held-out", ("lm-model",), ("demo/chats.py",)),
        Step("lm-chat-features", empty, f"{chats}-train/features", ("lm-chats", "clip")),
        training("pretrain", after=("lm-lengths", "lm-chat-features", "tokenizer"), port=29521),
        training("finetune", after=("lm-pretrain", "decoder"), port=29522),
        Step(
            "lm-evaluation",
            f"{evaluate} --option max_shots=8 --threads 2 --dtype bfloat16",
            f"{ROOT}/evaluation",
            ("lm-finetune", "evaluation"),
            ("demo/jobs.yaml",),
        ),
        Step(
            "lm-text",
            f"{nll} --output {ROOT}/text.json",
            f"{ROOT}/text.json",
            ("lm-finetune", "lm-chats"),
        ),
        Step(
            "lm-report",
            f"{report} --demo {demo.ROOT} --also {ROOT}/text.json",
            f"{ROOT}/report.html",
            ("lm-evaluation", "lm-text", "report"),
        ),
    ]


def steps() -> list[Step]:
    """The demo's steps, then the new ones, in the order in which they are printed."""
    return [*demo.steps("conv"), *own_steps()]


class LmOptions(Options):
    """The command line."""

    jobs: int = Field(2, description="steps side by side")


def main() -> int:
    """Command line: 0 when all steps are done, 130 after Ctrl-C."""
    options = parse(LmOptions, None, prog="python -m demo.run_lm", description=__doc__)
    return demo.run_demo(steps(), jobs=options.jobs, root=ROOT, command="make demo-lm", prefix="lm-")


if __name__ == "__main__":
    sys.exit(main())
