"""Text of replies under way, handed out as soon as it cannot change any more."""

from __future__ import annotations

from vlgpt.decoding.api import Listener
from vlgpt.decoding.hypothesis import Hypothesis, ReplyRules

UNFINISHED = "\ufffd"  # what decoders write for the first bytes of a character


class TextStreams:
    """Tells a listener about new text and finished images, in reading order.

    Text is held back while it ends in half a character, in white space (the reply's text is stripped), or in
    the beginning of a stop string or of the closing string of a turn. The pieces of a reply, a space put
    between two of its text parts, add up to `Reply.text`.
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
