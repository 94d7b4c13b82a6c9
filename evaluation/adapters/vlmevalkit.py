"""VL-GPT in VLMEvalKit: adds the model to its table and starts its run.py.

python -m evaluation.adapters.vlmevalkit --kit VLMEvalKit --model EXPORT -- --data GQA_TestDev_Balanced
COCO_VAL

VLMEvalKit has no plug-in hook and is on no package registry: clone it and give the folder. Its COCO_VAL
scores without the PTB tokenizer, so that CIDEr is not comparable with anything else. The interface followed
here is that of vlmeval.vlm.base.BaseModel (INTERLEAVE, generate_inner).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.adapters import prompt_of
from evaluation.core import Decoding, Responder, read_image
from evaluation.responders import ModelResponder
from vlgpt.errors import UserError, run_command

DECODING = Decoding(max_new_tokens=64)


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
            self.decoding = DECODING.replace(**decode)
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


def _piece(item: Mapping[str, str]) -> Any:
    if item["type"] not in ("image", "text"):
        raise UserError(f"VL-GPT reads images and texts; VLMEvalKit sent {item['type']!r}")
    return read_image(Path(item["value"])) if item["type"] == "image" else item["value"]


def register(name: str, **settings: Any) -> None:
    """Put the model into VLMEvalKit's table under `name`. Raises UserError when the kit cannot be
    imported."""
    try:
        base = importlib.import_module("vlmeval.vlm.base").BaseModel
        config = importlib.import_module("vlmeval.config")
    except ImportError as error:
        raise UserError(f"VLMEvalKit cannot be imported ({error}); clone it and give --kit FOLDER") from error
    config.supported_VLM[name] = partial(model_class(base), **settings)


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m evaluation.adapters.vlmevalkit", description=__doc__)
    p.add_argument("--kit", type=Path, required=True, help="folder of a VLMEvalKit clone (holds run.py)")
    p.add_argument("--model", type=Path, required=True, help="export folder")
    p.add_argument("--name", default="VL-GPT")
    p.add_argument("--prompts", default="vlgpt-i")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32")
    p.add_argument("rest", nargs=argparse.REMAINDER, help="-- and the arguments of VLMEvalKit's run.py")
    args = p.parse_args(arguments)
    script = args.kit / "run.py"
    if not script.is_file():
        raise UserError(f"{script} not found; --kit is the folder of a VLMEvalKit clone")
    sys.path.insert(0, str(args.kit.resolve()))
    register(
        args.name, model_path=str(args.model), prompts=args.prompts, device=args.device, dtype=args.dtype
    )
    rest = args.rest[1:] if args.rest[:1] == ["--"] else args.rest
    sys.argv = [str(script), "--model", args.name, *rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
