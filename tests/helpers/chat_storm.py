"""Many clients at once against the HTTP API: good ones, those that hang up, and those that send nonsense."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import numpy as np

from tests.helpers.chat_parts import picture_bytes
from vlgpt.chat.dialogue import Dialogue, Picture
from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.generator import Generator

SENTENCE = "quick brown fox draws three blue circles beside a lazy elephant what is in the picture please"
WORDS = SENTENCE.split()
SETTINGS = DecodeSettings(max_new_tokens=10, max_images=1)
MALFORMED = {
    "not json": (b'{"messages": [', 400),
    "no messages": (b"{}", 400),
    "unknown field": (b'{"messages": [{"role": "user", "content": "x"}], "tmperature": 1}', 400),
    "wrong type": (b'{"messages": [{"role": "user", "content": 3}]}', 400),
    "bad url": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}]}',
        400,
    ),
    "bad picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", '
        b'"image_url": {"url": "data:image/png;base64,AAAA"}}]}]}',
        400,
    ),
    "binary": (bytes(range(256)), 400),
}


@dataclass
class Case:
    """A request with a picture of its own, and the only right reply to it."""

    body: dict
    text: str
    num_pictures: int


@dataclass
class Outcome:
    """What a storm saw."""

    statuses: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)
    max_waiting: int = 0


def cases(generator: Generator, count: int) -> list[Case]:
    """Requests whose replies differ, with the replies that the generator gives when asked directly, one by one."""
    import base64

    found = []
    for number in range(count):
        random = np.random.default_rng(number)
        text = " ".join(random.choice(WORDS, int(random.integers(2, 12))))
        data = picture_bytes(number)
        url = "data:image/png;base64," + base64.b64encode(data).decode()
        content: list = [{"type": "text", "text": text}]
        dialogue_content: list = [text]
        if number % 2:
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
            dialogue_content.insert(0, Picture(data))
        reply = generator.generate([Dialogue().asking(*dialogue_content).prompt()], SETTINGS)[0]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 10}
        found.append(Case(body, reply.text, len(reply.visual)))
    return found


async def ask(client: httpx.AsyncClient, case: Case, outcome: Outcome, *, is_streaming: bool) -> None:
    """A good client: comes back when it is told to, and checks the reply."""
    body = {**case.body, "stream": is_streaming}
    for _ in range(200):
        response = await client.post("/v1/chat/completions", json=body)
        outcome.statuses[response.status_code] += 1
        if response.status_code != 429:
            break
        assert int(response.headers["retry-after"]) >= 1
        await asyncio.sleep(0.05)  # impatient: the test is to be short
    if response.status_code != 200:
        outcome.wrong.append((response.status_code, response.text))
        return
    if is_streaming:
        text, pictures = read_stream(response.text)
    else:
        message = response.json()["choices"][0]["message"]
        text, pictures = message["content"], message["images"]
    if (text, len(pictures)) != (case.text, case.num_pictures):
        outcome.wrong.append((text, case.text))


def read_stream(body: str) -> tuple[str, list]:
    """Server-sent events -> the text and the pictures."""
    lines = [line for line in body.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", body[-200:]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    text = "".join(delta.get("content", "") for delta in deltas)
    return text, [picture for delta in deltas for picture in delta.get("images", [])]


async def hang_up(address: str, case: Case, *, after_s: float, is_streaming: bool, is_half: bool) -> None:
    """A client that leaves before its reply, or before its request is whole."""
    parts = urlsplit(address)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps({**case.body, "stream": is_streaming}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(
        f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + (body[: len(body) // 2] if is_half else body)
    )
    await writer.drain()
    await asyncio.sleep(after_s)
    writer.transport.abort()


async def send_nonsense(client: httpx.AsyncClient, name: str, outcome: Outcome) -> None:
    """A client whose body is malformed must hear a 4xx that says what is wrong."""
    body, wanted = MALFORMED[name]
    for _ in range(200):
        response = await client.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        outcome.statuses[response.status_code] += 1
        if response.status_code != 429:
            break
        await asyncio.sleep(0.05)
    message = response.json()["error"]["message"]
    if response.status_code != wanted or len(message) < 10:
        outcome.wrong.append((name, response.status_code, message))


async def storm(address: str, known: list[Case], *, num_clients: int, seed: int, outcome: Outcome) -> None:
    """`num_clients` at once: 60 % good, 20 % hang up, 20 % send nonsense."""
    random = np.random.default_rng(seed)
    limits = httpx.Limits(max_connections=num_clients)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        jobs = []
        for number in range(num_clients):
            case = known[int(random.integers(len(known)))]
            is_streaming = bool(random.integers(2))
            if number % 5 == 0:
                wait_s, is_half = float(random.uniform(0, 0.3)), bool(random.integers(4) == 0)
                jobs.append(
                    hang_up(address, case, after_s=wait_s, is_streaming=is_streaming, is_half=is_half)
                )
            elif number % 5 == 1:
                jobs.append(send_nonsense(client, str(random.choice(list(MALFORMED))), outcome))
            else:
                jobs.append(ask(client, case, outcome, is_streaming=is_streaming))
        await asyncio.gather(*(jobs[i] for i in random.permutation(num_clients)))
