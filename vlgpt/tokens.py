"""The only file that knows special tokens and chat templates: `Document` -> spans of token ids.

Every part of a document is tokenised on its own, so token lengths add up: packing can be planned from the lengths
stored in an index, and targets follow from the span that a token came from, never from re-tokenising text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlgpt.document import Document, ImagePart, Role
from vlgpt.log import UserError

BEGIN_IMAGE, END_IMAGE = "[IMG]", "[/IMG]"
NUM_IMAGE_TOKENS = 2  # they are the last tokens of the vocabulary
MODEL_TYPE = "vlgpt"  # in the config.json of an export
PLACEHOLDER_ID = 0  # stands where visual embeddings are put; never looked up as a target
VOCABULARY_MULTIPLE = 64

SYSTEM_MESSAGE = (  # paper, appendix, Table 6
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature."
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The fixed strings around the turns of a chat. `end` closes a reply and is predicted; "" means the EOS token."""

    system: str = ""
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    user_end: str = ""
    end: str = ""


TEMPLATES: dict[str, ChatTemplate] = {
    "vlgpt": ChatTemplate(system=SYSTEM_MESSAGE),
    "short": ChatTemplate(),
    "vicuna": ChatTemplate(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llama2": ChatTemplate(
        system=f"<<SYS>> {SYSTEM_MESSAGE} <</SYS>>", user="[INST]", assistant="", user_end="[/INST]"
    ),
    "chatml": ChatTemplate(
        system=f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        user_end="<|im_end|>",
        end="<|im_end|>",
    ),
}

SpanRole = Literal["start", "system", "header", "plain", "user", "assistant", "end"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a rendering: fixed ids, or part number `part` of the document (then `ids` is empty)."""

    role: SpanRole
    is_target: bool
    ids: tuple[int, ...] = ()
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one origin. `image` is the image number of the document for an image span."""

    role: SpanRole
    ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    image: int | None = None


class DocumentTokenizer:
    """A text tokenizer with [IMG] and [/IMG], and the chat template that wraps documents.

    Args:
        tokenizer: a transformers tokenizer; the two image tokens are added when missing.
        num_visual: visual embeddings per image, N (32 in the paper).
        template: name of a chat template in `TEMPLATES`.
        is_boundary_target: whether [IMG] and [/IMG] are predicted (PAPER: not stated, §3.2; both by default).
    Raises UserError for an unknown template or a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_visual: int,
        template: str = "vlgpt",
        is_boundary_target: bool = True,
    ):
        if template not in TEMPLATES:
            raise UserError(f"chat template {template!r} is unknown; valid: {', '.join(TEMPLATES)}")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json"
            )
        self.text_tokenizer = tokenizer
        tokenizer.add_tokens([BEGIN_IMAGE, END_IMAGE], special_tokens=True)
        self.num_visual = num_visual
        self.template_name = template
        self.template = TEMPLATES[template]
        self.is_boundary_target = is_boundary_target
        self.begin_image_id: int = tokenizer.convert_tokens_to_ids(BEGIN_IMAGE)
        self.end_image_id: int = tokenizer.convert_tokens_to_ids(END_IMAGE)
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int = (
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        )

    @classmethod
    def load(
        cls, path: str | Path, *, num_visual: int = 32, template: str = "vlgpt", **options: Any
    ) -> DocumentTokenizer:
        """Load a transformers tokenizer from a folder or hub name. Raises UserError when there is none."""
        from transformers import AutoTokenizer, PretrainedConfig

        from_us: dict[str, Any] = {}
        config = Path(path) / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("model_type") == MODEL_TYPE:
            from_us["config"] = PretrainedConfig()  # our own type would be read with a warning
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), **from_us)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no tokenizer could be loaded from {str(path)!r}: {reason}") from error
        return cls(tokenizer, num_visual=num_visual, template=template, **options)

    def save(self, folder: Path) -> None:
        """Write the tokenizer with its image tokens, loadable by transformers."""
        self.text_tokenizer.save_pretrained(str(folder))

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever any text could be tokenised differently."""
        backend = getattr(self.text_tokenizer, "backend_tokenizer", None)
        if backend is not None:
            description = json.loads(backend.to_str())
            description.pop("added_tokens", None)  # the image tokens do not change how text is cut
            description.pop("truncation", None)
            description.pop("padding", None)
            text = json.dumps(description, sort_keys=True)
        else:
            text = repr(sorted(self.text_tokenizer.get_vocab().items()))
        return hashlib.blake2b(f"{text}|{self._adds_space}".encode(), digest_size=12).hexdigest()

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer itself puts a space before the first word (LLaMA's sentencepiece does)."""
        ids = self._encode_raw("a")
        return self.text_tokenizer.decode(ids + ids).strip() == "a a"

    def _encode_raw(self, text: str) -> list[int]:
        return self.text_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    @property
    def num_tokens(self) -> int:
        """Real tokens, the two image tokens included."""
        return len(self.text_tokenizer)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: padded to a multiple of 64; logits of the padding rows are masked."""
        return -(-self.num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def encode_text(self, text: str) -> list[int]:
        """Token ids of one piece of text as it stands inside a document; special tokens in the text stay plain text."""
        if not text:
            return []
        return self._encode_raw(text if self._adds_space or text[0].isspace() else " " + text)

    def _encode_fixed(self, text: str) -> tuple[int, ...]:
        """Ids of a template string; its own control tokens (such as <|im_end|>) count as tokens."""
        return tuple(self.text_tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, image tokens and placeholders left out."""
        return self.text_tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    @cached_property
    def _fixed(self) -> dict[str, tuple[int, ...]]:
        template = self.template
        end = self._encode_fixed(template.end) if template.end else (self.eos_id,)
        return {
            "system": self._encode_fixed(template.system),
            "user": self._encode_fixed(template.user),
            "user_end": self._encode_fixed(template.user_end),
            "assistant": self._encode_fixed(template.assistant),
            "end": end,
        }

    @property
    def reply_end_ids(self) -> tuple[int, ...]:
        """The tokens that close a reply: generation stops after them (or after the EOS token)."""
        return self._fixed["end"]

    def pieces(self, roles: Sequence[Role], *, is_prompt: bool = False) -> list[Piece]:
        """The rendering of a document whose parts have these roles, as fixed ids and places of parts.

        With `is_prompt` nothing follows the last part of a plain document or of an open reply, and a document that
        ends with a user turn gets the header of the reply that is to come.
        """
        start = Piece("start", False, (self.bos_id,))
        if not roles or roles[0] == "plain":
            middle = [Piece("plain", True, part=i) for i in range(len(roles))]
            return [start, *middle] if is_prompt else [start, *middle, Piece("end", True, (self.eos_id,))]
        fixed = self._fixed
        result = [start, Piece("system", False, fixed["system"])]
        for i, role in enumerate(roles):
            if i == 0 or roles[i - 1] != role:
                result.append(Piece("header", False, fixed[role]))
            result.append(Piece("user" if role == "user" else "assistant", role == "assistant", part=i))
            is_last = i + 1 == len(roles)
            if is_last or roles[i + 1] != role:
                if role == "user":
                    result.append(Piece("header", False, fixed["user_end"]))
                    if is_last and is_prompt:
                        result.append(Piece("header", False, fixed["assistant"]))
                elif not (is_last and is_prompt):
                    result.append(Piece("end", True, fixed["end"]))
        return [piece for piece in result if piece.ids or piece.part is not None]

    def num_tokens_of(self, pieces: Sequence[Piece], part_lengths: Sequence[int]) -> int:
        """Length of a rendering from the lengths of its parts (an image counts `image_length`)."""
        return sum(len(piece.ids) if piece.part is None else part_lengths[piece.part] for piece in pieces)

    @property
    def image_length(self) -> int:
        """Positions that an image takes: [IMG], N visual embeddings, [/IMG]."""
        return self.num_visual + 2

    def image_span(self, image: int, *, role: SpanRole, is_target: bool) -> Span:
        """[IMG], N placeholders, [/IMG]."""
        boundary = is_target and self.is_boundary_target
        ids = (self.begin_image_id, *([PLACEHOLDER_ID] * self.num_visual), self.end_image_id)
        return Span(role, ids, (boundary, *([is_target] * self.num_visual), boundary), image)

    def spans(self, document: Document, *, is_prompt: bool = False) -> list[Span]:
        """Render a whole document; see `pieces` for `is_prompt`."""
        result = []
        for piece in self.pieces([part.role for part in document.parts], is_prompt=is_prompt):
            if piece.part is None:
                result.append(Span(piece.role, piece.ids, (piece.is_target,) * len(piece.ids)))
                continue
            part = document.parts[piece.part]
            if isinstance(part, ImagePart):
                result.append(self.image_span(part.index, role=piece.role, is_target=piece.is_target))
            else:
                ids = tuple(self.encode_text(part.text))
                result.append(Span(piece.role, ids, (piece.is_target,) * len(ids)))
        return result


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A rendered document, one entry per position: `(L,)` arrays, and the image numbers in reading order."""

    token_ids: np.ndarray
    is_target: np.ndarray
    is_visual: np.ndarray
    images: tuple[int, ...]


def flatten(spans: Sequence[Span]) -> TokenSequence:
    """Spans -> arrays `(L,)`. The first position is never a target: nothing stands before it."""
    lengths = [len(span.ids) for span in spans]
    total = sum(lengths)
    token_ids = np.empty(total, np.int64)
    is_target = np.empty(total, bool)
    is_visual = np.zeros(total, bool)
    at = 0
    for span, length in zip(spans, lengths):
        token_ids[at : at + length] = span.ids
        is_target[at : at + length] = span.is_target
        if span.image is not None:
            is_visual[at + 1 : at + length - 1] = True
        at += length
    if total:
        is_target[0] = False
    return TokenSequence(
        token_ids, is_target, is_visual, tuple(s.image for s in spans if s.image is not None)
    )
