"""FastAPI application: a request is read with limits, waits in the queue, and is answered whole or as events.

Decoding for a client that hangs up ends. Every error is JSON in OpenAI's form with a fitting status.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vlgpt.chat.batching import Batcher, QueueFull, ShuttingDown
from vlgpt.chat.dialogue import MAX_PIXELS, Dialogue
from vlgpt.chat.reply import Drawn, Event, Failed, Finished, Notice, TextPiece
from vlgpt.chat.reply import Request as ReplyRequest
from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.generator import Generator
from vlgpt.errors import UserError
from vlgpt.files import JsonObject
from vlgpt.server import protocol
from vlgpt.server.metrics import Metrics

STATUS = {"bad_request": 400, "timeout": 504, "cancelled": 499, "unavailable": 503, "internal": 500}
HEARTBEAT_S = 1.0  # a comment is sent that often to streams that wait: a client that has gone is noticed


@dataclass(frozen=True)
class ServerLimits:
    """What a request may cost."""

    max_body_bytes: int = 20 << 20
    max_pictures: int = 16
    max_pixels: int = MAX_PIXELS
    max_new_tokens: int = 256
    max_batch: int = 8
    max_waiting: int = 32
    timeout_s: float = 120.0
    read_timeout_s: float = 20.0


class HTTPFailure(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def response(self) -> JSONResponse:
        """JSON error in OpenAI's form, with the status and the headers of this failure."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        record = protocol.error_record(self.message, kind=kind, code=self.code)
        return JSONResponse(record, status_code=self.status, headers=dict(self.headers or {}))


class ChatServer:
    """What the routes share: the queue, the counters, the name of the model."""

    def __init__(self, generator: Generator, *, model_name: str, limits: ServerLimits):
        self.generator, self.model_name, self.limits = generator, model_name, limits
        self.metrics = Metrics()
        self.batcher = Batcher(
            generator,
            max_batch=limits.max_batch,
            max_waiting=limits.max_waiting,
            on_batch=self.metrics.observe_batch,
        )
        self.created = int(time.time())
        self._numbers = itertools.count(1)
        self._num_reading = 0
        self.metrics.watch("vlgpt_waiting", "Requests in the queue", lambda: self.batcher.num_waiting)
        self.metrics.watch("vlgpt_running", "Requests being decoded", lambda: self.batcher.num_running)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        try:
            asked, pending = await self._accept(request)
        except HTTPFailure as failure:
            self.metrics.requests.labels(f"status_{failure.status}").inc()
            return failure.response()
        name = f"chatcmpl-{next(self._numbers)}"
        if asked.stream:
            chunks = self._stream(name, asked, pending)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return await self._whole(name, request, pending)

    async def _accept(self, request: Request) -> tuple[protocol.ChatRequest, Pending]:
        """Read, check and queue a request. Raises HTTPFailure."""
        if self._num_reading >= self.limits.max_waiting:
            raise HTTPFailure(429, "too many requests at once", "queue_full", {"Retry-After": "1"})
        self._num_reading += 1
        try:
            body = await _read_body(request, self.limits)
            # images are decoded in a thread: others are served meanwhile
            asked, dialogue, settings = await asyncio.to_thread(self._read, body)
        finally:
            self._num_reading -= 1
        pending = Pending(asyncio.get_running_loop())
        pending.request = ReplyRequest(dialogue, settings, pending.emit, timeout_s=self.limits.timeout_s)
        try:
            self.batcher.submit(pending.request)
        except QueueFull as full:
            raise HTTPFailure(
                429, str(full), "queue_full", {"Retry-After": str(full.retry_after_s)}
            ) from full
        except ShuttingDown as closed:
            raise HTTPFailure(503, str(closed), "unavailable", {"Retry-After": "30"}) from closed
        return asked, pending

    def _read(self, body: bytes) -> tuple[protocol.ChatRequest, Dialogue, DecodeSettings]:
        limits = self.limits
        try:
            asked = protocol.read_request(body)
            if asked.model not in (None, self.model_name):
                raise HTTPFailure(
                    404,
                    f"model {asked.model!r} is not served here, {self.model_name!r} is",
                    "model_not_found",
                )
            settings = asked.settings(
                default_tokens=min(limits.max_new_tokens, self.generator.max_length // 4),
                max_new_tokens=limits.max_new_tokens,
                has_decoder=self.generator.decoder is not None,
            )
            dialogue = protocol.to_dialogue(
                asked.messages, max_pictures=limits.max_pictures, max_pixels=limits.max_pixels
            )
        except UserError as error:
            raise HTTPFailure(400, str(error), "bad_request") from error
        return asked, dialogue, settings

    async def _whole(self, name: str, request: Request, pending: Pending) -> Response:
        """One JSON object; decoding ends when the client hangs up."""
        notices: list[str] = []
        leaving = asyncio.create_task(_disconnect(request))
        try:
            async for event in pending.events(self.limits.timeout_s, until=leaving):
                if isinstance(event, Notice):
                    notices.append(event.text)
                elif isinstance(event, Failed):
                    self._count(event, pending)
                    headers = {"Retry-After": "30"} if event.kind == "unavailable" else None
                    return HTTPFailure(STATUS[event.kind], event.message, event.kind, headers).response()
                elif isinstance(event, Finished):
                    self._count(event, pending)
                    return JSONResponse(protocol.completion(name, self.model_name, event, notices))
        finally:
            pending.request.cancel()
            leaving.cancel()
        raise AssertionError("unreachable: every request ends with Failed or Finished")

    async def _stream(self, name: str, asked: protocol.ChatRequest, pending: Pending) -> AsyncIterator[bytes]:
        """Server-sent events: chunks, then [DONE]."""
        num_pictures = 0
        last: Event | None = None
        try:
            yield self._chunk(name, {"role": "assistant", "content": ""})
            async for event in pending.events(self.limits.timeout_s, heartbeat_s=HEARTBEAT_S):
                last = event
                if event is None:
                    yield b": waiting\n\n"
                elif isinstance(event, TextPiece):
                    yield self._chunk(name, {"content": event.text})
                elif isinstance(event, Drawn):
                    part = protocol.picture_part(event.picture, index=num_pictures)
                    num_pictures += 1
                    yield self._chunk(name, {"images": [part]})
                elif isinstance(event, Notice):
                    yield f": {event.text}\n\n".encode()
                elif isinstance(event, Failed):
                    kind = "invalid_request_error" if event.kind == "bad_request" else "server_error"
                    yield _event(protocol.error_record(event.message, kind=kind, code=event.kind))
                else:
                    reason = protocol.FINISH_REASONS[event.finish]
                    yield self._chunk(name, {}, finish_reason=reason)
                    if asked.has_usage_chunk:
                        tail = protocol.chunk(name, self.model_name, {})
                        yield _event({**tail, "choices": [], "usage": protocol.usage(event)})
            yield b"data: [DONE]\n\n"
        finally:
            pending.request.cancel()
            is_whole = isinstance(last, (Failed, Finished))
            self._count(last if is_whole and last else Failed("cancelled", ""), pending)

    def _chunk(self, name: str, delta: JsonObject, *, finish_reason: str | None = None) -> bytes:
        return _event(protocol.chunk(name, self.model_name, delta, finish_reason=finish_reason))

    def _count(self, event: Event, pending: Pending) -> None:
        if isinstance(event, Failed):
            self.metrics.requests.labels(event.kind).inc()
        elif isinstance(event, Finished):
            self.metrics.requests.labels("answered").inc()
            self.metrics.seconds.observe(time.monotonic() - pending.request.created_s)
            self.metrics.prompt_positions.inc(event.num_prompt_positions)
            self.metrics.reply_positions.inc(event.num_reply_positions)
            self.metrics.pictures.inc(len(event.turn.pictures))


class Pending:
    """The bridge from the thread that decodes to the event loop."""

    request: ReplyRequest

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        """Pass an event from the decoding thread to the request's event loop; a closed loop drops it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def events(
        self, timeout_s: float, *, heartbeat_s: float | None = None, until: asyncio.Task | None = None
    ) -> AsyncIterator[Event | None]:
        """Events to the last one, None for a heartbeat. Ends with Failed after the timeout, or when `until` is done."""
        end = time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            wait_s = left if heartbeat_s is None else min(left, heartbeat_s)
            getting = asyncio.ensure_future(self._queue.get())
            waited = {getting} if until is None else {getting, until}
            try:
                await asyncio.wait(waited, timeout=max(0.0, wait_s), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getting.done():
                    getting.cancel()
            if getting.done() and not getting.cancelled():
                event = getting.result()
                yield event
                if isinstance(event, (Finished, Failed)):
                    return
            elif until is not None and until.done():
                yield Failed("cancelled", "the client has gone")
                return
            elif time.monotonic() >= end:
                yield Failed("timeout", f"no reply within {timeout_s:g} s")
                return
            else:
                yield None


def _event(record: JsonObject) -> bytes:
    return b"data: " + json.dumps(record, ensure_ascii=False).encode() + b"\n\n"


async def _disconnect(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, limits: ServerLimits) -> bytes:
    """The whole body. Raises HTTPFailure for another media type, too many bytes, or a client that is too slow."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPFailure(415, f"content-type is {media_type!r}, wanted application/json", "media_type")
    too_large = HTTPFailure(413, f"the body is larger than {limits.max_body_bytes} bytes", "too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.max_body_bytes:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > limits.max_body_bytes:
                raise too_large

    try:
        await asyncio.wait_for(read(), limits.read_timeout_s)
    except ClientDisconnect as error:
        raise HTTPFailure(499, "the client has gone", "cancelled") from error
    except TimeoutError as error:
        raise HTTPFailure(
            408, f"the body did not arrive within {limits.read_timeout_s:g} s", "slow"
        ) from error
    return bytes(body)


def create_app(generator: Generator, *, model_name: str, limits: ServerLimits | None = None) -> FastAPI:
    """The application. It owns a thread that decodes; the thread ends with the application."""
    server = ChatServer(generator, model_name=model_name, limits=limits or ServerLimits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.batcher.close)

    app = FastAPI(title="vlgpt", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server

    async def chat(request: Request) -> Response:
        return await server.chat(request)

    schema = {"content": {"application/json": {"schema": protocol.ChatRequest.model_json_schema()}}}
    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        response_model=None,
        openapi_extra={"requestBody": schema},
    )

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return HTTPFailure(error.status_code, str(error.detail), "not_found", error.headers).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return HTTPFailure(500, "the server failed; its log tells why", "internal").response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": model_name, "object": "model", "created": server.created, "owned_by": "vlgpt"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> Response:
        is_alive = server.batcher.is_alive
        record = {"status": "ok" if is_alive else "down", "waiting": server.batcher.num_waiting}
        return JSONResponse(record, status_code=200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=server.metrics.content_type)

    return app


def serve(app: FastAPI, *, host: str, port: int) -> None:
    """Run until interrupted."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10)
