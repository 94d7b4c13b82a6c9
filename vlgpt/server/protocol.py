"""What travels over HTTP: OpenAI's chat messages, read into a `Dialogue`, and replies written as them.

Images travel as data: URLs in `image_url` parts, both ways; no address is ever fetched. A reply holds its text in
`content` as clients expect, its images in `images`, and both in reading order in `parts`.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlgpt.chat.dialogue import Content, Dialogue, Picture, Speaker, Turn
from vlgpt.chat.reply import Finished
from vlgpt.decoding.api import DecodeSettings
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.images import data_uri

DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp|gif|bmp|tiff);base64,", re.ASCII)
FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}


StopText = Annotated[str, Field(max_length=128)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageURL(_Strict):
    """`detail` is accepted and has no effect: every image becomes N embeddings."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImageContent(_Strict):
    """An image as a data: URL."""

    type: Literal["image_url"]
    image_url: ImageURL


class TextContent(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


ContentPart = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class Message(_Strict):
    """One turn. Messages of this API's replies can be sent back as they are."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart] | None = None
    images: list[ImageContent] | None = None
    parts: list[ContentPart] | None = None
    refusal: None = None

    @property
    def reading_order(self) -> list[TextContent | ImageContent]:
        """`parts` when given, else `content` and then `images`."""
        if self.parts is not None:
            return self.parts
        text = (
            [TextContent(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        )
        return [*(text or ()), *(self.images or ())]


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk with the number of tokens."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """POST /v1/chat/completions. Unlike OpenAI's, `temperature` 0 (greedy) is the default.

    `top_k`, `num_beams`, `max_images`, `visual_guidance` and `decoder_guidance` are additions, see DecodeSettings.
    """

    messages: list[Message] = Field(min_length=1, max_length=1024)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    modalities: list[Literal["text", "image"]] | None = Field(None, min_length=1)
    temperature: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    num_beams: int = Field(1, ge=1, le=8)
    stop: StopText | list[StopText] | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    max_images: int = Field(1, ge=1, le=8)
    visual_guidance: float = Field(1.0, ge=0, le=50, allow_inf_nan=False)
    decoder_guidance: float | None = Field(None, ge=0, le=50, allow_inf_nan=False)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    logprobs: Literal[False] = False
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    user: str | None = None

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, *, default_tokens: int, max_new_tokens: int, has_decoder: bool) -> DecodeSettings:
        """Settings of the reply. Raises UserError for more tokens than allowed or impossible combinations."""
        wanted = self.max_completion_tokens or self.max_tokens or default_tokens
        if wanted > max_new_tokens:
            raise UserError(f"max_tokens is {wanted}, this server gives at most {max_new_tokens}")
        kinds = set(self.modalities or (("text", "image") if has_decoder else ("text",)))
        images: Literal["free", "never", "force"] = "free"
        if kinds == {"text"}:
            images = "never"
        elif kinds == {"image"}:
            images = "force"
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4:
            raise UserError(f"stop has {len(stop)} strings, wanted at most 4")
        return DecodeSettings(
            max_new_tokens=wanted,
            num_beams=self.num_beams,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=stop,
            images=images,
            max_images=self.max_images,
            visual_guidance=self.visual_guidance,
            seed=self.seed,
            guidance=self.decoder_guidance,
        )


def read_request(body: bytes) -> ChatRequest:
    """Raises UserError that names the field and what is wrong with it."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise UserError(f"{where}: {first['msg']}") from error


def to_dialogue(messages: Sequence[Message], *, max_pictures: int, max_pixels: int) -> Dialogue:
    """Messages -> the conversation; those in a row by one speaker are one turn. Raises UserError."""
    turns: list[Turn] = []
    num_pictures = 0
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if message.role in ("system", "developer"):
            raise UserError(
                f"{where}: this model's chat template has a fixed system message; put instructions "
                "into the first user message"
            )
        content: list[Content] = []
        for at, part in enumerate(message.reading_order):
            if isinstance(part, TextContent):
                content += [part.text] if part.text.strip() else []
                continue
            num_pictures += 1
            if num_pictures > max_pictures:
                raise UserError(f"{where}: more than {max_pictures} pictures in one request")
            content.append(_read_picture(part.image_url.url, f"{where}.{at}", max_pixels))
        speaker: Speaker = "user" if message.role == "user" else "assistant"
        if turns and turns[-1].speaker == speaker:
            content = [*turns.pop().content, *content]
        turns.append(Turn(speaker, tuple(content)))
    if turns[-1].speaker != "user":
        raise UserError("the last message is the assistant's: a reply needs a user message to answer")
    return Dialogue(tuple(turns))


def _read_picture(url: str, where: str, max_pixels: int) -> Picture:
    head = DATA_URL.match(url)
    if head is None:
        raise UserError(
            f"{where}: image_url must be data:image/png;base64,... (or jpeg, webp, gif, bmp, tiff); "
            f"found {url[:40]!r}. No address is fetched"
        )
    try:
        data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: the base64 of the picture is damaged: {error}") from error
    return Picture.read(data, name=where, max_pixels=max_pixels)


def picture_part(picture: Picture, **more: Any) -> JsonObject:
    """An image of a reply as a content part."""
    return {"type": "image_url", **more, "image_url": {"url": data_uri(picture.data)}}


def usage(finished: Finished) -> dict[str, int]:
    """Positions in the model's context, those of images included."""
    prompt, reply = finished.num_prompt_positions, finished.num_reply_positions
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def completion(name: str, model: str, finished: Finished, notices: Sequence[str]) -> JsonObject:
    """The reply to a request that does not stream."""
    turn = finished.turn
    parts = [
        {"type": "text", "text": item} if isinstance(item, str) else picture_part(item)
        for item in turn.content
    ]
    message = {
        "role": "assistant",
        "content": turn.text,
        "images": [part for part in parts if part["type"] == "image_url"],
        "parts": parts,
    }
    choice = {"index": 0, "message": message, "finish_reason": FINISH_REASONS[finished.finish]}
    more = {"usage": usage(finished), "notices": list(notices)}
    return {**_envelope(name, model, "chat.completion"), "choices": [choice], **more}


def chunk(name: str, model: str, delta: JsonObject, *, finish_reason: str | None = None) -> JsonObject:
    """One piece of a streamed reply."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {**_envelope(name, model, "chat.completion.chunk"), "choices": [choice]}


def _envelope(name: str, model: str, kind: str) -> JsonObject:
    """What every record of a reply begins with."""
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def error_record(message: str, *, kind: str, code: str) -> JsonObject:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
