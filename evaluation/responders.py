"""Who answers a benchmark: a model, or a fake that tests the benchmark itself.

An `OracleResponder` must reach the best possible score and a `ShuffledResponder` (perfect answers, given to
the wrong questions) chance level: a benchmark where they do not is broken, whatever a model scores on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.core import Benchmark, Decoding, Example, Prompt, read_image
from vlgpt import seeds
from vlgpt.log import UserError

if TYPE_CHECKING:
    from vlgpt.generate import DecodeSettings, Generator
    from vlgpt.generate import Prompt as ModelPrompt


class ModelResponder:
    """Answers with a trained model. Args: an export folder's generator and its identity for the manifest."""

    def __init__(self, generator: Generator, *, identity: Mapping[str, Any]):
        self.generator = generator
        self.identity = identity

    @classmethod
    def load(cls, export: Path, *, device: str = "cpu", dtype: str = "float32") -> ModelResponder:
        """Load an export folder. Raises UserError when it is none."""
        import torch
        from vlgpt.generate import Generator

        from evaluation.manifest import export_hash

        if not (export / "config.json").is_file():
            raise UserError(f"{export} is no export folder (no config.json); make one with `vlgpt export`")
        generator = Generator.load(export, device=device, dtype=getattr(torch, dtype))

        identity = {
            "kind": "model",
            "export": str(export),
            "export_hash": export_hash(export),
            "dtype": dtype,
        }
        identity["template"] = generator.tokenizer.template_name
        identity["tokenizer"] = generator.tokenizer.fingerprint
        return cls(generator, identity=identity)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        replies = self.generator.generate(
            [_model_prompt(prompt) for prompt in prompts], _model_settings(decoding)
        )
        return [reply.text for reply in replies]

    def rank(self, prompt: Prompt, candidates: Sequence[str], *, normalise: str) -> np.ndarray:
        return np.asarray(self.generator.rank(_model_prompt(prompt), candidates, normalise=normalise))  # type: ignore[arg-type]

    def draw(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        """The first picture of every reply. Noise is addressed by prompt id, so batches do not matter."""
        import torch

        replies = self.generator.generate(
            [_model_prompt(prompt) for prompt in prompts], _model_settings(decoding)
        )
        has_image = [bool(reply.visual) for reply in replies]
        visual = [reply.visual[0] for reply in replies if reply.visual]
        addresses = [_noise_address(p, decoding) for p, has in zip(prompts, has_image) if has]
        drawn = iter(self._draw(torch.stack(visual), addresses, decoding) if visual else [])
        return [next(drawn) if has else None for has in has_image]

    def reconstruct(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Image.Image | None]:
        visual = self.generator.tokenize([read_image(prompt.images[0]) for prompt in prompts])
        return [*self._draw(visual, [_noise_address(prompt, decoding) for prompt in prompts], decoding)]

    def _draw(self, visual: Any, addresses: list[tuple], decoding: Decoding) -> list[Image.Image]:
        return self.generator.draw(visual, seeds=addresses, use=decoding.use, guidance=decoding.guidance)


def _noise_address(prompt: Prompt, decoding: Decoding) -> tuple[int | str, ...]:
    return ("evaluation", decoding.seed, prompt.id)


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
        random = seeds.generator(self.seed, "shuffled-rank", prompt.id)
        return random.permutation(len(candidates)).astype(np.float64)
