"""Small real data sets: written by our writer, read by our reader, tokenised by a real tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlgpt.data.assemble import ShardLengths
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.seeds import generator
from vlgpt.shards import FeatureSpec, ShardSet, ShardWriter, write_feature_rows, write_manifest, write_spec
from vlgpt.shards.index import IndexBuilder
from vlgpt.tokens import DocumentTokenizer

NUM_VISUAL = 4
WORDS = [f"w{i}" for i in range(200)]


def word_level(words: Sequence[str], split: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A text tokenizer of one token per piece of `split`; what is none of these words is unknown."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks, **options)


def make_tokenizer(*, num_visual: int = NUM_VISUAL) -> DocumentTokenizer:
    """One token per word."""
    text = word_level(["USER:", "ASSISTANT:", *WORDS], pre_tokenizers.WhitespaceSplit(), add_bos_token=True)
    return DocumentTokenizer(text, num_visual=num_visual, template="short")


def picture(number: int, *, size_px: int = 8, suffix: str = "png") -> tuple[str, bytes]:
    """A small picture whose colour tells its number."""
    buffer = io.BytesIO()
    colour = (number % 256, number // 256 % 256, 77)
    Image.new("RGB", (size_px, size_px), colour).save(buffer, "JPEG" if suffix == "jpg" else suffix.upper())
    return suffix, buffer.getvalue()


def words(*address: int | str, least: int = 1, most: int = 12) -> str:
    """Some words, the same for the same address."""
    rng = generator("words", *address)
    return " ".join(rng.choice(WORDS, size=int(rng.integers(least, most + 1))))


def pair(number: int, *, most: int = 12) -> Document:
    return Document(f"pair-{number}", "pairs", (ImagePart(0), TextPart(words("pair", number, most=most))))


def page(number: int, *, most_parts: int = 9) -> Document:
    """An interleaved document of 2 to 9 parts with at least one image."""
    rng = generator("page", number)
    parts: list[Part] = []
    num_images = 0
    for place in range(int(rng.integers(2, most_parts + 1))):
        if place == 0 or rng.random() < 0.45:
            parts.append(ImagePart(num_images))
            num_images += 1
        else:
            parts.append(TextPart(words("page", number, place, most=20)))
    return Document(f"page-{number}", "pages", tuple(parts))


def chat(number: int) -> Document:
    """A picture and one to four exchanges."""
    turns: list[Part] = [ImagePart(0, "user")]
    for turn in range(int(generator("chat", number).integers(1, 5))):
        turns.append(TextPart(words("question", number, turn), "user"))
        turns.append(TextPart(words("answer", number, turn, most=20), "assistant"))
    return Document(f"chat-{number}", "chats", tuple(turns))


def write_dataset(
    folder: Path,
    documents: Sequence[Document],
    *,
    shard_sizes: Sequence[int],
    tokenizer: DocumentTokenizer | None = None,
    make_picture: Callable[[int], tuple[str, bytes]] = picture,
) -> Path:
    """Documents in shards of these sizes, sealed by a manifest."""
    assert sum(shard_sizes) == len(documents)
    folder.mkdir(parents=True, exist_ok=True)
    at = 0
    for shard, size in enumerate(shard_sizes):
        writer = ShardWriter(folder, shard, tokenizer=tokenizer)
        for number in range(at, at + size):
            document = documents[number]
            writer.add(document, [make_picture(number) for _ in range(document.num_images)])
        writer.close()
        at += size
    build = {"purpose": "test"}
    num_shards = len(shard_sizes)
    write_manifest(folder, name=folder.name, licence="none", versions={}, build=build, num_shards=num_shards)
    return folder


def lengths_of(documents: Sequence[Document], tokenizer: DocumentTokenizer) -> ShardLengths:
    """What the loader knows of a shard that holds these documents."""
    builder = IndexBuilder(tokenizer)
    for document in documents:
        builder.add(document.id, document, [])
    return ShardLengths(builder.build(tar_sha256=""), image_length=tokenizer.image_length)


def feature_spec(**changes: Any) -> FeatureSpec:
    """How a feature was made; by default one view of a visual embedding per image, in fp16."""
    made = {"encoder": "e", "weights_hash": "w", "layer": "-2", "preprocessing": "p"}
    stored = {"name": "visual", "shape": (2, 8), "dtype": "float16", "views": 1, "per": "image"}
    return FeatureSpec(**{**made, **stored, **changes})


def write_feature(
    folder: Path, name: str, *, shape: tuple[int, ...], views: int = 1, dtype: str = "float32"
) -> None:
    """Feature rows that say where they come from: every value is `100 * shard + row + 0.25 * view`."""
    per = "text" if name == "text_condition" else "image"
    spec = feature_spec(name=name, shape=shape, dtype=dtype, views=views, per=per)
    write_spec(folder, spec)
    shards = ShardSet.open(folder)
    for number, shard in enumerate(shards.shards):
        index = shards.index(number)
        num_rows = index.num_images if per == "image" else index.num_texts
        rows = np.zeros((num_rows, views, *shape), np.float32)
        rows += (100 * number + np.arange(num_rows)).reshape(-1, *[1] * (1 + len(shape)))
        rows += (0.25 * np.arange(views)).reshape(1, -1, *[1] * len(shape))
        write_feature_rows(folder, spec, shard.name, rows, tar_sha256=shard.sha256)
