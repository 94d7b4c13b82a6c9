"""`startup_worker.py KIND FOLDER`: loads a checkpoint when told to on stdin, reads all of it, and waits again."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)

from vlgpt import settings as s  # noqa: E402
from vlgpt.models.language_models import load_language_model  # noqa: E402
from vlgpt.models.unified import UnifiedModel  # noqa: E402
from vlgpt.stages.language import LanguageStage  # noqa: E402


def say(word: str) -> None:
    sys.stdout.write(f"\n{word}\n")
    sys.stdout.flush()


def load(kind: str, folder: str) -> torch.nn.Module:
    if kind == "language model":
        return load_language_model(f"{folder}/lm", dtype=torch.bfloat16)
    if kind == "export":
        return UnifiedModel.from_folder(f"{folder}/export")
    stage = s.LanguageStageSettings(
        kind="language", language_model=f"{folder}/lm", template="short",
        image_tokenizer=f"{folder}/stage1", lora=s.LoraSettings(rank=4),
    )  # fmt: skip
    return LanguageStage.build(stage, num_sources=1, dtype=torch.bfloat16)


def main(kind: str, folder: str) -> None:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    say("ready")
    sys.stdin.readline()
    module = load(kind, folder)
    with torch.no_grad():
        total = sum(float(parameter.flatten()[::64].float().sum()) for parameter in module.parameters())
    say(f"loaded {total}")
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
