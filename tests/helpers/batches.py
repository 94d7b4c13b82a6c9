"""Small packed batches of random documents, for tests of stages and training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.helpers.tiny_unified import NUM_PATCHES, PATCH_WIDTH
from vlgpt import seeds
from vlgpt.batch import Batch, ImageInput
from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.tokens import DocumentTokenizer, flatten

WORDS = [
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "fox",
    "dog",
    "elephant",
    "yes",
    "no",
    "two",
    "lazy",
    "quick",
]


def random_document(number: int, *, num_images: int, is_chat: bool = False) -> Document:
    """Words and images in random order; chats ask and answer."""
    rng = np.random.default_rng(number)

    def text(role):
        return TextPart(" ".join(rng.choice(WORDS, rng.integers(1, 7))), role)

    if is_chat:
        images = [ImagePart(i, "user" if i % 2 == 0 else "assistant") for i in range(num_images)]
        parts = [text("user"), *images[:1], text("assistant"), *images[1:]]
    else:
        parts = [text("plain")]
        for i in range(num_images):
            parts += [ImagePart(i), text("plain")]
    return Document(f"doc-{number}", "test", tuple(parts))


def pack(
    rows: Sequence[Sequence[Document]], tokenizer: DocumentTokenizer, *, length: int = 96, seed: int = 0
) -> Batch:
    """Rows of documents -> a batch of that length; patch features are random but tied to the document's id."""
    shape = (len(rows), length)
    arrays = {
        "token_ids": np.zeros(shape, np.int64),
        "segment_ids": np.zeros(shape, np.int32),
        "position_ids": np.zeros(shape, np.int64),
        "is_visual": np.zeros(shape, bool),
        "is_target": np.zeros(shape, bool),
        "source_ids": np.zeros(shape, np.int16),
    }
    patches = []
    for r, documents in enumerate(rows):
        at = 0
        for s, document in enumerate(documents):
            sequence = flatten(tokenizer.spans(document))
            n = len(sequence.token_ids)
            assert at + n <= length, "the test's row is too long"
            place = (r, slice(at, at + n))
            arrays["token_ids"][place] = sequence.token_ids
            arrays["segment_ids"][place] = s + 1
            arrays["position_ids"][place] = np.arange(n)
            arrays["is_visual"][place] = sequence.is_visual
            arrays["is_target"][place] = sequence.is_target
            arrays["source_ids"][place] = s % 2
            for image in sequence.images:
                generator = seeds.torch_generator(seed, document.id, image)
                patches.append(torch.randn(NUM_PATCHES, PATCH_WIDTH, generator=generator))
            at += n
        arrays["position_ids"][r, at:] = np.arange(length - at)
    batch = Batch(
        **{name: torch.from_numpy(value) for name, value in arrays.items()},
        images=ImageInput("patches", torch.stack(patches)) if patches else None,
        documents=tuple(tuple(d.id for d in documents) for documents in rows),
        num_visual=tokenizer.num_visual,
    )
    batch.validate()
    return batch
