"""VL-GPT in VLMEvalKit: adds the model to its table and starts its run.py.

    python -m evaluation.adapters.vlmevalkit --kit VLMEvalKit --model EXPORT -- --data GQA_TestDev_Balanced COCO_VAL

VLMEvalKit has no plug-in hook and is on no package registry: clone it and give the folder. Its COCO_VAL
scores without the PTB tokenizer, so that CIDEr is not comparable with anything else. The interface followed
here is that of vlmeval.vlm.base.BaseModel (INTERLEAVE, generate_inner).
"""

from __future__ import annotations

import hashlib
import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import Field

from evaluation.adapters import prompt_of
from evaluation.core import DecodeSettings, Responder, read_image
from evaluation.responders import ModelResponder
from vlgpt.errors import UserError, run_command
from vlgpt.options import Options, parse

DECODING = DecodeSettings(max_new_tokens=64, images="never")


class KitOptions(Options):
    """The command line before `--`; what stands behind it goes to VLMEvalKit's run.py."""

    kit: Path = Field(description="folder of a VLMEvalKit clone (holds run.py)")
    model: Path = Field(description="export folder")
    name: str = "VL-GPT"
    prompts: str = "vlgpt-i"
    device: str = "cpu"
    dtype: str = "float32"


def model_class(base: type) -> type:
    """The model class on top of VLMEvalKit's BaseModel, which is only known once the kit is imported."""

    class VlGpt(base):  # type: ignore[misc, valid-type]
        INSTALL_REQ = False
        INTERLEAVE = True

        def __init__(
            self,
            model_path: str = "",
            *,
            prompts: str = "vlgpt-i",
            device: str = "cpu",
            dtype: str = "float32",
            responder: Responder | None = None,
            **decode: Any,
        ) -> None:
            super().__init__()
            self.is_chat = prompts != "vlgpt"
            self.decoding = replace(DECODING, **decode)
            self.responder = responder or ModelResponder.load(Path(model_path), device=device, dtype=dtype)

        def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
            """One reply to a list of {"type": "image" | "text", "value": path or text}."""
            pieces = [_piece(item) for item in message]
            address = hashlib.blake2b(
                repr([dict(item) for item in message]).encode(), digest_size=8
            ).hexdigest()
            prompt = prompt_of(pieces, is_chat=self.is_chat, id=f"{dataset or 'chat'}/{address}")
            (text,) = self.responder.generate([prompt], self.decoding)
            return text.strip()

    return VlGpt


def _piece(item: Mapping[str, str]) -> str | Image.Image:
    if item["type"] not in ("image", "text"):
        raise UserError(f"VL-GPT reads images and texts; VLMEvalKit sent {item['type']!r}")
    return read_image(Path(item["value"])) if item["type"] == "image" else item["value"]


def register(name: str, **settings: str) -> None:
    """Put the model into VLMEvalKit's table under `name`. Raises UserError when the kit cannot be imported."""
    try:
        base = importlib.import_module("vlmeval.vlm.base").BaseModel
        config = importlib.import_module("vlmeval.config")
    except ImportError as error:
        raise UserError(f"VLMEvalKit cannot be imported ({error}); clone it and give --kit FOLDER") from error
    config.supported_VLM[name] = partial(model_class(base), **settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: registers the model, then runs VLMEvalKit's run.py with what follows `--`."""
    own = list(sys.argv[1:] if arguments is None else arguments)
    at = own.index("--") if "--" in own else len(own)
    options = parse(
        KitOptions, own[:at], prog="python -m evaluation.adapters.vlmevalkit", description=__doc__
    )
    script = options.kit / "run.py"
    if not script.is_file():
        raise UserError(f"{script} not found; --kit is the folder of a VLMEvalKit clone")
    sys.path.insert(0, str(options.kit.resolve()))
    settings = {"prompts": options.prompts, "device": options.device, "dtype": options.dtype}
    register(options.name, model_path=str(options.model), **settings)
    sys.argv = [str(script), "--model", options.name, *own[at + 1 :]]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
