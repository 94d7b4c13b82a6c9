"""The only file that knows special tokens: `Document` -> spans of token ids, chats as `turns` says.

Every part of a document is tokenised on its own. So token lengths add up, and packing can be planned from the lengths
that an index stores. Targets follow from the span that a token came from, never from tokenising text again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlgpt.document import Document, ImagePart, Part, Role, TextPlace, text_places
from vlgpt.errors import UserError
from vlgpt.log import get_logger
from vlgpt.turns import OWN, TEMPLATES, Turns, cut, of_parts, of_texts, with_system_message

BEGIN_IMAGE, END_IMAGE = "[IMG]", "[/IMG]"
NUM_IMAGE_TOKENS = 2  # they are the last tokens of the vocabulary
MODEL_TYPE = "vlgpt"  # in the config.json of an export
PLACEHOLDER_ID = 0  # at positions of visual embeddings; never looked up as a target
VOCABULARY_MULTIPLE = 64


def padded_vocabulary(num_tokens: int) -> int:
    """Rows of the embedding tables for so many tokens: a multiple of 64, which matrix products are fast at."""
    return -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


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


Rendering = Literal["template", "saved", "parts"]


class DocumentTokenizer:
    """A text tokenizer with [IMG] and [/IMG], and the chat template that wraps documents.

    Args:
        tokenizer: a transformers tokenizer; the two image tokens are added when missing, and its `chat_template`
            becomes the one named.
        num_visual: visual embeddings per image, N (32 in the paper).
        template: name of a chat template in `TEMPLATES`, or `own`: the tokenizer's.
        is_boundary_target: whether [IMG] and [/IMG] are predicted (PAPER: not stated, §3.2; both by default).
        system_message: with `own`, what every chat begins with instead of the template's default; "" leaves it empty.
        rendering: for tokenizers of exports. `saved`: its chat template is the one named, as it was in training;
            `parts`: it was exported before chat templates were saved, see `of_parts`.
    Raises UserError for an unknown template or a tokenizer without an end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_visual: int,
        template: str = "vlgpt",
        system_message: str | None = None,
        is_boundary_target: bool = True,
        rendering: Rendering = "template",
    ):
        if template not in (*TEMPLATES, OWN):
            raise UserError(f"chat template {template!r} is unknown; valid: {', '.join(TEMPLATES)}, {OWN}")
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json"
            )
        if system_message is not None and template != OWN:
            raise UserError(
                f"system_message is for template {OWN}: chat template {template!r} has a fixed one; leave it out"
            )
        self.text_tokenizer = tokenizer
        tokenizer.add_tokens([BEGIN_IMAGE, END_IMAGE], special_tokens=True)
        self.num_visual = num_visual
        self.template_name = template
        self.rendering: Rendering = rendering
        self.is_boundary_target = is_boundary_target
        self.begin_image_id: int = tokenizer.convert_tokens_to_ids(BEGIN_IMAGE)
        self.end_image_id: int = tokenizer.convert_tokens_to_ids(END_IMAGE)
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int = (
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        )
        self.start_ids = (self.bos_id,) if rendering == "parts" else self._added_before()
        if rendering == "template" and template != OWN:
            bos = "".join(tokenizer.convert_ids_to_tokens(list(self.start_ids)))
            tokenizer.chat_template = TEMPLATES[template].jinja(
                bos=bos, eos=tokenizer.eos_token, space=self._space_after_control
            )
        if rendering != "parts" and tokenizer.chat_template is None:
            raise UserError(
                f"chat template {template!r}: the tokenizer has none of its own (no chat_template.jinja beside it); "
                f"choose another one ({', '.join(TEMPLATES)})"
            )

        if system_message is not None:
            tokenizer.chat_template = with_system_message(tokenizer.chat_template, system_message)

    def _added_before(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text: BOS for LLaMA, nothing for GPT-2 or Qwen."""
        text = self.text_tokenizer.encode("a", add_special_tokens=False)
        whole = self.text_tokenizer.encode("a", add_special_tokens=True)
        size = next((n for n in range(len(whole)) if whole[n : n + len(text)] == text), 0)
        return tuple(whole[:size])

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
        digest = hashlib.blake2b(f"{text}|{self._adds_space}".encode(), digest_size=12).hexdigest()
        return "+".join([digest, *sorted(self.bare)])

    def fits(self, fingerprint: str, *, has_chats: bool) -> bool:
        """Whether token lengths that were stored under this fingerprint hold for this tokenizer.

        Those of plain documents do not depend on the chat template.
        """
        if has_chats:
            return fingerprint == self.fingerprint
        return fingerprint.split("+")[0] == self.fingerprint.split("+")[0]

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer itself puts a space before the first word (LLaMA's sentencepiece does)."""
        ids = self._encode_raw("a")
        return bool(self.text_tokenizer.decode(ids + ids).strip() == "a a")

    @property
    def _space_after_control(self) -> str:
        """Text that makes a word after a control token what it is at the start of a text."""
        alone, after = (
            self.text_tokenizer.encode(text, add_special_tokens=False)
            for text in ("a", f"{self.text_tokenizer.eos_token}a")
        )
        return " " if self._adds_space and after[1:] != alone else ""

    def _encode_raw(self, text: str) -> list[int]:
        ids: list[int] = self.text_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    @property
    def num_tokens(self) -> int:
        """Real tokens, the two image tokens included."""
        return len(self.text_tokenizer)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: padded to a multiple of 64; logits of the padding rows are masked."""
        return padded_vocabulary(self.num_tokens)

    def encode_text(self, text: str, place: TextPlace = "plain") -> list[int]:
        """Token ids of one piece of text inside a document; special tokens in the text stay plain text.

        A space is put before it, but where the chat template lets text follow without one.
        """
        return self._encode(text, is_bare=place in self.bare) if text else []

    def _encode(self, text: str, *, is_bare: bool) -> list[int]:
        if not is_bare:
            return self._encode_raw(text if self._adds_space or text[0].isspace() else " " + text)
        if self._adds_space:  # not at the start of a line
            before, ids = self._encode_raw("a\n"), self._encode_raw("a\n" + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._encode_raw(text)

    @cached_property
    def bare(self) -> frozenset[TextPlace]:
        """Where text has no space before it."""
        if self.rendering == "parts":
            return frozenset()
        return self.turns.bare if self.template_name == OWN else TEMPLATES[self.template_name].bare

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, image tokens and placeholders left out."""
        text: str = self.text_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    @cached_property
    def turns(self) -> Turns:
        """The ids around the turns of a chat. Raises UserError when the template does not fit the tokenizer."""
        marks = {"bos": self.start_ids, "eos": (self.eos_id,)}
        if self.rendering == "parts":
            return of_parts(self.template_name, encode=self._encode_fixed, **marks)
        if self.template_name == OWN:
            return cut(self.text_tokenizer, encode=self._encode, name=OWN)
        template = TEMPLATES[self.template_name]
        try:
            return cut(self.text_tokenizer, encode=self._encode, name=self.template_name, bare=template.bare)
        except UserError as error:
            get_logger().warning("every text of the chat template is tokenised on its own: %s", error)
            return of_texts(template, encode=self._encode_apart, **marks)

    def _encode_fixed(self, text: str) -> tuple[int, ...]:
        """Ids of a fixed text; control tokens in it count as tokens."""
        return tuple(self.text_tokenizer.encode(text, add_special_tokens=False)) if text else ()

    def _encode_apart(self, text: str) -> tuple[int, ...]:
        """The same, one space before it."""
        return self._encode_fixed(text.lstrip(" ") if self._adds_space else text)

    @cached_property
    def _between_texts(self) -> tuple[int, ...]:
        """Parts two texts of one turn where nothing else does: a line break."""
        return tuple(self._encode("\n", is_bare=True))

    @property
    def reply_end_ids(self) -> tuple[int, ...]:
        """The tokens that close a reply: generation stops after them (or after the EOS token)."""
        return self.turns.end

    @property
    def reply_end_text(self) -> str:
        """What a reader would see of them: "" when they are control tokens."""
        return self.decode(self.reply_end_ids)

    def pieces(
        self, roles: Sequence[Role], is_image: Sequence[bool], *, is_prompt: bool = False
    ) -> list[Piece]:
        """The rendering of a document whose parts have these roles and kinds, as fixed ids and places of parts.

        With `is_prompt` nothing follows the last part of a plain document or of an open reply, and a document that ends
        with a user turn gets the header of the reply that is to come. A chat that begins with a reply has an empty user
        turn before it.
        """
        if roles and roles[0] != "plain":
            result = [*self.chat_head, *self._turn_pieces(roles, is_image, is_prompt=is_prompt)]
        else:
            # an empty prompt still needs a position to predict from
            start = self.start_ids or (() if roles else (self.eos_id,))
            result = [Piece("start", False, start)]
            result += [Piece("plain", True, part=i) for i in range(len(roles))]
            result += [] if is_prompt else [Piece("end", True, (self.eos_id,))]
        return [piece for piece in result if piece.ids or piece.part is not None]

    @property
    def chat_head(self) -> list[Piece]:
        """What every chat begins with."""
        system, size = self.turns.system, len(self.start_ids)
        size = size if system[:size] == self.start_ids else 0
        return [
            Piece("start", False, system[:size]),
            Piece("system", False, system[size:]),
            Piece("header", False, self.turns.first),
        ]

    def _turn_pieces(
        self, roles: Sequence[Role], is_image: Sequence[bool], *, is_prompt: bool
    ) -> Iterator[Piece]:
        turns, num_parts, places = self.turns, len(roles), text_places(roles)
        for i, role in enumerate(roles):
            is_reply = role == "assistant"
            if i == 0 or roles[i - 1] != role:
                yield Piece("header", False, turns.reply if is_reply else turns.user if i else ())
            elif places[i] in self.bare and not (is_image[i - 1] or is_image[i]):
                yield Piece(role, is_reply, self._between_texts)
            yield Piece(role, is_reply, part=i)
            if i + 1 < num_parts:
                yield Piece("end", True, turns.end if is_reply and roles[i + 1] != role else ())
            elif is_prompt:
                yield Piece("header", False, () if is_reply else turns.reply)
            else:
                yield Piece("end", True, turns.end if is_reply else ())
                yield Piece("header", False, turns.tail if is_reply else turns.user_end)

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
        roles = [part.role for part in document.parts]
        is_image = [isinstance(part, ImagePart) for part in document.parts]
        return self.fill(self.pieces(roles, is_image, is_prompt=is_prompt), document.parts)

    def fill(self, pieces: Sequence[Piece], parts: Sequence[Part]) -> list[Span]:
        """The spans of pieces that were made for these parts."""
        result = []
        places = text_places([part.role for part in parts])
        for piece in pieces:
            if piece.part is None:
                result.append(Span(piece.role, piece.ids, (piece.is_target,) * len(piece.ids)))
                continue
            part = parts[piece.part]
            if isinstance(part, ImagePart):
                result.append(self.image_span(part.index, role=piece.role, is_target=piece.is_target))
            else:
                ids = tuple(self.encode_text(part.text, places[piece.part]))
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
    """Spans -> arrays `(L,)`. The first position is never a target: no position before it predicts it."""
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
