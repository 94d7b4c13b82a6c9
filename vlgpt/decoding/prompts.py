"""Prompts -> token ids and visual embeddings; long dialogues are trimmed at the borders of their turns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vlgpt.batch import to_pixels
from vlgpt.decoding.api import ImageLike, Prompt
from vlgpt.decoding.cache import RenderedPrompt
from vlgpt.document import Document, ImagePart, Part, Role, TextPart, join
from vlgpt.errors import UserError
from vlgpt.images import png_bytes, read_square
from vlgpt.log import get_logger
from vlgpt.models.encoders import ClipEncoder
from vlgpt.models.image_tokenizer import ImageTokenizer
from vlgpt.tokens import DocumentTokenizer, flatten

CHUNK = 16  # images that are encoded together


def square_pixels(image: Image.Image | bytes, size_px: int) -> Tensor:
    """Shorter side to `size_px` (bicubic), centre crop, as in training: -> (3, H, W) in [-1, 1]. Raises BadImage."""
    # Through a file, so that odd modes (alpha, palette, 16 bit) end as they would when read from disk.
    if isinstance(image, Image.Image):
        image = png_bytes(image, compress_level=0)
    return to_pixels(read_square(image, size_px=size_px, decoder="pillow")[None].copy())[0]


class ImageReader:
    """Anything that is an image -> visual embeddings in the standardised scale."""

    def __init__(self, *, image_tokenizer: ImageTokenizer, encoder: ClipEncoder | None):
        self.image_tokenizer, self.encoder = image_tokenizer, encoder

    def pixels_of(self, image: Image.Image | bytes | Path) -> Tensor:
        """-> (3, H, W) in [-1, 1], of the encoder's size. Raises BadImage."""
        if self.encoder is None:
            raise UserError("pictures need the image encoder, and this model was loaded without one")
        image = image.read_bytes() if isinstance(image, Path) else image
        return square_pixels(image, self.encoder.image_size_px)

    def _tagged(self, image: ImageLike) -> tuple[str, Tensor]:
        if isinstance(image, tuple):
            return image
        return "pixels", image if isinstance(image, Tensor) else self.pixels_of(image)

    @torch.no_grad()
    def __call__(self, images: Sequence[ImageLike]) -> Tensor:
        """M images -> (M, N, d), standardised. Raises UserError for tensors of a wrong shape or kind."""
        tagged = [self._tagged(image) for image in images]
        parameter = next(self.image_tokenizer.parameters())
        tokenizer = self.image_tokenizer
        result = torch.empty(
            len(images), tokenizer.num_visual, tokenizer.visual_width, device=parameter.device
        )
        for kind in ("pixels", "patches", "visual"):
            rows = [row for row, (found, _) in enumerate(tagged) if found == kind]
            for at in range(0, len(rows), CHUNK):
                chunk = rows[at : at + CHUNK]
                values = torch.stack([tagged[row][1] for row in chunk]).to(parameter)
                result[chunk] = self._encode(kind, values).float()
        if unknown := {kind for kind, _ in tagged} - {"pixels", "patches", "visual"}:
            raise UserError(f"image tensors are tagged {sorted(unknown)}, wanted pixels, patches or visual")
        return result

    def _encode(self, kind: str, values: Tensor) -> Tensor:
        if kind == "visual":
            wanted = (self.image_tokenizer.num_visual, self.image_tokenizer.visual_width)
            if tuple(values.shape[1:]) != wanted:
                raise UserError(
                    f"visual embeddings have shape {tuple(values.shape[1:])}, this model's {wanted}"
                )
            return values
        if kind == "pixels":
            if self.encoder is None:
                raise UserError("pixels need the image encoder, and this model was loaded without one")
            values = self.encoder.patches(values).to(values.dtype)
        return self.image_tokenizer.encode(values)


def render(
    document: Document, *, tokenizer: DocumentTokenizer, visual: Tensor | None, address: str
) -> RenderedPrompt:
    """A document as a prompt: what the model reads before it replies."""
    sequence = flatten(tokenizer.spans(document, is_prompt=True))
    return RenderedPrompt(
        address, torch.from_numpy(sequence.token_ids), torch.from_numpy(sequence.is_visual), visual
    )


def render_all(
    prompts: Sequence[Prompt],
    *,
    tokenizer: DocumentTokenizer,
    read_images: Callable[[Sequence[ImageLike]], Tensor],
) -> list[RenderedPrompt]:
    """Render prompts; the images of all of them are encoded together."""
    images = [image for prompt in prompts for image in prompt.images]
    visual = read_images(images).split([len(prompt.images) for prompt in prompts]) if images else None
    return [
        render(
            prompt.document,
            tokenizer=tokenizer,
            visual=visual[row] if visual is not None and prompt.images else None,
            address=prompt.address,
        )
        for row, prompt in enumerate(prompts)
    ]


def empty_prompt(document: Document, *, tokenizer: DocumentTokenizer) -> RenderedPrompt:
    """The unconditional branch: the same kind of document with nothing in it (Emu: the empty prompt)."""
    parts = (TextPart("", "user"),) if document.is_chat else ()
    return render(Document("empty", "guidance", parts), tokenizer=tokenizer, visual=None, address="")


def reply_role(document: Document) -> Role:
    """Who speaks in the reply to this document."""
    return "assistant" if document.is_chat else "plain"


def prompt_length(document: Document, *, tokenizer: DocumentTokenizer) -> int:
    """Positions of a document as a prompt."""
    return sum(len(span.ids) for span in tokenizer.spans(document, is_prompt=True))


def trim_to_length(prompt: Prompt, *, tokenizer: DocumentTokenizer, max_length: int) -> Prompt:
    """Drop the oldest exchanges of a chat until it fits `max_length` positions; warns when any are dropped.

    An exchange is what the user says and the replies to it. Raises UserError when the last one alone is too long, or a
    document that is no chat.
    """
    exchanges = split_exchanges(prompt.document.parts)

    def without(num_dropped: int) -> Prompt:
        if num_dropped == 0:
            return prompt
        kept = [part for exchange in exchanges[num_dropped:] for part in exchange]
        document = join(prompt.document.id, prompt.document.source, [kept], prompt.document.info)
        images = tuple(prompt.images[part.index] for part in kept if isinstance(part, ImagePart))
        return replace(prompt, document=document, images=images)

    def room_left(num_dropped: int) -> int:
        return max_length - prompt_length(without(num_dropped).document, tokenizer=tokenizer)

    num_dropped = 0
    if room_left(0) < 0 and prompt.document.is_chat and len(exchanges) > 1:
        choices = range(
            1, len(exchanges) - 1
        )  # bisected, as a long chat has many; the last exchange always stays
        num_dropped = 1 + bisect_left(choices, 0, key=room_left)
    if (room := room_left(num_dropped)) < 0:
        raise UserError(
            f"prompt {prompt.address!r} takes {max_length - room} positions, there is room for {max_length}: "
            "shorten it or lower max_new_tokens"
        )
    if num_dropped:
        get_logger("decoding").warning(
            "%s: dropped the oldest %d exchanges, the context is full", prompt.address, num_dropped
        )
    return without(num_dropped)


def split_exchanges(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts grouped into exchanges: a new one starts where the user speaks after a reply."""
    result: list[list[Part]] = []
    for at, part in enumerate(parts):
        if at == 0 or (part.role == "user" and parts[at - 1].role != "user"):
            result.append([])
        result[-1].append(part)
    return result
