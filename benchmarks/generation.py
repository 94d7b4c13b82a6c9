"""Decoding, side by side with what it replaces, in one run on one machine.

    python benchmarks/generation.py [--width 256] [--depth 6] [--repeats 3] [--threads 1]

Text: transformers' `generate` on the same language model. Images: Emu's way, the prefix run again for each embedding.
Ranking: one forward pass per candidate. Every comparison also checks that both sides give the same result. Times are
the best of `--repeats`, the two sides taking turns, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from demo.tiny import new_language_model, train_text_tokenizer
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.cache import RenderedPrompt, Rows
from vlgpt.decoding.generator import Generator
from vlgpt.document import Document, TextPart
from vlgpt.models.image_detokenizer import ImageDetokenizer
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.models.multimodal_lm import MultimodalLM
from vlgpt.models.unified import UnifiedModel
from vlgpt.tokens import DocumentTokenizer

SENTENCE = "a red circle stands beside two blue squares and one small green star under the yellow moon"
WORDS = SENTENCE.split()


def build(*, width: int, depth: int) -> Generator:
    """A random LLaMA whose vocabulary needs no padding (transformers would not mask the padding rows)."""
    text_tokenizer = train_text_tokenizer([" ".join(WORDS)], vocabulary_size=318)
    tokenizer = DocumentTokenizer(text_tokenizer, num_visual=32, template="short")
    torch.manual_seed(0)
    language_model = new_language_model(
        vocabulary_size=tokenizer.vocabulary_size,
        width=width,
        depth=depth,
        num_heads=width // 64,
        mlp_width=int(width * 2.75),
        max_positions=2048,
    )
    with torch.no_grad():
        language_model.lm_head.weight *= 10
    image_tokenizer = ImageTokenizer(
        num_patches=4, patch_width=8, num_visual=32, visual_width=width, width=32, depth=1, num_heads=2
    )
    detokenizer = ImageDetokenizer(
        num_visual=32,
        visual_width=width,
        image_tokens=2,
        image_width=8,
        text_tokens=2,
        text_width=8,
        width=32,
        depth=1,
    )
    lm = MultimodalLM(language_model, num_tokens=tokenizer.num_tokens, num_visual=32, visual_width=width)
    model = UnifiedModel(lm=lm, image_tokenizer=image_tokenizer, image_detokenizer=detokenizer)
    return Generator(model=model, tokenizer=tokenizer, encoder=None, decoder=None)


def prompt_of(generator: Generator, num_tokens: int, seed: int) -> Prompt:
    """A plain prompt of exactly `num_tokens` positions."""
    random = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < num_tokens - 1:
        ids += generator.tokenizer.encode_text(str(random.choice(WORDS)))
    text = generator.tokenizer.decode(ids[: num_tokens - 1])
    return Prompt(Document(f"prompt {seed}", "benchmark", (TextPart(text),)))


def ids_of(generator: Generator, prompt: Prompt) -> list[int]:
    """All token ids of a prompt in one list, as they go into the language model."""
    return [
        token for span in generator.tokenizer.spans(prompt.document, is_prompt=True) for token in span.ids
    ]


def best_times(sides: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each side; the sides take turns."""
    times = [[] for _ in sides]  # type: list[list[float]]
    for _ in range(repeats):
        for side, seen in zip(sides, times):
            start = time.perf_counter()
            side()
            seen.append(time.perf_counter() - start)
    return [min(seen) for seen in times]


def text_row(generator: Generator, *, batch: int, beams: int, repeats: int) -> tuple[str, float, float]:
    """Greedy or beam text from prompts of 128 tokens: 64 new tokens each."""
    prompts = [prompt_of(generator, 128, seed) for seed in range(batch)]
    tokenizer = generator.tokenizer
    ids = torch.tensor([ids_of(generator, prompt)[:128] for prompt in prompts])
    settings = DecodeSettings(
        max_new_tokens=64, min_new_tokens=64, num_beams=beams, images="never", length_penalty=1.0
    )
    banned = [tokenizer.bos_id, tokenizer.begin_image_id, tokenizer.end_image_id]

    def theirs() -> torch.Tensor:
        return generator.model.lm.language_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            min_new_tokens=64,
            num_beams=beams,
            do_sample=False,
            suppress_tokens=banned,
            pad_token_id=tokenizer.eos_id,
            use_cache=True,
        )

    def ours() -> list:
        return generator.generate(prompts, settings)

    found = [list(reply.token_ids) for reply in ours()]
    assert found == theirs()[:, 128:].tolist(), "replies differ from those of transformers"
    seconds = best_times([theirs, ours], repeats)
    label = f"text, batch {batch}, {'greedy' if beams == 1 else f'{beams} beams'} (transformers.generate)"
    return label, *seconds


@torch.no_grad()
def image_row(generator: Generator, *, prefix: int, repeats: int) -> tuple[str, float, float]:
    """One image of 32 embeddings after a prefix, against running everything again for each of them."""
    prompt = prompt_of(generator, prefix - 1, 0)
    lm = generator.model.lm
    settings = DecodeSettings(images="force")

    def theirs() -> torch.Tensor:
        ids = torch.tensor([[*ids_of(generator, prompt), generator.tokenizer.begin_image_id]])
        embeddings = lm.backbone.get_input_embeddings()(ids)
        predicted = []
        for _ in range(32):
            hidden = lm.backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]
            predicted.append(lm.regression_head(hidden))
            embeddings = torch.cat([embeddings, lm.embed_visual(predicted[-1])[:, None]], dim=1)
        return torch.cat(predicted)

    def ours() -> torch.Tensor:
        return generator.generate([prompt], settings)[0].visual[0]

    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=0)
    return f"image, prefix {prefix} (re-running the prefix)", *best_times([theirs, ours], repeats)


@torch.no_grad()
def rank_row(generator: Generator, *, prefix: int, repeats: int) -> tuple[str, float, float]:
    """100 candidates of 1 to 8 words, against one forward pass each."""
    prompt = prompt_of(generator, prefix, 0)
    random = np.random.default_rng(0)
    candidates = [" ".join(random.choice(WORDS, int(random.integers(1, 9)))) for _ in range(100)]
    lm, tokenizer = generator.model.lm, generator.tokenizer
    head = ids_of(generator, prompt)

    def theirs() -> list[float]:
        scores = []
        for candidate in candidates:
            answer = [*tokenizer.encode_text(candidate), tokenizer.eos_id]
            ids = torch.tensor([head + answer])
            states = lm.backbone(input_ids=ids, use_cache=False).last_hidden_state[0, len(head) - 1 : -1]
            log_probs = lm.logits(states).log_softmax(-1)
            scores.append(float(log_probs[range(len(answer)), answer].sum()))
        return scores

    def ours() -> np.ndarray:
        return generator.rank(prompt, candidates)

    np.testing.assert_allclose(ours(), theirs(), atol=2e-3)
    return f"rank 100, prefix {prefix} (100 forwards)", *best_times([theirs, ours], repeats)


def cache_bytes_per_token(generator: Generator) -> int:
    """Measured: bytes that one more position adds to the cache of one row."""
    lm = generator.model.lm
    ids = torch.zeros(64, dtype=torch.long)
    rows = Rows(lm, [RenderedPrompt("", ids, torch.zeros(64, dtype=torch.bool), None).embed(lm)])
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in rows.cache.layers) // 64


def main() -> None:
    """Command line: prints seconds of text, image and ranking jobs for each decoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more than free cores disturb small models")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = build(width=arguments.width, depth=arguments.depth)
    num_parameters = sum(p.numel() for p in generator.model.lm.parameters())
    print(f"language model {num_parameters / 1e6:.1f} M parameters, fp32, {torch.get_num_threads()} threads")
    rows = [
        text_row(generator, batch=1, beams=1, repeats=arguments.repeats),
        text_row(generator, batch=8, beams=1, repeats=arguments.repeats),
        text_row(generator, batch=2, beams=5, repeats=arguments.repeats),
        image_row(generator, prefix=128, repeats=arguments.repeats),
        image_row(generator, prefix=512, repeats=arguments.repeats),
        rank_row(generator, prefix=256, repeats=arguments.repeats),
        rank_row(generator, prefix=512, repeats=arguments.repeats),
    ]
    print(f"{'what (against)':58s} {'theirs s':>9s} {'ours s':>9s} {'faster':>7s}")
    for label, theirs, ours in rows:
        print(f"{label:58s} {theirs:9.3f} {ours:9.3f} {theirs / ours:6.2f}x")
    print(f"KV cache: {cache_bytes_per_token(generator):,} bytes per token and row")


if __name__ == "__main__":
    with torch.no_grad():
        main()
