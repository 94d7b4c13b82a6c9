"""Documents -> token sequences, planned from indexed part lengths and rendered by the same plan.

Planning sees only lengths, so it costs microseconds and needs no text; rendering follows the plan and must come out at
exactly the planned length. What happens to a document, in this order:

1. every image changes places with the text part after it, with probability `1 - image_first`;
2. a plain document that is too long gives a window that begins at a part border; images are never cut, the text that
   crosses the end of the window is cut there. A chat is cut after the last reply that fits;
3. of the images of a window `max_images` are sampled, the others are left out and their text stays. An image that is
   left out takes no positions, so the window reaches as far as its text and any `max_images` images do. PAPER: §4.1
   samples up to five images with their captions; on a page, captions are sentences of its text. (In a chat the turns
   from the first image too many on are left out.)
4. a window with one image is kept with probability `keep_single_image`; a document with images whose window has none is
   rejected (paper appendix; Flamingo's procedure for M3W).

A sequence that does not reach the end of its document gets no end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np

from vlgpt.data.mixture import Draws, Purpose
from vlgpt.document import ROLES, Document, ImagePart
from vlgpt.errors import UserError
from vlgpt.settings import SourceSettings
from vlgpt.shards import ShardIndex
from vlgpt.tokens import DocumentTokenizer, Piece, Span, TokenSequence, flatten


@dataclass(frozen=True, slots=True)
class PartLengths:
    """The parts of one document: positions, kind and role of each."""

    lengths: Sequence[int]
    is_image: Sequence[bool]
    roles: bytes  # one byte per part, position in `vlgpt.document.ROLES`


class ShardLengths:
    """Part lengths of one shard in positions of the model, with running sums to answer for many samples at once."""

    def __init__(self, index: ShardIndex, *, image_length: int):
        self.part_start, self.is_image, self.roles = index.part_start, index.part_is_image, index.part_role
        self.lengths = np.where(index.part_is_image, image_length, index.part_tokens).astype(np.int32)
        self.length_before = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.images_before = np.concatenate([[0], np.cumsum(self.is_image, dtype=np.int64)])

    def parts(self, sample: int) -> PartLengths:
        """The parts of one sample."""
        at = slice(int(self.part_start[sample]), int(self.part_start[sample + 1]))
        return PartLengths(self.lengths[at].tolist(), self.is_image[at].tolist(), self.roles[at].tobytes())


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """What of a document becomes the sequence: part numbers in reading order, the last one perhaps cut."""

    parts: tuple[int, ...] = ()
    length: int = 0
    last_tokens: int | None = None  # tokens kept of the last part; None = all
    has_end: bool = True
    num_dropped_images: int = 0
    rejection: str = ""  # a word to count by; "" = accepted


class Assembler:
    """Plans and renders the sequences of one source."""

    def __init__(self, source: SourceSettings, *, tokenizer: DocumentTokenizer, sequence_length: int):
        self.source, self.tokenizer, self.sequence_length = source, tokenizer, sequence_length
        # Chats of the same roles share the lengths of their template, and counting those tokenises fixed text.
        self._fixed_lengths = lru_cache(maxsize=65_536)(self._count_fixed)
        self._plain_start = len(tokenizer.start_ids)
        self._plain_end = 1
        smallest = self._plain_start + self._plain_end + tokenizer.image_length
        if sequence_length < smallest:
            raise UserError(
                f"data.sequence_length is {sequence_length}: one image needs {smallest} positions "
                f"(num_visual is {tokenizer.num_visual})"
            )

    def _count_fixed(self, kinds: bytes) -> tuple[int, int]:
        """Fixed ids before the end of the last part and after it; `kinds` holds role and kind of every part."""
        roles = [ROLES[kind % len(ROLES)] for kind in kinds]
        pieces = self.tokenizer.pieces(roles, [kind >= len(ROLES) for kind in kinds])
        lengths = [len(piece.ids) for piece in pieces]
        after = _num_after(pieces)
        return sum(lengths[: len(lengths) - after]), sum(lengths[len(lengths) - after :])

    def whole_lengths(self, lengths: ShardLengths, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sequence lengths of the plain documents that are taken whole, and which are: (n,) -> (n,), (n,) bool.

        Agrees with `plan`; the others (length 0 here) need it.
        """
        first, last = lengths.part_start[samples], lengths.part_start[samples + 1]
        positions = lengths.length_before[last] - lengths.length_before[first]
        images = lengths.images_before[last] - lengths.images_before[first]
        total = positions + self._plain_start + self._plain_end
        is_whole = (positions > 0) & (total <= self.sequence_length) & (images <= self.source.max_images)
        if self.source.keep_single_image < 1:
            is_whole &= images != 1
        is_whole[is_whole] = lengths.roles[first[is_whole]] == ROLES.index("plain")
        return np.where(is_whole, total, 0), is_whole

    def plan(self, parts: PartLengths, draws: Draws) -> SequencePlan:
        """The sequence of one document; `rejection` says why there is none."""
        if not any(parts.lengths):
            return SequencePlan(rejection="empty")
        order = self._swapped(parts, draws)
        if parts.roles[0] != ROLES.index("plain"):
            return self._plan_chat(parts, order)
        return self._plan_plain(parts, order, draws)

    def _swapped(self, parts: PartLengths, draws: Draws) -> list[int]:
        order = list(range(len(parts.lengths)))
        if self.source.image_first >= 1:
            return order
        for i in range(len(order) - 1):
            is_pair = parts.is_image[i] and not parts.is_image[i + 1] and parts.roles[i] == parts.roles[i + 1]
            if is_pair and draws.uniform(Purpose.SWAP + i) >= self.source.image_first:
                order[i], order[i + 1] = i + 1, i
        return order

    def _plan_plain(self, parts: PartLengths, order: list[int], draws: Draws) -> SequencePlan:
        budget = self.sequence_length - self._plain_start - self._plain_end
        window = order[self._window_start(parts, order, budget, draws) :]
        chosen: list[int] = []
        images: list[int] = []
        used, last_tokens, has_end = 0, None, True
        for part in window:
            is_too_many = parts.is_image[part] and len(images) >= self.source.max_images
            length = 0 if is_too_many else parts.lengths[part]
            if used + length > budget:
                has_end = False
                if not parts.is_image[part] and used < budget:
                    chosen.append(part)
                    last_tokens, used = budget - used, budget
                break
            chosen.append(part)
            used += length
            if parts.is_image[part]:
                images.append(part)
        left_out: list[int] = []
        if len(images) > self.source.max_images:
            images.sort(key=lambda part: draws.uniform(Purpose.LEFT_OUT + part))
            left_out = images[self.source.max_images :]
            chosen = [part for part in chosen if part not in left_out]
        num_images = len(images) - len(left_out)
        if num_images == 0 and any(parts.is_image):
            return SequencePlan(rejection="no_image_in_window")
        if num_images == 1 and draws.uniform(Purpose.KEEP_SINGLE) >= self.source.keep_single_image:
            return SequencePlan(rejection="single_image")
        if used == 0:
            return SequencePlan(rejection="empty")
        length = self._plain_start + used + (self._plain_end if has_end else 0)
        return SequencePlan(tuple(chosen), length, last_tokens, has_end, len(left_out))

    def _window_start(self, parts: PartLengths, order: list[int], budget: int, draws: Draws) -> int:
        """Where the window begins: any part from which the rest still fills the window, or the first after those."""
        if self.source.start == "beginning" or sum(parts.lengths) <= budget:
            return 0
        # Starts from which the rest fills the window, and one more: with any part as a start many rows would be short.
        rest = list(accumulate(parts.lengths[part] for part in reversed(order)))[::-1]
        num_full = sum(length >= budget for length in rest)
        return draws.below(min(num_full + 1, len(order)), Purpose.START)

    def _plan_chat(self, parts: PartLengths, order: list[int]) -> SequencePlan:
        assistant = ROLES.index("assistant")
        roles, num_parts = parts.roles, len(order)
        is_reply_end = [
            roles[i] == assistant and (i + 1 == num_parts or roles[i + 1] != assistant)
            for i in range(num_parts)
        ]
        if not any(is_reply_end):
            return SequencePlan(rejection="no_target")
        kinds = bytes(roles[part] + len(ROLES) * parts.is_image[part] for part in order)
        best, used, num_images = SequencePlan(), 0, 0
        for i, part in enumerate(order):
            used += parts.lengths[part]
            num_images += parts.is_image[part]
            if num_images > self.source.max_images:
                return best if best.parts else SequencePlan(rejection="too_many_images")
            if not is_reply_end[i]:
                continue
            before, after = self._fixed_lengths(kinds[: i + 1])
            length = used + before + after
            if length > self.sequence_length:
                return best if best.parts else self._plan_cut_reply(parts, order[: i + 1], length - after)
            best = SequencePlan(tuple(order[: i + 1]), length)
        return best

    def _plan_cut_reply(self, parts: PartLengths, order: list[int], length: int) -> SequencePlan:
        """The first exchange alone is too long: cut its reply, if it ends with text. `length`: without its end."""
        kept = parts.lengths[order[-1]] - (length - self.sequence_length)
        if parts.is_image[order[-1]] or kept < 1:
            return SequencePlan(rejection="too_long")
        kept = min(kept, parts.lengths[order[-1]])
        total = length - parts.lengths[order[-1]] + kept
        return SequencePlan(tuple(order), total, kept, has_end=False)

    def spans(self, plan: SequencePlan, document: Document) -> list[Span]:
        """The spans of a plan: its tokens with their origin."""
        chosen = [document.parts[part] for part in plan.parts]
        roles = [part.role for part in chosen]
        pieces = self.tokenizer.pieces(roles, [isinstance(part, ImagePart) for part in chosen])
        # Without its end the last span is that of the last part, and only such a plan cuts it.
        spans = self.tokenizer.fill(
            pieces if plan.has_end else pieces[: len(pieces) - _num_after(pieces)], chosen
        )
        if plan.last_tokens is not None:
            last, kept = spans[-1], slice(plan.last_tokens)
            spans[-1] = replace(last, ids=last.ids[kept], is_target=last.is_target[kept])
        return spans

    def render(self, plan: SequencePlan, document: Document) -> TokenSequence:
        """The sequence of a plan: -> arrays (L,), and the image numbers of the document in reading order.

        Raises LengthMismatch when the text does not have the length that the plan was made from.
        """
        sequence = flatten(self.spans(plan, document))
        if len(sequence.token_ids) != plan.length:
            raise LengthMismatch(f"planned {plan.length} positions, rendered {len(sequence.token_ids)}")
        return sequence


class LengthMismatch(ValueError):
    """The indexed token lengths do not belong to this text."""


def _num_after(pieces: Sequence[Piece]) -> int:
    """How many pieces follow the last part of a document."""
    return next((n for n, piece in enumerate(reversed(pieces)) if piece.part is not None), len(pieces))
