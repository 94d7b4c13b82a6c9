"""The model that people talk to: interleaved prompts in, interleaved replies out.

`Generator` ties the parts together; how replies grow is told in `vlgpt/decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlgpt import seeds
from vlgpt.decoding.api import DecodeSettings, ImageLike, Listener, Prompt, Reply
from vlgpt.decoding.beams import BeamSearch
from vlgpt.decoding.cache import RenderedPrompt, Stream
from vlgpt.decoding.hypothesis import Hypothesis, ReplyRules
from vlgpt.decoding.load import cast_parameters, load_decoder, load_encoder, load_tokenizer
from vlgpt.decoding.prompts import (
    ImageReader,
    empty_prompt,
    prompt_length,
    render_all,
    reply_role,
    trim_to_length,
)
from vlgpt.decoding.ranking import log_likelihoods
from vlgpt.decoding.stepwise import Hooks, TextStreams, decode_stepwise
from vlgpt.errors import UserError
from vlgpt.models.decoders import ImageDecoder
from vlgpt.models.encoders import ClipEncoder
from vlgpt.models.unified import UnifiedConfig, UnifiedModel
from vlgpt.tokens import DocumentTokenizer

__all__ = ["DecodeSettings", "Generator", "ImageLike", "Prompt", "Reply", "decode"]

Conditions = Literal["both", "image", "text"]


class Generator:
    """A unified model with its text tokenizer, and, for images, an image encoder and an image decoder.

    Replies depend on neither the other prompts of a batch nor their order; random numbers are addressed by prompt.
    """

    def __init__(
        self,
        *,
        model: UnifiedModel,
        tokenizer: DocumentTokenizer,
        encoder: ClipEncoder | None,
        decoder: ImageDecoder | None,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.encoder, self.decoder = encoder, decoder
        self._read_images = ImageReader(image_tokenizer=model.image_tokenizer, encoder=encoder)

    @classmethod
    def load(cls, export: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Generator:
        """All that an export folder holds or names. Raises UserError when a part is missing or does not fit.

        `dtype` is that of the language model and a diffusion decoder, bfloat16 on a GPU and float32 on a CPU unless
        given; the small image parts stay in fp32.
        """
        folder = Path(export)
        if dtype is None:
            dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        config = UnifiedConfig.from_folder(folder)
        model = UnifiedModel.from_folder(folder)
        cast_parameters(model.lm, dtype)
        tokenizer = load_tokenizer(folder, config)
        encoder = load_encoder(folder, config.image_encoder)
        decoder = load_decoder(folder, config.picture_decoder, dtype=dtype)
        for part in (model, encoder, decoder):
            if isinstance(part, nn.Module):
                part.to(device)
        model.lm.settle_attention(torch.device(device), dtype)
        return cls(model=model, tokenizer=tokenizer, encoder=encoder, decoder=decoder)

    @property
    def device(self) -> torch.device:
        return self.model.lm.visual_scale.device

    @property
    def is_device_alive(self) -> bool:
        """Whether the device still computes."""
        try:
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False

    @property
    def max_length(self) -> int:
        """Positions that the language model was built for."""
        return self.model.lm.backbone.config.max_position_embeddings

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: DecodeSettings,
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_image: Callable[[int, Tensor], None] | None = None,
        is_cancelled: Callable[[int], bool] | None = None,
    ) -> list[Reply]:
        """One reply per prompt. The callbacks get the number of the prompt first, see `Listener`.

        Raises UserError when a prompt leaves no room in the model's context (`trim` shortens chats).
        """
        if not prompts:
            return []
        listener = Listener(on_text, on_image, is_cancelled)
        for prompt in prompts:
            self._check_length(prompt, settings)
        rendered = render_all(prompts, tokenizer=self.tokenizer, read_images=self.tokenize)
        empty = (
            [empty_prompt(p.document, tokenizer=self.tokenizer) for p in prompts]
            if settings.has_guidance
            else []
        )
        hypotheses = decode(
            self.model, self.tokenizer, rendered, settings, empty_prompts=empty, listener=listener
        )
        rules = self._rules(settings)
        return [rules.reply(h, role=reply_role(p.document)) for h, p in zip(hypotheses, prompts)]

    def _rules(self, settings: DecodeSettings) -> ReplyRules:
        return ReplyRules(tokenizer=self.tokenizer, settings=settings, max_length=self.max_length)

    def _room(self, settings: DecodeSettings) -> int:
        """Positions that a prompt may take when one image of the reply, or one token, must still fit."""
        return self.max_length - (self.tokenizer.image_length if settings.images == "force" else 1)

    def _check_length(self, prompt: Prompt, settings: DecodeSettings) -> None:
        length = prompt_length(prompt.document, tokenizer=self.tokenizer)
        if length > self._room(settings):
            raise UserError(
                f"prompt {prompt.address!r} takes {length} positions, the model reads {self.max_length} "
                f"and the reply needs {self.max_length - self._room(settings)}: shorten it (chats: use trim)"
            )

    def trim(self, prompt: Prompt, settings: DecodeSettings) -> Prompt:
        """The chat without its oldest exchanges, so that the longest reply fits. Raises UserError."""
        num_images = 0 if settings.images == "never" else settings.max_images
        reserved = settings.max_new_tokens + num_images * self.tokenizer.image_length
        return trim_to_length(prompt, tokenizer=self.tokenizer, max_length=self.max_length - reserved)

    @torch.no_grad()
    def rank(
        self, prompt: Prompt, candidates: Sequence[str], *, normalise: Literal["sum", "mean", "emu"] = "sum"
    ) -> np.ndarray:
        """Log-likelihood of each candidate as the reply, end token included: -> (num_candidates,) float64.

        `mean` divides by the candidate's tokens, `emu` by those of prompt and candidate (UPSTREAM: Emu's VisDial code,
        whose mean runs over all positions). An empty candidate is just the end token.
        """
        if not candidates:
            return np.zeros(0)
        (rendered,) = render_all([prompt], tokenizer=self.tokenizer, read_images=self.tokenize)
        end = self.tokenizer.reply_end_ids if prompt.document.is_chat else (self.tokenizer.eos_id,)
        sequences = [
            [*self.tokenizer.encode_text(candidate, reply_role(prompt.document)), *end]
            for candidate in candidates
        ]
        longest = len(rendered) + max(len(ids) for ids in sequences)
        if longest > self.max_length:
            raise UserError(
                f"prompt {prompt.address!r} with its longest candidate takes {longest} positions, "
                f"the model reads {self.max_length}"
            )
        sums = log_likelihoods(self.model.lm, rendered, sequences).double().numpy()
        lengths = np.array([len(ids) for ids in sequences])
        divisors = {"sum": np.ones(len(lengths)), "mean": lengths, "emu": len(rendered) + lengths}
        if normalise not in divisors:
            raise UserError(f"normalise is {normalise!r}, wanted sum, mean or emu")
        return sums / divisors[normalise]

    def tokenize(self, images: Sequence[ImageLike]) -> Tensor:
        """Standardised visual embeddings: M images -> (M, N, d)."""
        return self._read_images(images)

    @torch.no_grad()
    def draw(
        self,
        visual: Tensor,
        *,
        seeds: Sequence[tuple[int | str, ...]],
        use: Conditions = "both",
        guidance: float | None = None,
        image_scale: float | None = None,
    ) -> list[Image.Image]:
        """Images of visual embeddings (M, N, d) -> M images; `seeds[m]` addresses the noise of image m.

        `use` chooses the conditions that the decoder gets (paper, Table 4); guidance and scale are the decoder's own
        unless given. Raises UserError without a decoder.
        """
        if self.decoder is None:
            raise UserError("drawing needs a picture decoder, and this model was loaded without one")
        if len(seeds) != len(visual):
            raise UserError(f"{len(seeds)} seeds are given for {len(visual)} images, wanted one each")
        if len(visual) == 0:
            return []
        parameter = next(self.model.image_detokenizer.parameters())
        image, text = self.model.conditions_of(visual.to(parameter))
        pixels = self.decoder.decode(
            None if use == "text" else image,
            None if use == "image" else text,
            generators=[_noise(address) for address in seeds],
            guidance=guidance,
            image_scale=image_scale,
        )
        return to_pictures(pixels)

    def reconstruct(
        self,
        images: Sequence[ImageLike],
        *,
        use: Conditions = "both",
        guidance: float | None = None,
        image_scale: float | None = None,
        seed: int = 0,
    ) -> list[Image.Image]:
        """Images through the image tokenizer and back."""
        addresses: list[tuple[int | str, ...]] = [(seed, "reconstruct", i) for i in range(len(images))]
        visual = self.tokenize(images)
        return self.draw(visual, seeds=addresses, use=use, guidance=guidance, image_scale=image_scale)


def _noise(address: tuple[int | str, ...]) -> torch.Generator:
    return seeds.torch_generator(*address)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(M, 3, H, W) in [-1, 1] -> M RGB images."""
    values = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in values.cpu().numpy()]


def decode(
    model: UnifiedModel,
    tokenizer: DocumentTokenizer,
    prompts: Sequence[RenderedPrompt],
    settings: DecodeSettings,
    *,
    empty_prompts: Sequence[RenderedPrompt] = (),
    listener: Listener | None = None,
    hooks: Hooks | None = None,
) -> list[Hypothesis]:
    """Let the model reply to rendered prompts; `empty_prompts` (one each) are the branch for guidance."""
    listener, hooks = listener or Listener(), hooks or Hooks()
    max_length = model.lm.backbone.config.max_position_embeddings
    rules = ReplyRules(tokenizer=tokenizer, settings=settings, max_length=max_length)
    hypotheses = [Hypothesis(number, len(prompt)) for number, prompt in enumerate(prompts)]
    if settings.images == "force":
        prompts = [prompt.followed_by(tokenizer.begin_image_id) for prompt in prompts]
        empty_prompts = [prompt.followed_by(tokenizer.begin_image_id) for prompt in empty_prompts]
        for hypothesis in hypotheses:
            rules.open_image(hypothesis)
            hypothesis.unread.clear()
    stream = Stream(
        model.lm,
        prompts,
        begin_image_id=tokenizer.begin_image_id,
        guidance=settings.visual_guidance,
        empty_prompts=empty_prompts,
    )
    if settings.num_beams == 1 or settings.images == "force":
        decode_stepwise(stream, prompts, hypotheses, rules=rules, listener=listener, hooks=hooks)
        return hypotheses
    hypotheses = BeamSearch(stream, prompts, hypotheses, rules=rules, listener=listener, hooks=hooks).run()
    texts = TextStreams(rules=rules, listener=listener)
    for hypothesis in hypotheses:
        texts.update(hypothesis)
    return hypotheses
