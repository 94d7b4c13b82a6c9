"""Command lines: `vlgpt ...` and the training launchers. Only this file of the library has argparse and a console."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vlgpt import log
from vlgpt.document import IMAGE_MARK, Document, ImagePart, Part, Role, TextPart
from vlgpt.errors import UserError, run_command

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlgpt.decoding.api import DecodeSettings
    from vlgpt.settings import RunSettings
    from vlgpt.train.validation import Probe

    MakeProbe = Callable[[RunSettings], Probe]

console = Console(highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------------------------------ training


def launch_training(
    *, default_config: str, make_probe: MakeProbe | None = None, argv: Sequence[str] | None = None
) -> int:
    """What the launchers run: `--deepspeed JSON --config YAML [a.b=c ...]`. Returns the exit code.

    `make_probe(settings)` gives what is asked of the model at every validation, when the settings name probes.
    """
    parser = argparse.ArgumentParser(
        description=f"Train one stage (default configuration: {default_config})."
    )
    parser.add_argument("--deepspeed", metavar="JSON", required=True, help="ZeRO settings, see ds_configs/")
    parser.add_argument(
        "--config", metavar="YAML", default=default_config, help="the run, see launchers/configs/"
    )
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings to change, such as optimizer.lr=1e-4"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: _train(arguments, make_probe))


def _train(arguments: argparse.Namespace, make_probe: MakeProbe | None) -> int:
    from vlgpt.config import load_run

    settings = load_run(arguments.config, arguments.overrides)
    from vlgpt.train.ds_config import read_config
    from vlgpt.train.facts import is_finished, missing_inputs
    from vlgpt.train.run import run_training

    ds_config = read_config(arguments.deepspeed)
    if is_finished(settings):
        sys.stderr.write(f"{settings.run_dir} is complete: nothing to do\n")
        return 0
    if missing := missing_inputs(settings):
        names = ", ".join(f"{key} = {path}" for key, path in missing)
        raise FileNotFoundError(
            f"{names} does not exist: run the step that makes it first (docs/training.md)"
        )
    probe = None
    if settings.validation.probes:
        if make_probe is None:
            raise UserError("validation.probes ask a language model: remove them, this launcher trains none")
        probe = make_probe(settings)
    return run_training(settings, ds_config, ds_source=arguments.deepspeed, probe=probe)


# ---------------------------------------------------------------------------------------------------------- vlgpt NAME


def read_prompt(text: str, num_images: int, *, is_chat: bool) -> Document:
    """`<image>` marks where images stand; without marks they all come first. Raises UserError when counts differ."""
    from vlgpt.chat.dialogue import split_marks

    role: Role = "user" if is_chat else "plain"
    parts: tuple[Part, ...] = tuple(
        TextPart(piece, role) if isinstance(piece, str) else ImagePart(piece, role)
        for piece in split_marks(text, num_images)
    )
    if not parts:
        raise UserError("the prompt is empty: give --prompt, --image or both")
    return Document("prompt", "command line", parts)


def generate(arguments: argparse.Namespace) -> int:
    """Reply to one prompt: JSON on stdout, pictures as PNG files that carry the prompt."""
    from PIL.PngImagePlugin import PngInfo

    from vlgpt.generate import Generator, Prompt

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    images = tuple(_read_file(path) for path in arguments.image)
    document = read_prompt(text, len(images), is_chat=not arguments.plain)
    settings = _decode_settings(arguments)
    generator = Generator.load(arguments.model, device=arguments.device)
    (reply,) = generator.generate([Prompt(document, images)], settings)
    files = []
    if reply.visual:
        import torch

        arguments.output.mkdir(parents=True, exist_ok=True)
        addresses: list[tuple[int | str, ...]] = [
            (arguments.seed, "draw", n) for n in range(len(reply.visual))
        ]
        pictures = generator.draw(
            torch.stack(reply.visual), seeds=addresses, guidance=arguments.decoder_guidance
        )
        for number, picture in enumerate(pictures):
            path = arguments.output / f"{number:02d}.png"
            about = PngInfo()
            about.add_itxt("prompt", text)
            about.add_itxt("model", str(arguments.model))
            picture.save(path, pnginfo=about)
            files.append(str(path))
    record = {
        "prompt": text,
        "text": reply.text,
        "images": files,
        "finish": reply.finish,
        "seed": arguments.seed,
    }
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "reply.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 0


def _read_file(path: Path) -> bytes:
    from vlgpt.images import BadImage, decode_image

    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    content = path.read_bytes()
    try:
        decode_image(content)
    except BadImage as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
    return content


def _decode_settings(arguments: argparse.Namespace) -> DecodeSettings:
    from vlgpt.generate import DecodeSettings

    return DecodeSettings(
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        images=arguments.images,
        max_images=arguments.max_images,
        visual_guidance=arguments.visual_guidance,
        seed=arguments.seed,
    )


def chat(arguments: argparse.Namespace) -> int:
    """Talk with a model in the terminal, with pictures on both sides; /help inside lists the commands."""
    from vlgpt.chat.reply import ReplySettings
    from vlgpt.chat.terminal import Terminal
    from vlgpt.generate import Generator

    settings = ReplySettings(_decode_settings(arguments), decoder_guidance=arguments.decoder_guidance)
    generator = Generator.load(arguments.model, device=arguments.device)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def lines() -> Iterator[str]:
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                yield input("> " if sys.stdin.isatty() else "")

    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
    terminal = Terminal(
        generator, settings, output=arguments.output, write=write, model_name=str(arguments.model)
    )
    terminal.run(lines())
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model over HTTP: OpenAI-style chat completions with pictures, /health, /metrics, /v1/models."""
    from vlgpt.generate import Generator

    try:
        from vlgpt.server.app import ServerLimits, create_app
        from vlgpt.server.app import serve as run_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vlgpt[chat]'") from error
    limits = ServerLimits(
        max_new_tokens=arguments.max_new_tokens,
        max_batch=arguments.max_batch,
        max_waiting=arguments.max_waiting,
        timeout_s=arguments.timeout_s,
        max_body_bytes=arguments.max_body_mib << 20,
    )
    generator = Generator.load(arguments.model, device=arguments.device)
    name = arguments.name or arguments.model.resolve().name
    console.print(f"{name} listens on http://{arguments.host}:{arguments.port}/v1/chat/completions")
    run_server(
        create_app(generator, model_name=name, limits=limits), host=arguments.host, port=arguments.port
    )
    return 0


def reconstruct(arguments: argparse.Namespace) -> int:
    """Pictures through the image tokenizer and back: a contact sheet of original, both, z_v only, z_t only."""
    from vlgpt.decoding.prompts import square_pixels
    from vlgpt.generate import Conditions, Generator, to_pictures

    data = [_read_file(path) for path in arguments.image]
    generator = Generator.load(arguments.model, device=arguments.device)
    options = {
        "guidance": arguments.decoder_guidance,
        "image_scale": arguments.image_scale,
        "seed": arguments.seed,
    }
    uses: dict[str, Conditions] = {"both": "both", "z_v only": "image", "z_t only": "text"}
    columns = {name: generator.reconstruct(data, use=use, **options) for name, use in uses.items()}
    size = columns["both"][0].width
    originals = [
        to_pictures(square_pixels(content, size)[None])[0] for content in data
    ]  # as the encoder sees them
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet({"original": originals, **columns}).save(arguments.output)
    console.print(f"{arguments.output}: original, reconstruction, z_v only, z_t only")
    return 0


def contact_sheet(columns: Mapping[str, Sequence[Image]], *, min_cell_px: int = 128) -> Image:
    """Pictures of one size under the names of their columns; small ones are enlarged by a whole factor."""
    from PIL import Image as images
    from PIL import ImageDraw

    size, count = next(iter(columns.values()))[0].width, len(next(iter(columns.values())))
    cell, header = size * -(-min_cell_px // size), 16
    sheet = images.new("RGB", (cell * len(columns), header + cell * count), "white")
    for column, (name, pictures) in enumerate(columns.items()):
        ImageDraw.Draw(sheet).text((column * cell + 4, 2), name, fill="black")
        for row, picture in enumerate(pictures):
            enlarged = picture.resize((cell, cell), images.Resampling.NEAREST)
            sheet.paste(enlarged, (column * cell, header + row * cell))
    return sheet


def export(arguments: argparse.Namespace) -> int:
    """The newest commit of a run as an export folder; needs neither GPU nor deepspeed."""
    from vlgpt.stages.language import export_run

    export_run(
        arguments.run,
        arguments.output,
        merge_lora=not arguments.keep_lora,
        picture_decoder=arguments.picture_decoder,
    )
    console.print(f"{arguments.output} holds the export of {arguments.run}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """The next batches of a run as the model will see them: tokens, roles, segments, targets, weights, images."""
    from vlgpt.config import load_run
    from vlgpt.data.inspect import LossWeights
    from vlgpt.data.inspect import inspect as look
    from vlgpt.data.inspect_page import to_html, to_text
    from vlgpt.data.loader import Loader
    from vlgpt.settings import LanguageStageSettings
    from vlgpt.stages.language import load_tokenizer

    run = load_run(arguments.config, arguments.overrides)
    tokenizer, weights = None, LossWeights()
    if isinstance(run.stage, LanguageStageSettings):
        tokenizer = load_tokenizer(run.stage)
        weights = LossWeights(run.stage.text_weight, run.stage.visual_weight, run.stage.first_visual_weight)
    loader = Loader(
        run.data.model_copy(update={"num_workers": 0}),
        kind="packed" if tokenizer is not None else "conditions",
        micro_batch=run.micro_batch,
        tokenizer=tokenizer,
        run_positions=run.steps * run.global_batch,
    )
    try:
        found = look(loader, num_batches=arguments.batches, weights=weights)
    finally:
        loader.close()
    if arguments.html is not None:
        arguments.html.write_text(to_html(found, title=f"vlgpt inspect {arguments.config}"), encoding="utf-8")
        console.print(f"{arguments.html} shows {arguments.batches} batches")
    else:
        sys.stdout.write(to_text(found, has_colour=sys.stdout.isatty(), is_full=arguments.full) + "\n")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Parameters, memory, FLOPs, hours and disk of a run, and which ZeRO stage fits; needs no weights."""
    from vlgpt.config import load_run
    from vlgpt.planning.plan import make_plan, parse_bytes
    from vlgpt.planning.table import to_text

    found = make_plan(
        load_run(arguments.config, arguments.overrides),
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        gpu_memory=parse_bytes(arguments.gpu_memory),
        peak_tflops=arguments.peak_tflops,
        mfu=arguments.mfu,
    )
    sys.stdout.write((json.dumps(found, indent=1) if arguments.json else to_text(found)) + "\n")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Environment, versions, disk and faults of a configuration, each with its fix; --gpu runs the real path."""
    from vlgpt.config import load_run
    from vlgpt.doctor.environment import check_environment
    from vlgpt.doctor.lint import lint

    faults = []
    if arguments.config is not None:
        faults = lint(arguments.config, tuple(arguments.overrides), num_processes=arguments.gpus)
    is_readable = arguments.config is not None and not any("correct this key" in f.fix for f in faults)
    run = load_run(arguments.config, arguments.overrides) if is_readable else None
    findings = [*check_environment(run, num_processes=arguments.gpus), *faults]
    if arguments.gpu:
        from vlgpt.doctor.gpu import check_gpu

        findings += check_gpu()
    for finding in findings:
        fix = f"\n         fix: {finding.fix}" if finding.fix else ""
        sys.stdout.write(f"{finding.level:8} {finding.text}{fix}\n")
    return 1 if any(finding.level == "error" for finding in findings) else 0


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="YAML", help="look for faults in this configuration too")
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes of the run, for its batch arithmetic and memory"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="run the real path on the GPUs of this machine (10 minutes)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--gpus", type=int, default=8, help="per node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu-memory", default="40GB")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of one GPU (default: 312, A100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")


def _prompt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", default="", help=f"text; {IMAGE_MARK} marks where images stand; - reads stdin"
    )
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="picture file, may be repeated"
    )
    parser.add_argument(
        "--plain", action="store_true", help="continue plain text instead of answering a chat turn"
    )


def _reply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("generated"), help="folder for pictures (and reply.json)"
    )
    parser.add_argument(
        "--images", choices=("free", "never", "force"), default="free", help="may the reply hold images"
    )
    parser.add_argument("--max-images", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--visual-guidance", type=float, default=1.0, help="against the empty prompt; 1 is off"
    )
    parser.add_argument(
        "--decoder-guidance", type=float, help="guidance of a diffusion decoder (default: its own); 1 is off"
    )
    parser.add_argument("--seed", type=int, default=0)


def _reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("reconstruction.png"))
    parser.add_argument(
        "--decoder-guidance", type=float, help="guidance of a diffusion decoder (default: its own); 1 is off"
    )
    parser.add_argument(
        "--image-scale", type=float, help="weight of z_v beside z_t in a diffusion decoder (default: its own)"
    )
    parser.add_argument("--seed", type=int, default=0)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="there is no login: mind who can reach it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="model name that clients see (default: the folder's)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="limit and default of max_tokens")
    parser.add_argument("--max-batch", type=int, default=8, help="waiting requests decoded together")
    parser.add_argument("--max-waiting", type=int, default=32, help="more are refused with 429")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="from request to whole reply")
    parser.add_argument("--max-body-mib", type=int, default=20)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlgpt", description="VL-GPT: read and write text and images in one sequence."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int], *, has_model: bool = True
    ) -> argparse.ArgumentParser:
        doc = (function.__doc__ or "").strip().splitlines()[0]
        command = commands.add_parser(name, help=doc, description=doc)
        command.set_defaults(function=function)
        if has_model:
            command.add_argument(
                "--model", type=Path, default=Path("runs/demo/finetune/result"), help="export folder"
            )
            command.add_argument("--device", default="cpu")
        return command

    command = add("generate", generate)
    _prompt_arguments(command)
    _reply_arguments(command)
    _reply_arguments(add("chat", chat))
    _serve_arguments(add("serve", serve))
    _reconstruct_arguments(add("reconstruct", reconstruct))
    command = add("inspect", inspect, has_model=False)
    command.add_argument("--config", default="demo/configs/pretrain.yaml", metavar="YAML")
    command.add_argument("--batches", type=int, default=1)
    command.add_argument("--html", type=Path, help="write a page instead of printing")
    command.add_argument("--full", action="store_true", help="print every position")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    _plan_arguments(add("plan", plan, has_model=False))
    _doctor_arguments(add("doctor", doctor, has_model=False))
    command = add("export", export, has_model=False)
    command.add_argument("run", type=Path, help="run folder, such as runs/pretrain")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--picture-decoder", type=Path, help="another decoder than the run names")
    command.add_argument(
        "--keep-lora", action="store_true", help="keep the adapter apart instead of merging it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vlgpt`."""
    arguments = _parser().parse_args(argv)
    log.configure()
    return run_command(lambda: arguments.function(arguments))
