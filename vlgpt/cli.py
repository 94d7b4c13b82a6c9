"""Command lines: `vlgpt ...`, the training launchers and the chat page. The console of the library is here.

Every command takes one `Options` model, from which its flags follow. Slow imports (torch) are inside the commands, so
that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from rich.console import Console

from vlgpt import log
from vlgpt.document import IMAGE_MARK, Document, ImagePart, Part, Role, TextPart
from vlgpt.errors import UserError, run_command
from vlgpt.options import Argument, Options, add_options, make_parser, model_options, parse, read_options

if TYPE_CHECKING:
    from vlgpt.decoding.api import DecodeSettings
    from vlgpt.settings import RunSettings
    from vlgpt.train.validation import Probe

    MakeProbe = Callable[[RunSettings], Probe]

console = Console(highlight=False, soft_wrap=True)

YAML = Argument(metavar="YAML")
Overrides = Annotated[tuple[str, ...], Argument(is_positional=True, metavar="KEY=VALUE")]


class ModelOptions(Options):
    """Of every command that loads an export."""

    model: Path = Field(description="export folder, such as the result of stage 3")
    device: str = "cpu"


# ------------------------------------------------------------------------------------------------------------ training


class TrainOptions(Options):
    """Of the training launchers."""

    deepspeed: Annotated[str, Argument(metavar="JSON")] = Field(description="ZeRO settings, see ds_configs/")
    config: Annotated[str, YAML] = Field(description="the run, see launchers/configs/")
    local_rank: Annotated[int, Argument(flag="--local_rank")] = Field(
        0, description="given by the deepspeed launcher"
    )
    overrides: Overrides = Field((), description="settings to change, such as optimizer.lr=1e-4")


def launch_training(*, make_probe: MakeProbe | None = None, argv: Sequence[str] | None = None) -> int:
    """What the launchers run: `--deepspeed JSON --config YAML [a.b=c ...]`. Returns the exit code.

    `make_probe(settings)` gives what is asked of the model at every validation, when the settings name probes.
    """
    prog = Path(sys.argv[0]).name
    return run_command(
        lambda: _train(parse(TrainOptions, argv, prog=prog, description="Train one stage."), make_probe)
    )


def _train(options: TrainOptions, make_probe: MakeProbe | None) -> int:
    from vlgpt.config import load_run

    settings = load_run(options.config, options.overrides)
    from vlgpt.train.ds_config import read_config
    from vlgpt.train.facts import is_finished, missing_inputs
    from vlgpt.train.run import run_training

    ds_config = read_config(options.deepspeed)
    if is_finished(settings):
        sys.stderr.write(f"{settings.run_dir} is complete: nothing to do\n")
        return 0
    if missing := list(missing_inputs(settings)):
        names = ", ".join(f"{key} = {path}" for key, path in missing)
        raise FileNotFoundError(
            f"{names} does not exist: run the step that makes it first: docs/training.md, or `make demo` for the demo"
        )
    probe = None
    if settings.validation.probes:
        if make_probe is None:
            raise UserError("validation.probes ask a language model: remove them, this launcher trains none")
        probe = make_probe(settings)
    return run_training(settings, ds_config, ds_source=options.deepspeed, probe=probe)


class SuperviseOptions(Options):
    """Of `launchers/supervise.py`."""

    run_dir: Path = Field(description="output_dir of the run")
    max_restarts: int = 3
    pause_s: float = Field(10.0, description="before each restart")
    command: Annotated[tuple[str, ...], Argument(is_positional=True)] = Field(
        description="after `--`; {port} becomes a free port"
    )


def launch_supervised(argv: Sequence[str] | None = None) -> int:
    """Run a training command, and start it again after a lost process."""
    from vlgpt.train.supervise import supervise

    about = launch_supervised.__doc__
    options = parse(SuperviseOptions, argv, prog="launchers/supervise.py", description=about)
    log.configure()
    how = options.model_dump(include={"run_dir", "max_restarts", "pause_s"})
    return supervise(options.command, **how)


# ----------------------------------------------------------------------------------------------------------- generating


class ReplyOptions(ModelOptions):
    """How a reply is decoded and drawn."""

    output: Path = Field(Path("generated"), description="folder for pictures (and reply.json)")
    images: Literal["free", "never", "force"] = Field("free", description="may the reply hold images")
    max_images: int = 1
    max_new_tokens: int = 64
    num_beams: int = 1
    temperature: float = Field(0.0, description="0 is greedy")
    top_p: float = 1.0
    visual_guidance: float = Field(1.0, description="against the empty prompt; 1 is off")
    decoder_guidance: float | None = Field(
        None, description="guidance of a diffusion decoder (default: its own); 1 is off"
    )
    seed: int = 0

    def decoding(self) -> DecodeSettings:
        """Raises UserError."""
        from vlgpt.decoding.api import DecodeSettings

        names = [name for name in DecodeSettings.__dataclass_fields__ if hasattr(self, name)]
        return DecodeSettings(**{name: getattr(self, name) for name in names}, guidance=self.decoder_guidance)


class GenerateOptions(ReplyOptions):
    """Of `vlgpt generate`."""

    prompt: str = Field("", description=f"text; {IMAGE_MARK} marks where images stand; - reads stdin")
    image: Annotated[tuple[Path, ...], Argument(is_repeated=True)] = Field(
        (), description="picture file, may be repeated"
    )
    plain: bool = Field(False, description="continue plain text instead of answering a chat turn")


def read_prompt(text: str, num_images: int, *, is_chat: bool) -> Document:
    """`<image>` marks the place of an image, without marks all come first. Raises UserError when counts differ."""
    from vlgpt.chat.dialogue import split_marks

    role: Role = "user" if is_chat else "plain"
    parts: tuple[Part, ...] = tuple(
        TextPart(piece, role) if isinstance(piece, str) else ImagePart(piece, role)
        for piece in split_marks(text, num_images)
    )
    if not parts:
        raise UserError("the prompt is empty: give --prompt, --image or both")
    return Document("prompt", "command line", parts)


def generate(options: GenerateOptions) -> int:
    """Reply to one prompt: JSON on stdout, images as PNG files that carry the prompt."""
    from PIL.PngImagePlugin import PngInfo

    from vlgpt.decoding.api import Prompt
    from vlgpt.decoding.generator import Generator

    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    images = tuple(_read_file(path) for path in options.image)
    document, settings = read_prompt(text, len(images), is_chat=not options.plain), options.decoding()
    generator = Generator.load(options.model, device=options.device)
    (reply,) = generator.generate([Prompt(document, images)], settings)
    options.output.mkdir(parents=True, exist_ok=True)
    files = []
    if reply.visual:
        import torch

        seeds: list[tuple[int | str, ...]] = [(options.seed, "draw", n) for n in range(len(reply.visual))]
        drawn = generator.draw(torch.stack(reply.visual), seeds=seeds, guidance=options.decoder_guidance)
        for number, image in enumerate(drawn):
            path = options.output / f"{number:02d}.png"
            about = PngInfo()
            about.add_itxt("prompt", text)
            about.add_itxt("model", str(options.model))
            image.save(path, pnginfo=about)
            files.append(str(path))
    record = {
        "prompt": text,
        "text": reply.text,
        "images": files,
        "finish": reply.finish,
        "seed": options.seed,
    }
    (options.output / "reply.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
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


class ReconstructOptions(ModelOptions):
    """Of `vlgpt reconstruct`."""

    image: Annotated[tuple[Path, ...], Argument(is_positional=True)]
    output: Path = Path("reconstruction.png")
    decoder_guidance: float | None = Field(
        None, description="guidance of a diffusion decoder (default: its own); 1 is off"
    )
    image_scale: float | None = Field(
        None, description="weight of z_v beside z_t in a diffusion decoder (default: its own)"
    )
    seed: int = 0


def reconstruct(options: ReconstructOptions) -> int:
    """Images through the image tokenizer and back: a contact sheet of original, both, z_v only, z_t only."""
    from vlgpt.decoding.generator import Conditions, Generator, to_pictures
    from vlgpt.decoding.prompts import square_pixels
    from vlgpt.images import contact_sheet

    data = [_read_file(path) for path in options.image]
    generator = Generator.load(options.model, device=options.device)
    uses: dict[str, Conditions] = {"both": "both", "z_v only": "image", "z_t only": "text"}
    how: dict[str, Any] = {
        "guidance": options.decoder_guidance,
        "image_scale": options.image_scale,
        "seed": options.seed,
    }
    columns = {name: generator.reconstruct(data, use=use, **how) for name, use in uses.items()}
    size = columns["both"][0].width
    # The originals as the encoder sees them: a square crop.
    originals = [to_pictures(square_pixels(content, size)[None])[0] for content in data]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet({"original": originals, **columns}).save(options.output)
    console.print(f"{options.output}: original, reconstruction, z_v only, z_t only")
    return 0


# -------------------------------------------------------------------------------------------------------- conversations


def chat(options: ReplyOptions) -> int:
    """Talk with a model in the terminal, with images on both sides; /help inside lists the commands."""
    from vlgpt.chat.terminal import Terminal
    from vlgpt.decoding.generator import Generator

    settings = options.decoding()
    generator = Generator.load(options.model, device=options.device)

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
        generator, settings, output=options.output, write=write, model_name=str(options.model)
    )
    terminal.run(lines())
    return 0


class PageOptions(ModelOptions):
    """Of `launchers/chat.py`."""

    host: str = Field("127.0.0.1", description="there is no login: mind who can reach it")
    port: int | None = Field(None, description="default: the first free one from 7860 on")
    max_new_tokens: int = 128
    max_upload_mib: int = Field(10, description="size of one picture file")
    examples: Path | None = Field(None, description="text file, one prompt a line, to be chosen from")


def launch_chat(argv: Sequence[str] | None = None) -> int:
    """A page to talk with a model: text and images, both ways. Serves until interrupted."""
    about = (launch_chat.__doc__ or "").partition(" Serves")[0]
    log.configure()
    return run_command(
        lambda: _serve_page(parse(PageOptions, argv, prog="launchers/chat.py", description=about))
    )


def _serve_page(options: PageOptions) -> int:
    examples = options.examples.read_text(encoding="utf-8").splitlines() if options.examples else ()
    # Read by gradio when it is imported. Uploads too lie in this folder, and are gone when the page ends.
    folder = Path(tempfile.mkdtemp(prefix="vlgpt-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from vlgpt.chat.page import ChatPage, launch
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vlgpt[chat]'") from error
    from vlgpt.chat.batching import Batcher
    from vlgpt.decoding.generator import Generator

    batcher = Batcher(Generator.load(options.model, device=options.device))
    name = options.model.as_posix()
    page = ChatPage(batcher, model_name=name, pictures=folder, max_new_tokens=options.max_new_tokens)
    blocks = launch(
        page,
        host=options.host,
        port=options.port,
        max_upload_mib=options.max_upload_mib,
        examples=examples,
    )
    sys.stdout.write(f"http://{options.host}:{blocks.server_port}\n")
    sys.stdout.flush()
    blocks.block_thread()
    batcher.close()
    return 0


class ServeOptions(ModelOptions):
    """Of `vlgpt serve`."""

    host: str = Field("127.0.0.1", description="there is no login: mind who can reach it")
    port: int = 8000
    name: str | None = Field(None, description="model name that clients see (default: the folder's)")
    max_new_tokens: int = Field(256, description="limit and default of max_tokens")
    max_batch: int = Field(8, description="waiting requests decoded together")
    max_waiting: int = Field(32, description="more are refused with 429")
    timeout_s: float = Field(120.0, description="from request to whole reply")
    max_body_mib: int = 20


def serve(options: ServeOptions) -> int:
    """Serve a model over HTTP: OpenAI-style chat completions with images, /health, /metrics, /v1/models."""
    from vlgpt.decoding.generator import Generator

    try:
        from vlgpt.server.app import ServerLimits, create_app
        from vlgpt.server.app import serve as run_server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vlgpt[chat]'") from error
    shared = options.model_dump(include={"max_new_tokens", "max_batch", "max_waiting", "timeout_s"})
    limits = ServerLimits(**shared, max_body_bytes=options.max_body_mib << 20)
    generator = Generator.load(options.model, device=options.device)
    name = options.name or options.model.resolve().name
    console.print(f"{name} listens on http://{options.host}:{options.port}/v1/chat/completions")
    run_server(create_app(generator, model_name=name, limits=limits), host=options.host, port=options.port)
    return 0


# ----------------------------------------------------------------------------------------------------- runs and exports


class ExportOptions(Options):
    """Of `vlgpt export`."""

    run: Annotated[Path, Argument(is_positional=True)] = Field(
        description="run folder, such as runs/pretrain"
    )
    output: Path
    picture_decoder: Path | None = Field(None, description="another decoder than the run names")
    keep_lora: bool = Field(False, description="keep the adapter apart instead of merging it")


def export(options: ExportOptions) -> int:
    """The newest commit of a run as an export folder; needs neither GPU nor deepspeed."""
    from vlgpt.stages.language import export_run

    merge_lora, decoder = not options.keep_lora, options.picture_decoder
    export_run(options.run, options.output, merge_lora=merge_lora, picture_decoder=decoder)
    console.print(f"{options.output} holds the export of {options.run}")
    return 0


class InspectOptions(Options):
    """Of `vlgpt inspect`."""

    config: Annotated[str, YAML]
    batches: int = 1
    html: Path | None = Field(None, description="write a page instead of printing")
    full: bool = Field(False, description="print every position")
    overrides: Overrides = ()


def inspect(options: InspectOptions) -> int:
    """The next batches of a run as the model will see them: tokens, roles, segments, targets, weights, images."""
    from vlgpt.config import load_run
    from vlgpt.data.inspect import LossWeights
    from vlgpt.data.inspect import inspect as look
    from vlgpt.data.inspect_page import to_html, to_text
    from vlgpt.data.loader import Loader
    from vlgpt.settings import LanguageStageSettings
    from vlgpt.stages.language import load_tokenizer

    run = load_run(options.config, options.overrides)
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
        found = look(loader, num_batches=options.batches, weights=weights)
    finally:
        loader.close()
    if options.html is not None:
        options.html.write_text(to_html(found, title=f"vlgpt inspect {options.config}"), encoding="utf-8")
        console.print(f"{options.html} shows {options.batches} batches")
    else:
        sys.stdout.write(to_text(found, has_colour=sys.stdout.isatty(), is_full=options.full) + "\n")
    return 0


class PlanOptions(Options):
    """Of `vlgpt plan`."""

    config: Annotated[str, YAML]
    gpus: int = Field(8, description="per node")
    nodes: int = 1
    gpu_memory: str = "40GB"
    peak_tflops: float | None = Field(None, description="dense bf16 peak of one GPU (default: 312, A100)")
    mfu: float = Field(0.4, description="share of the peak that is reached")
    is_json: Annotated[bool, Argument(flag="--json")] = Field(False, description="one JSON object on stdout")
    overrides: Overrides = ()


def plan(options: PlanOptions) -> int:
    """Parameters, memory, FLOPs, hours and disk of a run, and which ZeRO stage fits; needs no weights."""
    from vlgpt.config import load_run
    from vlgpt.planning.plan import make_plan, parse_bytes
    from vlgpt.planning.table import to_text

    run, gpu_memory = load_run(options.config, options.overrides), parse_bytes(options.gpu_memory)
    shape = options.model_dump(include={"gpus", "nodes", "peak_tflops", "mfu"})
    found = make_plan(run, gpu_memory=gpu_memory, **shape)
    sys.stdout.write((json.dumps(found, indent=1) if options.is_json else to_text(found)) + "\n")
    return 0


class DoctorOptions(Options):
    """Of `vlgpt doctor`."""

    config: Annotated[str | None, YAML] = Field(None, description="look for faults in this configuration too")
    gpus: int = Field(1, description="processes of the run, for its batch arithmetic and memory")
    gpu: bool = Field(False, description="run the real path on the GPUs of this machine (10 minutes)")
    overrides: Overrides = ()


def doctor(options: DoctorOptions) -> int:
    """Environment, versions, disk and faults of a configuration, each with its fix; --gpu runs the real path."""
    from vlgpt.config import load_run
    from vlgpt.doctor.environment import check_environment
    from vlgpt.doctor.lint import Finding, lint

    faults: list[Finding] = []
    run: RunSettings | None = None
    if options.config is not None:
        faults = lint(options.config, options.overrides, num_processes=options.gpus)
        if not any("correct this key" in fault.fix for fault in faults):
            run = load_run(options.config, options.overrides)
    findings = [*check_environment(run, num_processes=options.gpus), *faults]
    if options.gpu:
        from vlgpt.doctor.gpu import check_gpu

        findings += check_gpu()
    for finding in findings:
        fix = f"\n         fix: {finding.fix}" if finding.fix else ""
        sys.stdout.write(f"{finding.level:8} {finding.text}{fix}\n")
    return 1 if any(finding.level == "error" for finding in findings) else 0


# ----------------------------------------------------------------------------------------------------------------- main

COMMANDS: tuple[Callable[[Any], int], ...] = (
    generate, chat, serve, reconstruct, inspect, plan, doctor, export
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vlgpt`."""
    parser = make_parser("vlgpt", "VL-GPT: read and write text and images in one sequence.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    models: dict[str, type[Options]] = {}
    for function in COMMANDS:
        name, doc = function.__name__, (function.__doc__ or "").splitlines()[0]
        models[name] = typing.get_type_hints(function)["options"]
        add_options(commands.add_parser(name, help=doc, description=doc), model_options(models[name]))
    arguments = parser.parse_args(argv)
    function = next(function for function in COMMANDS if function.__name__ == arguments.command)
    log.configure()
    return run_command(lambda: function(read_options(models[arguments.command], arguments)))
