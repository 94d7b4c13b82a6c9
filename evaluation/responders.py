"""Who answers a benchmark: a model, or a fake that tests the benchmark itself.

An `OracleResponder` must reach the best possible score and a `ShuffledResponder` (perfect answers, given to
the wrong questions) chance level: a benchmark where they do not is broken, whatever a model scores on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.core import Benchmark, DecodeSettings, Example, Prompt, Record, read_image
from evaluation.manifest import export_hash
from vlgpt import seeds
from vlgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vlgpt.decoding.generator import Generator

    VisualOf = Callable[[Sequence[Prompt], DecodeSettings], Sequence[Tensor | None]]


class ModelResponder:
    """Answers with a trained model.

    Images are made `draw_batch_size` at a time, the last batch filled up with repeats: a float32 product
    of another shape rounds differently, and one unit of rounding shows in an 8-bit image. So images
    depend on `draw_batch_size`, which is part of the identity, but on neither `--batch-size` nor the number
    of processes. `drawing` has the settings that a `DecodeSettings` may leave to the image decoder.

    Args: an export folder's generator and its identity for the manifest.
    """

    def __init__(self, generator: Generator, *, identity: Record, draw_batch_size: int = 1):
        self.generator = generator
        self.draw_batch_size = draw_batch_size
        self.identity: Record = {**identity, "draw_batch_size": draw_batch_size}
        decoder = generator.decoder
        self.drawing: dict[str, float] = {}
        if decoder is not None:
            self.drawing = {"guidance": decoder.guidance, "image_scale": decoder.image_scale}

    @property
    def is_deterministic(self) -> bool:
        """Whether it always draws the same image for the same prompt."""
        head, decoder = self.generator.model.lm.regression_head, self.generator.decoder
        return head.is_deterministic and (decoder is None or decoder.is_deterministic)

    @classmethod
    def load(
        cls, export: Path, *, device: str = "cpu", dtype: str = "float32", draw_batch_size: int = 1
    ) -> ModelResponder:
        """Load an export folder. Raises UserError when it is none."""
        import torch

        from vlgpt.decoding.generator import Generator
        from vlgpt.models.encoders import hash_weights

        if not (export / "config.json").is_file():
            raise UserError(f"{export} is no export folder (no config.json); make one with `vlgpt export`")
        generator = Generator.load(export, device=device, dtype=getattr(torch, dtype))
        identity = {
            "kind": "model",
            "export": str(export),
            "export_hash": export_hash(export),
            "dtype": dtype,
            "template": generator.tokenizer.template_name,
            "tokenizer": generator.tokenizer.fingerprint,
        }
        # These may lie outside the export folder, where its hash does not see them.
        for name, part in (("encoder", generator.encoder), ("decoder", generator.decoder)):
            if isinstance(part, torch.nn.Module):
                identity[f"{name}_hash"] = hash_weights(part)
        return cls(generator, identity=identity, draw_batch_size=draw_batch_size)

    def generate(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[str]:
        """One reply for every prompt, all in one batch."""
        return [reply.text for reply in self.generator.generate([*map(_loaded, prompts)], decoding)]

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        """Log-likelihoods of the candidates, normalised over length as `normalise` says: -> (num_candidates,)."""
        scores = self.generator.rank(_loaded(prompt), candidates, normalise=normalise)  # type: ignore[arg-type]
        return np.asarray(scores)

    def draw(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """The first image of every reply. Noise is addressed by prompt id."""

        def visual(batch: Sequence[Prompt], decoding: DecodeSettings) -> list[Tensor | None]:
            replies = self.generator.generate([*map(_loaded, batch)], decoding)
            return [reply.visual[0] if reply.visual else None for reply in replies]

        return self._in_equal_batches(prompts, decoding, visual)

    def reconstruct(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """Each prompt's image, tokenised and drawn again."""

        def visual(batch: Sequence[Prompt], decoding: DecodeSettings) -> list[Tensor | None]:
            return [*self.generator.tokenize([read_image(prompt.images[0]) for prompt in batch])]

        return self._in_equal_batches(prompts, decoding, visual)

    def _in_equal_batches(
        self, prompts: Sequence[Prompt], decoding: DecodeSettings, visual_of: VisualOf
    ) -> list[Image.Image | None]:
        """Visual embeddings, then images, always `draw_batch_size` at a time."""
        import torch

        size = self.draw_batch_size
        images: list[Image.Image | None] = []
        for start in range(0, len(prompts), size):
            batch = [*prompts[start : start + size]]
            filled = batch + [batch[-1]] * (size - len(batch))
            found = visual_of(filled, decoding)
            given = [visual for visual in found if visual is not None]
            if not given:
                images += [None] * len(batch)
                continue
            # A reply without an image is drawn too (as another one), so that the batch keeps its size.
            drawn = self.generator.draw(
                torch.stack([given[0] if visual is None else visual for visual in found]),
                seeds=[("evaluation", decoding.seed, prompt.id) for prompt in filled],
                use=decoding.use,
                guidance=decoding.guidance,
                image_scale=decoding.image_scale,
            )
            images += [None if found[i] is None else drawn[i] for i in range(len(batch))]
        return images


def _loaded(prompt: Prompt) -> Prompt:
    """The prompt with its image files read."""
    return replace(prompt, images=tuple(map(read_image, prompt.images)))


class OracleResponder:
    """Answers every question with the benchmark's ideal reply."""

    def __init__(self, benchmark: Benchmark, examples: Sequence[Example]):
        self.benchmark = benchmark
        self.source = {example.id: example for example in examples}
        self.identity: Record = {"kind": "oracle"}

    def _ideal(self, prompt: Prompt) -> Any:
        return self.benchmark.ideal(self.source[prompt.id])

    def generate(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[str]:
        """The ideal answer to each prompt."""
        return [self._ideal(prompt) for prompt in prompts]

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        """The ideal scores, or 0 and -9 for the two answers of a second question: -> (num_candidates,)."""
        second = self.benchmark.second_question(self.source[prompt.id])
        if second is None:
            return np.asarray(self._ideal(prompt), np.float64)
        return np.array([0.0, -9.0]) if second.is_first_right else np.array([-9.0, 0.0])

    def draw(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """The ideal image of each prompt."""
        return [read_image(self._ideal(prompt)) for prompt in prompts]

    def reconstruct(self, prompts: Sequence[Prompt], decoding: DecodeSettings) -> list[Image.Image | None]:
        """The ideal image of each prompt, as for `draw`."""
        return self.draw(prompts, decoding)


class ShuffledResponder(OracleResponder):
    """Gives every example the ideal reply of another one; candidates are ranked at random."""

    def __init__(self, benchmark: Benchmark, examples: Sequence[Example], *, seed: int = 0):
        super().__init__(benchmark, examples)
        self.seed = seed
        # One cycle through all examples: none gets its own answer.
        order = seeds.generator(seed, "shuffled", benchmark.name).permutation(len(examples))
        self.source = {examples[at].id: examples[order[i - 1]] for i, at in enumerate(order)}
        self.identity = {"kind": "shuffled", "seed": seed}

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        """Random scores that depend on the seed and the prompt's id alone: -> (num_candidates,)."""
        if self.benchmark.kind == "text":
            return super().rank(prompt, candidates, normalise=normalise)
        random = seeds.generator(self.seed, "shuffled-rank", prompt.id)
        return random.permutation(len(candidates)).astype(np.float64)
