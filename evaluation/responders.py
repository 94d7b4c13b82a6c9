"""Who answers a benchmark: a model, or a fake that tests the benchmark itself.

An `OracleResponder` must reach the best possible score and a `ShuffledResponder` (perfect answers, given to
the wrong questions) chance level: a benchmark where they do not is broken, whatever a model scores on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.core import Benchmark, Decoding, Example, Prompt, read_image
from vlgpt import seeds
from vlgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vlgpt.generate import DecodeSettings, Generator
    from vlgpt.generate import Prompt as ModelPrompt

    VisualOf = Callable[[Sequence[Prompt], Decoding], list[Tensor | None]]


class ModelResponder:
    """Answers with a trained model.

    Pictures are made `draw_batch_size` at a time, the last batch filled up with repeats: a float32 product
    of another shape rounds differently, and one unit of rounding shows in an 8-bit picture. So pictures
    depend on `draw_batch_size`, which is part of the identity, but on neither `--batch-size` nor the number
    of processes. Args: an export folder's generator and its identity for the manifest.
    """

    def __init__(self, generator: Generator, *, identity: Mapping[str, Any], draw_batch_size: int = 1):
        self.generator = generator
        self.draw_batch_size = draw_batch_size
        self.identity: Mapping[str, Any] = {**identity, "draw_batch_size": draw_batch_size}
        decoder = generator.decoder
        self.drawing: Mapping[str, float] = (
            {} if decoder is None else {"guidance": decoder.guidance, "image_scale": decoder.image_scale}
        )
        """What `Decoding` leaves to the picture decoder; the manifest records it."""

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

        from evaluation.manifest import export_hash
        from vlgpt.generate import Generator
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
        for name, part in (("encoder", generator.encoder), ("decoder", generator.decoder)):
            if isinstance(part, torch.nn.Module):  # may lie outside the export folder
                identity[f"{name}_hash"] = hash_weights(part)
        return cls(generator, identity=identity, draw_batch_size=draw_batch_size)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        asked = [_model_prompt(prompt) for prompt in prompts]
        return [reply.text for reply in self.generator.generate(asked, _model_settings(decoding))]

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        scores = self.generator.rank(_model_prompt(prompt), candidates, normalise=normalise)  # type: ignore[arg-type]
        return np.asarray(scores)

    def draw(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        """The first picture of every reply. Noise is addressed by prompt id."""
        return self._in_equal_batches(prompts, decoding, self._visual_of_replies)

    def reconstruct(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        """Each prompt's picture, tokenised and drawn again."""

        def visual(batch: Sequence[Prompt], decoding: Decoding) -> list[Tensor | None]:
            return [*self.generator.tokenize([read_image(prompt.images[0]) for prompt in batch])]

        return self._in_equal_batches(prompts, decoding, visual)

    def _visual_of_replies(self, batch: Sequence[Prompt], decoding: Decoding) -> list[Tensor | None]:
        asked = [_model_prompt(prompt) for prompt in batch]
        replies = self.generator.generate(asked, _model_settings(decoding))
        return [reply.visual[0] if reply.visual else None for reply in replies]

    def _in_equal_batches(
        self, prompts: Sequence[Prompt], decoding: Decoding, visual_of: VisualOf
    ) -> list[Image.Image | None]:
        """Visual embeddings, then pictures, always `draw_batch_size` at a time."""
        import torch

        size = self.draw_batch_size
        pictures: list[Image.Image | None] = []
        for start in range(0, len(prompts), size):
            batch = [*prompts[start : start + size]]
            filled = batch + [batch[-1]] * (size - len(batch))
            found = visual_of(filled, decoding)
            given = [visual for visual in found if visual is not None]
            if not given:
                pictures += [None] * len(batch)
                continue
            drawn = self.generator.draw(
                torch.stack([given[0] if visual is None else visual for visual in found]),
                seeds=[("evaluation", decoding.seed, prompt.id) for prompt in filled],
                use=decoding.use,
                guidance=decoding.guidance,
                image_scale=decoding.image_scale,
            )
            pictures += [None if found[i] is None else drawn[i] for i in range(len(batch))]
        return pictures


def _model_prompt(prompt: Prompt) -> ModelPrompt:
    from vlgpt.generate import Prompt as ModelPrompt

    return ModelPrompt(prompt.document, tuple(read_image(image) for image in prompt.images), prompt.id)


def _model_settings(decoding: Decoding) -> DecodeSettings:
    from vlgpt.generate import DecodeSettings

    names = {f.name for f in dataclasses.fields(DecodeSettings)}
    return DecodeSettings(**{k: v for k, v in dataclasses.asdict(decoding).items() if k in names})


class OracleResponder:
    """Gives the ideal reply of every example."""

    def __init__(self, benchmark: Benchmark, examples: Sequence[Example]):
        self.benchmark = benchmark
        self.source = {example.id: example for example in examples}
        self.identity: Mapping[str, Any] = {"kind": "oracle"}

    def _ideal(self, prompt: Prompt) -> Any:
        return self.benchmark.ideal(self.source[prompt.id])

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        return [self._ideal(prompt) for prompt in prompts]

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        if self.benchmark.kind == "text":  # the second question
            return self.benchmark.ideal_choice(self.source[prompt.id])
        return np.asarray(self._ideal(prompt), np.float64)

    def draw(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        return [read_image(self._ideal(prompt)) for prompt in prompts]

    def reconstruct(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        return self.draw(prompts, decoding)


class ShuffledResponder(OracleResponder):
    """Gives every example the ideal reply of another one; candidates are ranked at random."""

    def __init__(self, benchmark: Benchmark, examples: Sequence[Example], *, seed: int = 0):
        super().__init__(benchmark, examples)
        self.seed = seed
        order = seeds.generator(seed, "shuffled", benchmark.name).permutation(len(examples))
        self.source = {
            examples[at].id: examples[order[i - 1]] for i, at in enumerate(order)
        }  # one cycle: no fixed point
        self.identity = {"kind": "shuffled", "seed": seed}

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        if self.benchmark.kind == "text":
            return super().rank(prompt, candidates, normalise=normalise)
        random = seeds.generator(self.seed, "shuffled-rank", prompt.id)
        return random.permutation(len(candidates)).astype(np.float64)
