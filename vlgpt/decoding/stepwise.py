"""Greedy decoding and sampling: all replies advance together, each in its text or inside an image.

New text and finished images are handed to a `Listener` as soon as they cannot change any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vlgpt import seeds
from vlgpt.decoding.api import DecodeSettings, Listener
from vlgpt.decoding.cache import RenderedPrompt, Stream
from vlgpt.decoding.hypothesis import Hypothesis, ReplyRules

# A temperature below is greedy: dividing by it would leave no finite score.
COLDEST = 1e-3
# What decoders write for the first bytes of a character.
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Hooks:
    """transformers' logits processors and stopping criteria; they see one row: ids (1, L), scores (1, V).

    Both are on the device of the scores: processors index one with the other.
    """

    process: Callable[[Tensor, Tensor], Tensor] | None = None
    should_stop: Callable[[Tensor], bool] | None = None
    on_token: Callable[[int], None] | None = None

    def processed(
        self, scores: Tensor, prompts: Sequence[RenderedPrompt], writers: Sequence[Hypothesis]
    ) -> Tensor:
        """Scores after transformers' processors: (T, vocabulary), T writers -> (T, vocabulary)."""
        if self.process is None:
            return scores
        seen = [ids_of(prompts[writer.prompt], writer, scores.device) for writer in writers]
        return torch.cat([self.process(ids, scores[row : row + 1]) for row, ids in enumerate(seen)])


class TokenChooser:
    """The most likely token, or a draw from the addressed generator of each prompt: one number per token."""

    def __init__(self, *, settings: DecodeSettings, addresses: Sequence[str]):
        self.is_greedy = settings.temperature < COLDEST
        self.warpers = LogitsProcessorList()
        if self.is_greedy:
            return
        self.generators = [seeds.generator(settings.seed, "reply", address) for address in addresses]
        if settings.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, scores: Tensor, prompts: Sequence[int]) -> list[int]:
        """(T, vocabulary) masked log-probabilities of these prompts -> T token ids."""
        if self.is_greedy:
            return scores.argmax(-1).tolist()
        nothing: Any = torch.empty(len(scores), 0, dtype=torch.long)  # the warpers look at no token ids
        probabilities = self.warpers(nothing, scores).double().softmax(-1)
        cumulative = probabilities.cumsum(-1)
        # One number per token and prompt, inverted through the distribution: torch.multinomial would draw from one
        # generator for the batch, so that a reply would depend on its neighbours.
        draws = np.array([self.generators[prompt].random() for prompt in prompts])
        heights = torch.from_numpy(draws * (1 - 1e-12)).to(scores.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, heights, right=True)[:, 0]
        return chosen.clamp(
            max=scores.shape[-1] - 1
        ).tolist()  # scores that are not finite would give one more


class TextStreams:
    """Tells a listener about new text and finished images, in reading order.

    Text is held back while it ends in half a character, in white space (the reply's text is stripped), or in the
    beginning of a stop string or of the closing string of a turn. The pieces of a reply, a space put between two of its
    text parts, add up to `Reply.text`.
    """

    def __init__(self, *, rules: ReplyRules, listener: Listener):
        self.rules, self.listener = rules, listener
        self._sent: dict[int, list[int]] = {}  # per prompt: characters sent of every text segment
        self._num_images: dict[int, int] = {}

    def update(self, hypothesis: Hypothesis) -> None:
        """Look at a hypothesis after it has grown."""
        if self.listener.text is not None:
            self._update_text(hypothesis)
        known = self._num_images.get(hypothesis.prompt, 0)
        if self.listener.image is not None:
            for visual in hypothesis.visual[known:]:
                self.listener.image(hypothesis.prompt, visual.float().cpu())
        self._num_images[hypothesis.prompt] = len(hypothesis.visual)

    def _update_text(self, hypothesis: Hypothesis) -> None:
        if hypothesis.open_image:
            return
        assert self.listener.text is not None
        sent = self._sent.setdefault(hypothesis.prompt, [])
        segments = self.rules.text_segments(hypothesis)
        is_open = hypothesis.finish is None and hypothesis.open_image is None
        for number, text in enumerate(segments):
            if number == len(sent):
                sent.append(0)
            stable = self._stable_length(text) if is_open and number == len(segments) - 1 else len(text)
            if stable > sent[number]:
                is_first_of_part = sent[number] == 0 and any(sent[:number])
                piece = text[sent[number] : stable]
                sent[number] = stable
                self.listener.text(hypothesis.prompt, f" {piece}" if is_first_of_part else piece)

    def _stable_length(self, text: str) -> int:
        """How much of a growing text is final."""
        length = len(text.rstrip(UNFINISHED))
        tails = [*self.rules.settings.stop, self.rules.tokenizer.reply_end_text]
        for stop in tails:
            held = next(
                (n for n in range(min(len(stop) - 1, length), 0, -1) if text[:length].endswith(stop[:n])), 0
            )
            length = min(length, len(text) - held) if held else length
        return len(text[:length].rstrip())


def decode_stepwise(
    stream: Stream,
    prompts: Sequence[RenderedPrompt],
    hypotheses: Sequence[Hypothesis],
    *,
    rules: ReplyRules,
    listener: Listener,
    hooks: Hooks,
) -> None:
    """Let every hypothesis grow until it is finished; row r of the stream belongs to hypothesis r."""
    chooser = TokenChooser(settings=rules.settings, addresses=[prompt.address for prompt in prompts])
    texts = TextStreams(rules=rules, listener=listener)
    live = list(hypotheses)
    while True:
        extend_images(stream, live, rules=rules)
        _extend_texts(stream, live, prompts, rules=rules, chooser=chooser, hooks=hooks)
        for hypothesis in live:
            if listener.is_cancelled is not None and listener.is_cancelled(hypothesis.prompt):
                hypothesis.finish = hypothesis.finish or "length"
            texts.update(hypothesis)
        kept = [row for row, hypothesis in enumerate(live) if hypothesis.finish is None]
        if not kept:
            return
        stream.select(kept)
        live = [live[row] for row in kept]
        stream.advance([hypothesis.unread.pop(0) for hypothesis in live])


def extend_images(stream: Stream, live: Sequence[Hypothesis], *, rules: ReplyRules) -> None:
    """Predict the next embedding of every open image that has been read so far."""
    rows = [row for row, h in enumerate(live) if h.open_image is not None and not h.unread]
    if rows:
        for row, embedding in zip(rows, stream.predict_visual(rows)):
            rules.add_visual(live[row], embedding)


def _extend_texts(
    stream: Stream,
    live: Sequence[Hypothesis],
    prompts: Sequence[RenderedPrompt],
    *,
    rules: ReplyRules,
    chooser: TokenChooser,
    hooks: Hooks,
) -> None:
    """Choose the next token of every row that has read all and is in its text."""
    rows = [row for row, h in enumerate(live) if h.open_image is None and not h.unread]
    if not rows:
        return
    writers = [live[row] for row in rows]
    hidden = stream.hidden if len(rows) == len(live) else stream.hidden[rows]
    log_probs = stream.lm.logits(hidden).float().log_softmax(-1)
    scores = hooks.processed(rules.mask(log_probs, writers), prompts, writers)
    chosen = chooser(scores, [writer.prompt for writer in writers])
    values = log_probs[range(len(chosen)), chosen].tolist()
    for writer, token_id, value in zip(writers, chosen, values):
        rules.choose(writer, token_id, value)
        if hooks.on_token is not None:
            hooks.on_token(token_id)
        if hooks.should_stop is not None:
            is_done = hooks.should_stop(ids_of(prompts[writer.prompt], writer, scores.device))
            writer.finish = writer.finish or ("stop" if is_done else None)


def ids_of(prompt: RenderedPrompt, hypothesis: Hypothesis, device: torch.device) -> Tensor:
    """Prompt and reply as transformers sees them: (1, L) int64."""
    return torch.tensor([[*prompt.token_ids.tolist(), *hypothesis.token_ids]], device=device)
