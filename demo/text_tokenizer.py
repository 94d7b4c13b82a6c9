"""Train a text tokenizer on the texts of shards: `python -m demo.text_tokenizer DIR... --output FOLDER`.

For models trained from scratch (the demo). A pre-trained language model brings its own tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo.tiny import save_language_model, train_text_tokenizer
from vlgpt import log
from vlgpt.document import TextPart
from vlgpt.errors import run_command
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


def run(argv: Sequence[str] | None = None) -> int:
    """Write FOLDER as a transformers model folder: the tokenizer and a random LLaMA of the given shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary-size", type=int, default=1600)
    parser.add_argument(
        "--width", type=int, default=128, help="of the random LLaMA written beside the tokenizer"
    )
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--mlp-width", type=int, default=352)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    log.configure()
    seed_everything(arguments.seed, "language model")
    tokenizer = train_text_tokenizer(texts_of(arguments.dir), vocabulary_size=arguments.vocabulary_size)
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
