"""What multimodal training did to a language model's text: `python -m evaluation.text_nll EXPORT --base FOLDER ...`.

Held-out text chats are read by the language model before training and by the export, token for token the same
rendering. NLL: nats per token of the replies, end token included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from evaluation.core import Metric, metric
from vlgpt.document import Document
from vlgpt.errors import UserError, run_command
from vlgpt.files import write_atomic
from vlgpt.log import configure
from vlgpt.models.language_models import load_language_model
from vlgpt.models.unified import UnifiedModel
from vlgpt.options import Argument, Options, parse
from vlgpt.shards import ShardSet
from vlgpt.tokens import DocumentTokenizer, TokenSequence, flatten


class NllOptions(Options):
    """The command line."""

    export: Annotated[Path, Argument(is_positional=True, metavar="model")] = Field(
        description="export folder (stage 2 or 3)"
    )
    base: Path = Field(description="the language model that it was trained from")
    data: Path = Field(description="folder of shards with text chats")
    template: str = Field("own", description="chat template, own: the model's")
    output: Path = Field(description="JSON file")
    threads: int = Field(1, description="torch threads")


def read_chats(folder: Path) -> list[Document]:
    """All documents of a folder of shards. Raises UserError when one has images."""
    shards = ShardSet.open(folder)
    if shards.num_images:
        raise UserError(f"{folder} holds {shards.num_images} images; text chats have none")
    numbers = [(i, k) for i, shard in enumerate(shards.shards) for k in range(shard.num_samples)]
    return [shards.read(shard, sample).document for shard, sample in numbers]


@torch.no_grad()
def target_nll(
    language_model: nn.Module, chats: Sequence[TokenSequence], *, num_tokens: int
) -> tuple[float, int]:
    """Mean negative log-likelihood of all targets, and their number; logits after `num_tokens` are padding."""
    total, count = 0.0, 0
    for chat in chats:
        ids, is_target = torch.from_numpy(chat.token_ids), torch.from_numpy(chat.is_target)
        logits = language_model(input_ids=ids[None]).logits[0, :-1, :num_tokens].float()
        total += float(F.cross_entropy(logits[is_target[1:]], ids[is_target], reduction="sum"))
        count += int(is_target.sum())
    return total / count, count


def compare(export: Path, base: Path, data: Path, *, template: str) -> dict[str, Metric]:
    """`text/nll` of the export, `text/nll_base`, and `text/nll_ratio`, their quotient.

    Raises UserError when the two tokenizers differ.
    """
    texts = {DocumentTokenizer.load(folder, template="short").fingerprint for folder in (base, export)}
    if len(texts) > 1:
        raise UserError(f"{export} cuts text into other tokens than {base}: --base is another language model")
    tokenizer = DocumentTokenizer.load(base, template=template)
    chats = [flatten(tokenizer.spans(document)) for document in read_chats(data)]
    num_tokens = tokenizer.num_tokens
    before, count = target_nll(load_language_model(base), chats, num_tokens=num_tokens)
    after, _ = target_nll(
        UnifiedModel.from_folder(export, dtype=torch.float32).lm.language_model, chats, num_tokens=num_tokens
    )
    return {
        "text/nll_ratio": metric(after / before, len(chats), chance=1.0),
        "text/nll": metric(after, count),
        "text/nll_base": metric(before, count),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the text NLL of an export with that of its base language model; print and write it as JSON. Returns 0."""
    description = (__doc__ or "").split("\n")[0]
    options = parse(NllOptions, arguments, prog="python -m evaluation.text_nll", description=description)
    configure()
    torch.set_num_threads(options.threads)
    metrics = compare(options.export, options.base, options.data, template=options.template)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.output, json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
