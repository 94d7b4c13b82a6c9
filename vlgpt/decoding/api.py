"""What goes into decoding and what comes out: `Prompt`, `DecodeSettings`, `Reply`.

No torch here: evaluation scores saved predictions without it and uses the same prompts and settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from vlgpt.document import Document, ImagePart, TextPart
from vlgpt.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

TaggedTensor: TypeAlias = 'tuple[Literal["patches", "visual", "pixels"], Tensor]'
ImageLike: TypeAlias = "Image.Image | bytes | Path | Tensor | TaggedTensor"
"""An image, the bytes or path of an image file, pixels (3, H, W) in [-1, 1], or a tensor with its kind:
("patches", (P, C)), ("visual", (N, d)), ("pixels", (3, H, W))."""

Finish = Literal["end", "length", "stop"]


@dataclass(frozen=True)
class Prompt:
    """A document to be answered or continued; `images[i]` belongs to its `ImagePart(i)`.

    `id` addresses the random numbers of this prompt (the document's id when empty): the same prompt draws the same
    numbers in any batch. Raises UserError when the number of images differs from the document's.
    """

    document: Document
    images: tuple[ImageLike, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if self.document.num_images != len(self.images):
            raise UserError(
                f"prompt {self.address!r} has {self.document.num_images} image parts, "
                f"but {len(self.images)} images are given"
            )

    @property
    def address(self) -> str:
        return self.id or self.document.id


@dataclass(frozen=True)
class DecodeSettings:
    """How a reply is decoded.

    A token is a text token or [IMG]; the N embeddings of an image and its forced [/IMG] are not counted. `images`:
    `free` lets the model choose, `never` masks [IMG], `force` gives [IMG] (paper, Table 7) and ends after `max_images`
    images. `length_penalty` as in transformers: score = log-likelihood / tokens ** length_penalty. `temperature` 0 is
    greedy. The last three say how visual embeddings become images: classifier-free `guidance` of the image decoder
    (1 = none), the weight `image_scale` of z_v beside z_t, and which of the two it reads (paper, Table 4); None is the
    decoder's own. Raises UserError for values out of range and for sampled beams.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    images: Literal["free", "never", "force"] = "free"
    max_images: int = 1
    visual_guidance: float = 1.0
    seed: int = 0
    guidance: float | None = None
    image_scale: float | None = None
    use: Literal["both", "image", "text"] = "both"

    def __post_init__(self) -> None:
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of non-empty strings"),
            "images": (self.images in ("free", "never", "force"), "free, never or force"),
            "use": (self.use in ("both", "image", "text"), "both, image or text"),
            "max_images": (self.max_images >= 1, "at least 1 (images='never' for none)"),
        }
        for name, (is_good, text) in wanted.items():
            if not is_good:
                raise UserError(f"{name} is {getattr(self, name)!r}, wanted {text}")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(
                f"num_beams {self.num_beams} with temperature {self.temperature}: beams are not sampled, "
                "set one of them"
            )

    @property
    def has_guidance(self) -> bool:
        return self.images != "never" and self.visual_guidance != 1.0


@dataclass(frozen=True)
class Reply:
    """Text and images in reading order. `parts` number the images of this reply 0, 1, ...: rows of `visual`.

    `token_ids` is the whole rendering (placeholders at visual positions, the end token last when there is one); `text`
    joins the text parts, cut before a stop string. `log_likelihood` sums the model's log-probabilities of the chosen
    tokens, at temperature 1 and before any masking.
    """

    parts: tuple[TextPart | ImagePart, ...]
    text: str
    visual: tuple[Tensor, ...]
    token_ids: tuple[int, ...]
    finish: Finish
    log_likelihood: float


@dataclass(frozen=True)
class Listener:
    """Callbacks while decoding; every one gets the number of the prompt first.

    `text(prompt, piece)`: new text that will not change any more. `image(prompt, visual (N, d))`: a finished image.
    `is_cancelled(prompt)`: asked before every step; a cancelled reply ends with what it has (`length`).
    """

    text: Callable[[int, str], None] | None = None
    image: Callable[[int, Tensor], None] | None = None
    is_cancelled: Callable[[int], bool] | None = None
