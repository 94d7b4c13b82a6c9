"""Text chats for replay: a chat model's own replies to made-up prompts, as shards (`make demo-lm`).

python -m demo.chats --model FOLDER --output DIR     writes DIR/chats-train and DIR/chats-held-out

Nothing but the model is needed: what it says before training is what training must not take from it. Replies are
sampled at a low temperature; those that do not end within the limit are left out. A topic is trained or held out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.progress import track

from vlgpt import seeds
from vlgpt.document import Document, TextPart
from vlgpt.errors import UserError, run_command
from vlgpt.files import replacing_folder
from vlgpt.log import configure, get_logger
from vlgpt.options import Options, parse
from vlgpt.shards import ShardWriter, write_manifest
from vlgpt.tokens import DocumentTokenizer

QUESTIONS = (
    "What is {}? Answer in one short sentence.",
    "Tell me one interesting fact about {}.",
    "Write one sentence about {}.",
    "Name three words that you think of when you hear about {}.",
    "Why do people care about {}? Be brief.",
    "Give me one short tip about {}.",
    "Explain {} to a child in one sentence.",
    "Ask me a question about {}.",
    "Write a two-line poem about {}.",
    "Is it easy to learn about {}? Answer yes or no and say why in a few words.",
    "Suggest a short title for a book about {}.",
    "Translate to French: I like to read about {}.",
)
WORDS = (
    "rain, bread, the moon, bicycles, chess, bees, rivers, the violin, coffee, glass, mountains, sleep, trains, "
    "paper, salt, dogs, the printing press, gravity, tea, volcanoes, swimming, maps, honey, the internet, clouds, "
    "birds, wool, football, electricity, gardens, cheese, the Roman Empire, dreams, whales, poetry, bridges, numbers, "
    "wind, chocolate, libraries, the heart, robots, snow, apples, painting, the desert, money, languages, stars, "
    "cooking, friendship, steel, ants, the piano, oceans, clocks, running, history, forests, soap, medicine, dancing, "
    "light, farms, the alphabet, islands, cats, computers, ice, shoes, democracy, fire, horses, movies, rice, sound, "
    "spiders, time, trees, vaccines"
)
TOPICS = tuple(WORDS.split(", "))
HELD_OUT_SHARE, NUM_HELD_OUT = 0.25, 100
LICENCE = "the language model's own replies, under its licence (SmolLM2: Apache-2.0)"


def prompts() -> dict[str, list[str]]:
    """Every question about every topic, by split."""
    order = sorted(TOPICS, key=lambda topic: seeds.address("chat topic", topic))
    num_held_out = round(HELD_OUT_SHARE * len(order))
    topics = {"held-out": order[:num_held_out], "train": order[num_held_out:]}
    return {split: [q.format(t) for q in QUESTIONS for t in chosen] for split, chosen in topics.items()}


def replies(
    model: Any,
    tokenizer: Any,
    asked: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
) -> Iterator[str | None]:
    """A reply to every prompt, asked in the model's own chat template; None where it does not end in time."""
    for start in track(range(0, len(asked), batch_size), description="replies"):
        chats = [[{"role": "user", "content": text}] for text in asked[start : start + batch_size]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        options = {"add_special_tokens": False, "padding": True, "padding_side": "left"}
        given = tokenizer(texts, return_tensors="pt", **options)
        made = model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0 if temperature > 0 else None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for ids in made[:, given["input_ids"].shape[1] :]:
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            yield text if text and tokenizer.eos_token_id in ids else None


def write(
    folder: Path, asked: Sequence[str], answers: Sequence[str | None], *, tokenizer: DocumentTokenizer | None
) -> int:
    """One shard of chats, whole or absent; prompts without a reply are counted as dropped. Returns the samples."""
    with replacing_folder(folder) as new:
        writer = ShardWriter(new, 0, tokenizer=tokenizer)
        for number, (prompt, reply) in enumerate(zip(asked, answers)):
            if reply is None:
                writer.drop("reply_too_long")
                continue
            parts = (TextPart(prompt, "user"), TextPart(reply, "assistant"))
            writer.add(Document(f"{folder.name}/{number}", "chats", parts), [])
        report = writer.close()
        write_manifest(new, name=folder.name, licence=LICENCE, versions={}, build={}, num_shards=1)
    get_logger().info(
        "%s: %d chats, %d replies too long", folder, report.num_samples, sum(report.dropped.values())
    )
    return report.num_samples


class ChatOptions(Options):
    """The command line."""

    model: Path = Field(description="transformers folder of a chat model")
    output: Path = Field(description="folder that gets chats-train and chats-held-out")
    template: str = Field("own", description="chat template of the run that reads them")
    max_new_tokens: int = 64
    temperature: float = 0.7
    batch_size: int = 32
    threads: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and write both folders. Raises UserError when too few of the held-out replies end in time."""
    args = parse(ChatOptions, argv, prog="python -m demo.chats", description=(__doc__ or "").split("\n")[0])
    configure()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    seeds.seed_everything(0, "chats")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.eos_token  # never read: padding is masked
    indexer = DocumentTokenizer.load(args.model, template=args.template)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "batch_size", "temperature")}
    for split, asked in prompts().items():
        answers = [*replies(model, tokenizer, asked, **options)]
        if split == "held-out":
            done = [(a, b) for a, b in zip(asked, answers) if b is not None]
            if len(done) < NUM_HELD_OUT:
                raise UserError(f"only {len(done)} held-out replies end in time, wanted {NUM_HELD_OUT}")
            chosen = sorted(done, key=lambda pair: seeds.address("held-out chat", pair[0]))[:NUM_HELD_OUT]
            asked, answers = [a for a, _ in chosen], [b for _, b in chosen]
        write(args.output / f"chats-{split}", asked, answers, tokenizer=indexer)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
