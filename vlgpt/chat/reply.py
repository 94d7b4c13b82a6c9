"""Requests -> replies: prompts of several conversations are answered together, each hears of its own reply only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlgpt.chat.dialogue import Dialogue, Picture, Turn, reply_turn
from vlgpt.decoding.api import DecodeSettings, Finish, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.decoding.prompts import prompt_length, split_exchanges
from vlgpt.errors import UserError
from vlgpt.log import get_logger

logger = get_logger("chat")


@dataclass(frozen=True)
class TextPiece:
    """New text; the pieces of a reply add up to its text."""

    text: str


@dataclass(frozen=True)
class Drawn:
    """A finished image."""

    picture: Picture


@dataclass(frozen=True)
class Notice:
    """Something the user should know, such as turns that no longer fit into the context."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The whole reply; the last event."""

    turn: Turn
    finish: Finish
    num_prompt_positions: int
    num_reply_positions: int


@dataclass(frozen=True)
class Failed:
    """No reply; the last event. `kind`: bad_request, timeout, cancelled, unavailable or internal."""

    kind: str
    message: str


Event = TextPiece | Drawn | Notice | Finished | Failed


@dataclass(eq=False)
class Request:
    """One reply that is wanted. `emit` is called from the thread that decodes, for every event.

    `settings.seed` addresses the noise of words and of images.
    """

    dialogue: Dialogue
    settings: DecodeSettings
    emit: Callable[[Event], None]
    timeout_s: float = float("inf")
    created_s: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits any more: decoding ends at the next step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def batch_key(self) -> DecodeSettings:
        """Requests of equal key can be decoded together: drawing comes later, and greedy words need no seed."""
        decoding = replace(self.settings, guidance=None)
        return replace(decoding, seed=0) if decoding.temperature == 0 else decoding

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.created_s > self.timeout_s

    @property
    def failure(self) -> Failed | None:
        """Why this request needs no reply, if so."""
        if self.is_cancelled:
            return Failed("cancelled", "the request was cancelled")
        if self.is_late:
            return Failed("timeout", f"no reply within {self.timeout_s:g} s")
        return None


def answer(generator: Generator, requests: Sequence[Request]) -> None:
    """Reply to requests of one `batch_key`. Each gets exactly one last event; a bad one spoils no other."""
    prepared = [(request, prompt) for request in requests if (prompt := _prepare(generator, request))]
    if not prepared:
        return
    ready, prompts = zip(*prepared)
    drawn: list[list[Picture]] = [[] for _ in ready]

    def on_image(number: int, visual: Tensor) -> None:
        if ready[number].failure is None:
            picture = _draw(generator, ready[number], visual, len(drawn[number]))
            drawn[number].append(picture)
            ready[number].emit(Drawn(picture))

    try:
        replies = generator.generate(
            prompts,
            ready[0].batch_key,
            on_text=lambda number, piece: ready[number].emit(TextPiece(piece)),
            on_image=on_image,
            is_cancelled=lambda number: ready[number].failure is not None,
        )
    except UserError as error:
        _fail(ready, Failed("bad_request", str(error)))
        return
    except Exception:  # the thread that decodes must live on, whatever torch throws
        logger.exception("a batch of %d replies failed", len(ready))
        _fail(ready, Failed("internal", "the reply failed; the server's log tells why"))
        return
    for request, prompt, reply, pictures in zip(ready, prompts, replies, drawn):
        if request.failure is not None:
            request.emit(request.failure)
            continue
        length = prompt_length(prompt.document, tokenizer=generator.tokenizer)
        turn = reply_turn(reply, pictures)
        request.emit(Finished(turn, reply.finish, length, len(reply.token_ids)))


def _fail(requests: Sequence[Request], failed: Failed) -> None:
    for request in requests:
        request.emit(request.failure or failed)


def _prepare(generator: Generator, request: Request) -> Prompt | None:
    """The prompt, trimmed to the context, its images encoded; None when the request has failed."""
    if request.failure is not None:
        request.emit(request.failure)
        return None
    try:
        if generator.decoder is None and request.settings.images != "never":
            raise UserError("this model has no picture decoder: ask for a reply of text only")
        whole = request.dialogue.prompt()
        prompt = generator.trim(whole, request.settings)
        if prompt.images:
            visual = generator.tokenize(prompt.images)
            prompt = replace(prompt, images=tuple(("visual", embeddings) for embeddings in visual))
    except ValueError as error:  # UserError and BadImage
        request.emit(Failed("bad_request", str(error)))
        return None
    except Exception:  # the decoding thread lives on here too
        logger.exception("a prompt could not be prepared")
        request.emit(Failed("internal", "the reply failed; the server's log tells why"))
        return None
    num_exchanges, num_kept = (len(split_exchanges(p.document.parts)) for p in (whole, prompt))
    if num_dropped := num_exchanges - num_kept:
        request.emit(Notice(f"The context is full: the oldest {num_dropped} exchanges are no longer read."))
    return prompt


def _draw(generator: Generator, request: Request, visual: Tensor, number: int) -> Picture:
    """One image at a time: it depends on nothing but its embeddings and the seed."""
    address = (request.settings.seed, "draw", number)
    (image,) = generator.draw(torch.stack([visual]), seeds=[address], guidance=request.settings.guidance)
    return Picture.drawn(image, visual)
