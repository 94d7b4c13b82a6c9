"""A reply that is being generated, and the rules by which it may grow and ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vlgpt.decoding.api import DecodeSettings, Finish, Reply
from vlgpt.document import ImagePart, Role, TextPart
from vlgpt.tokens import PLACEHOLDER_ID, DocumentTokenizer


@dataclass
class Hypothesis:
    """What was chosen so far. An image is open from [IMG] until it has N embeddings; then [/IMG] is appended.

    `unread` holds tokens and embeddings that the model has not read yet: it predicts more when there are none.
    """

    prompt: int
    prompt_length: int
    token_ids: list[int] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)  # finished images, (N, d) each
    unread: list[int | Tensor] = field(default_factory=list)
    open_image: list[Tensor] | None = None  # embeddings (d,) of the unfinished image
    num_chosen: int = 0  # text tokens and [IMG]
    log_likelihood: float = 0.0
    finish: Finish | None = None
    stopped_by: str = ""

    def copy(self) -> Hypothesis:
        """An independent copy: beams that share a past grow apart."""
        return replace(self, token_ids=[*self.token_ids], visual=[*self.visual], unread=[*self.unread])

    @property
    def length(self) -> int:
        """Positions of prompt and reply."""
        return self.prompt_length + len(self.token_ids)


class ReplyRules:
    """Which tokens may come next, and what a chosen token does to a hypothesis."""

    def __init__(self, *, tokenizer: DocumentTokenizer, settings: DecodeSettings, max_length: int):
        self.tokenizer, self.settings, self.max_length = tokenizer, settings, max_length
        self.begin, self.end = tokenizer.begin_image_id, tokenizer.end_image_id
        self.num_visual = tokenizer.num_visual
        self.end_ids = tokenizer.reply_end_ids

    @property
    def num_end_tokens(self) -> int:
        return len({self.tokenizer.eos_id, self.end_ids[-1]})

    @cached_property
    def forbidden(self) -> list[int]:
        """Tokens that never belong into a reply: all control tokens but [IMG] and the end."""
        allowed = {self.tokenizer.eos_id, *self.end_ids, self.begin}
        if self.settings.images != "free":
            allowed.discard(self.begin)
        text_tokenizer = self.tokenizer.text_tokenizer
        added = {number for number, token in text_tokenizer.added_tokens_decoder.items() if token.special}
        return sorted({*text_tokenizer.all_special_ids, *added, self.begin, self.end} - allowed)

    def may_draw(self, hypothesis: Hypothesis) -> bool:
        """Whether [IMG] may come next. It is never the last token: an image is always finished."""
        has_room = hypothesis.length + self.tokenizer.image_length < self.max_length
        is_last = hypothesis.num_chosen + 1 >= self.settings.max_new_tokens
        return has_room and not is_last and len(hypothesis.visual) < self.settings.max_images

    def completes_end(self, hypothesis: Hypothesis) -> list[int]:
        """Tokens that would end this reply now."""
        head = list(self.end_ids[:-1])
        is_due = not head or hypothesis.token_ids[-len(head) :] == head
        return [self.tokenizer.eos_id, *([self.end_ids[-1]] if is_due else [])]

    def mask(self, log_probs: Tensor, hypotheses: list[Hypothesis]) -> Tensor:
        """-inf at what may not come next: (T, vocabulary), T hypotheses -> (T, vocabulary)."""
        masked = log_probs.clone()
        masked[:, self.tokenizer.num_tokens :] = -torch.inf
        masked[:, self.forbidden] = -torch.inf
        for row, hypothesis in enumerate(hypotheses):
            if self.settings.images == "free" and not self.may_draw(hypothesis):
                masked[row, self.begin] = -torch.inf
            if hypothesis.num_chosen < self.settings.min_new_tokens:
                masked[row, self.completes_end(hypothesis)] = -torch.inf
        return masked

    def choose(self, hypothesis: Hypothesis, token_id: int, log_prob: float) -> None:
        """Append a token; may open an image or finish the reply."""
        is_end = token_id in self.completes_end(hypothesis)
        hypothesis.token_ids.append(token_id)
        hypothesis.unread.append(token_id)
        hypothesis.num_chosen += 1
        hypothesis.log_likelihood += log_prob
        if token_id == self.begin:
            hypothesis.open_image = []
        elif is_end:
            hypothesis.finish = "end"
        elif stop := self._stop_string(hypothesis):
            hypothesis.finish, hypothesis.stopped_by = "stop", stop
        else:
            self._check_length(hypothesis)

    def _check_length(self, hypothesis: Hypothesis) -> None:
        is_long = (
            hypothesis.num_chosen >= self.settings.max_new_tokens or hypothesis.length >= self.max_length
        )
        if is_long and hypothesis.finish is None:
            hypothesis.finish = "length"

    def add_visual(self, hypothesis: Hypothesis, embedding: Tensor) -> None:
        """Append one predicted embedding (d,) to the open image. The last one closes the image with [/IMG] at once.

        With `images="force"` the next image is then opened, or the reply ends. A reply at its length limit ends.
        """
        assert hypothesis.open_image is not None
        hypothesis.open_image = [*hypothesis.open_image, embedding]
        hypothesis.token_ids.append(PLACEHOLDER_ID)
        hypothesis.unread.append(embedding)
        if len(hypothesis.open_image) < self.num_visual:
            return
        hypothesis.visual.append(torch.stack(hypothesis.open_image))
        hypothesis.open_image = None
        hypothesis.token_ids.append(self.end)
        hypothesis.unread.append(self.end)
        if self.settings.images == "force":
            self._force_image(hypothesis)
        self._check_length(hypothesis)

    def _force_image(self, hypothesis: Hypothesis) -> None:
        """The next image of an image-only reply, or its end."""
        if len(hypothesis.visual) == self.settings.max_images:
            hypothesis.finish = "end"
        else:
            self.open_image(hypothesis)

    def open_image(self, hypothesis: Hypothesis) -> None:
        """[IMG] that is given, not chosen: it adds nothing to the likelihood."""
        hypothesis.token_ids.append(self.begin)
        hypothesis.unread.append(self.begin)
        hypothesis.open_image = []

    def _stop_string(self, hypothesis: Hypothesis) -> str:
        """The stop string that comes first in the text since the last image, "" when there is none."""
        if not self.settings.stop:
            return ""
        text = self.decode(self._open_text(hypothesis.token_ids))
        found = [(text.find(stop), stop) for stop in self.settings.stop if stop in text]
        return min(found)[1] if found else ""

    def decode(self, token_ids: list[int]) -> str:
        """Text with its outer white space, in which a stop string may be."""
        return self.tokenizer.text_tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _open_text(self, token_ids: list[int]) -> list[int]:
        """Text tokens after the last image."""
        for at in range(len(token_ids) - 1, -1, -1):
            if token_ids[at] == self.end:
                return token_ids[at + 1 :]
        return token_ids

    def text_segments(self, hypothesis: Hypothesis) -> list[str]:
        """Text before, between and after the images: one more than there are images."""
        token_ids = hypothesis.token_ids
        if hypothesis.finish == "end":
            size = 1 if token_ids[-1] == self.tokenizer.eos_id else len(self.end_ids)
            token_ids = token_ids if token_ids[-1] == self.end else token_ids[:-size]
        segments: list[list[int]] = [[]]
        is_inside = False
        for token_id in token_ids:
            if token_id == self.begin:
                is_inside = True
                segments.append([])
            elif not is_inside:
                segments[-1].append(token_id)
            is_inside = is_inside and token_id != self.end
        texts = [self.decode(ids) for ids in segments]
        if hypothesis.stopped_by:
            texts[-1] = texts[-1].split(hypothesis.stopped_by)[0]
        return [text.strip() for text in texts]

    def reply(self, hypothesis: Hypothesis, *, role: Role) -> Reply:
        """The finished reply."""
        parts: list[TextPart | ImagePart] = []
        texts = self.text_segments(hypothesis)
        for number, text in enumerate(texts):
            if number:
                parts.append(ImagePart(number - 1, role))
            if text:
                parts.append(TextPart(text, role))
        return Reply(
            parts=tuple(parts),
            text=" ".join(text for text in texts if text),
            visual=tuple(visual.float().cpu() for visual in hypothesis.visual),
            token_ids=tuple(hypothesis.token_ids),
            finish=hypothesis.finish or "length",
            log_likelihood=hypothesis.log_likelihood,
        )
