"""Train a text tokenizer on the texts of shards: `python -m demo.text_tokenizer DIR... --output FOLDER`.

For models trained from scratch (the demo). A pre-trained language model brings its own tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from demo.tiny import save_language_model, train_text_tokenizer
from vlgpt import log
from vlgpt.document import TextPart
from vlgpt.errors import run_command
from vlgpt.options import Argument, Options, parse
from vlgpt.seeds import seed_everything
from vlgpt.shards.reader import ShardSet


def texts_of(folders: Sequence[Path]) -> Iterator[str]:
    """Every text part of every document, and the fixed strings of the short chat template."""
    for folder in folders:
        shards = ShardSet.open(folder)
        for number in range(len(shards.shards)):
            for sample in range(shards.index(number).num_samples):
                for part in shards.read(number, sample).document.parts:
                    if isinstance(part, TextPart):
                        yield part.text
    yield from ["USER: ASSISTANT:"] * 1000


class TrainTokenizerOptions(Options):
    """The command line; all but `folders` and `output` is the shape of the two models."""

    folders: Annotated[tuple[Path, ...], Argument(is_positional=True, metavar="DIR")]
    output: Path
    vocabulary_size: int = 1600
    width: int = Field(128, description="of the random LLaMA written beside the tokenizer")
    depth: int = 3
    num_heads: int = 4
    mlp_width: int = 352
    seed: int = 0


def run(argv: Sequence[str] | None = None) -> int:
    """Write FOLDER as a transformers model folder: the tokenizer and a random LLaMA of the given shape."""
    arguments = parse(TrainTokenizerOptions, argv, prog="python -m demo.text_tokenizer", description=__doc__)
    log.configure()
    seed_everything(arguments.seed, "language model")
    tokenizer = train_text_tokenizer(texts_of(arguments.folders), vocabulary_size=arguments.vocabulary_size)
    save_language_model(
        arguments.output,
        tokenizer,
        width=arguments.width,
        depth=arguments.depth,
        num_heads=arguments.num_heads,
        mlp_width=arguments.mlp_width,
    )
    log.get_logger().info("%s: tokenizer of %d tokens and a random LLaMA", arguments.output, len(tokenizer))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(run))
