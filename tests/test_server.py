"""Laws of the HTTP API: the right reply to everyone, clear errors, a bounded queue, nothing left behind."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import re
import threading
import time

import httpx
import pytest
from PIL import Image

from tests.helpers.chat_parts import new_generator, picture_bytes, running
from tests.helpers.chat_storm import Case, Outcome, cases, hang_up, read_stream, storm
from vlgpt.chat.batching import Batcher, QueueFull, ShuttingDown
from vlgpt.chat.dialogue import Dialogue, Picture
from vlgpt.chat.reply import Failed, Finished, Request, answer
from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.generator import Generator
from vlgpt.server.app import ServerLimits, create_app

CHAT = "/v1/chat/completions"


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def image_part(data: bytes, kind: str = "png") -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(data, kind)}}


def flat_picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def user(*content) -> dict:
    parts = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
    return {"role": "user", "content": parts}


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    return new_generator(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def address(generator):
    limits = ServerLimits(max_body_bytes=1 << 20, max_pixels=1_000_000, max_pictures=3, max_new_tokens=32)
    with running(create_app(generator, model_name="tiny", limits=limits)) as address:
        yield address


def post(address: str, **body) -> httpx.Response:
    return httpx.post(f"{address}{CHAT}", json=body, timeout=600)


def test_a_reply_holds_text_and_pictures_as_the_generator_gives_them(address, generator):
    picture = picture_bytes(4)
    response = post(address, messages=[user(image_part(picture), "what is in it")], max_tokens=12)
    assert response.status_code == 200, response.text
    found = response.json()
    wanted: list = []
    asked = Dialogue().asking(Picture(picture), "what is in it")
    answer(generator, [Request(asked, DecodeSettings(max_new_tokens=12), wanted.append)])
    assert isinstance(wanted[-1], Finished)
    turn = wanted[-1].turn
    message = found["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", turn.text)
    assert [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in message["images"]] == [
        p.data for p in turn.pictures
    ]
    kinds = ["text" if isinstance(item, str) else "image_url" for item in turn.content]
    assert [part["type"] for part in message["parts"]] == kinds
    assert found["object"] == "chat.completion" and found["model"] == "tiny"
    assert found["usage"]["total_tokens"] == wanted[-1].num_prompt_positions + wanted[-1].num_reply_positions
    assert found["choices"][0]["finish_reason"] == {"end": "stop", "length": "length"}[wanted[-1].finish]


def test_modalities_choose_words_or_pictures_and_replies_can_be_sent_back(address):
    asked = user("draw three elephants")
    drawn = post(address, messages=[asked], modalities=["image"]).json()["choices"][0]["message"]
    assert drawn["content"] == "" and len(drawn["images"]) == 1
    for echo in (drawn, {"role": "assistant", "content": "", "images": drawn["images"]}):
        response = post(address, messages=[asked, echo, user("and now?")], modalities=["text"], max_tokens=8)
        assert response.status_code == 200, response.text
        message = response.json()["choices"][0]["message"]
        assert message["content"] and message["images"] == []
    with_picture = response.json()["usage"]["prompt_tokens"]
    plain = {"role": "assistant", "content": "no"}
    response = post(address, messages=[asked, plain, user("and now?")], modalities=["text"], max_tokens=8)
    assert response.json()["usage"]["prompt_tokens"] == with_picture - 6 + 1  # [IMG], 4 embeddings, [/IMG]


def test_streamed_chunks_add_up_to_the_whole_reply(address):
    body = {"messages": [user("what is in the picture", image_part(picture_bytes(1)))], "max_tokens": 16}
    whole = post(address, **body).json()
    streamed = post(address, **body, stream=True, stream_options={"include_usage": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line.startswith("data: {")]
    deltas = [record["choices"][0]["delta"] for record in lines if record["choices"]]
    message = whole["choices"][0]["message"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    pictures = [picture for delta in deltas for picture in delta.get("images", [])]
    assert [p["image_url"] for p in pictures] == [p["image_url"] for p in message["images"]]
    assert lines[-1]["usage"] == whole["usage"]
    assert lines[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert len(deltas) > 2


def test_equal_requests_give_equal_replies_and_seeds_change_them(address):
    body = {"messages": [user("tell me more")], "temperature": 1.3, "max_tokens": 16}
    texts = [post(address, **body, seed=seed).json()["choices"][0]["message"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, ["messages", "at least 1"]),
        ({"messages": [user("x")], "tmperature": 1}, ["tmperature"]),
        ({"messages": [user("x")], "temperature": -1}, ["temperature"]),
        ({"messages": [user("x")], "n": 2}, ["n:"]),
        ({"messages": [user("x")], "max_tokens": 500}, ["max_tokens is 500", "at most 32"]),
        ({"messages": [user("x")], "modalities": ["audio"]}, ["modalities"]),
        ({"messages": [user("x")], "num_beams": 2, "temperature": 1}, ["num_beams"]),
        ({"messages": [user("x")], "stop": ["a"] * 5}, ["stop"]),
        ({"messages": [user("x")], "stop": "a" * 129}, ["stop", "128"]),
        ({"messages": [user("x"), {"role": "assistant", "content": "y"}] * 513}, ["messages", "1024"]),
        ({"messages": [{"role": "system", "content": "x"}, user("x")]}, ["messages.0", "system"]),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ["last message"]),
        ({"messages": [user()]}, ["turn 1", "empty"]),
        ({"messages": [user("very " * 2000)]}, ["positions"]),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "http://x/y.png"}})]}, ["data:"]),
        ({"messages": [user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})]}, ["data:"]),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AA"}})]},
            ["data:"],
        ),
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}})]},
            ["base64"],
        ),
        ({"messages": [user(image_part(b"no picture"))]}, ["messages.0.0", "not_an_image"]),
        ({"messages": [user(image_part(flat_picture(1200, 900)))]}, ["too_many_pixels"]),
        ({"messages": [user(image_part(picture_bytes(0)[:-40]))]}, ["messages.0.0"]),
        ({"messages": [user(*[image_part(picture_bytes(0))] * 4)]}, ["more than 3 pictures"]),
    ],
)
def test_bad_requests_get_a_400_that_says_what_is_wrong(body, words, address):
    response = post(address, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    for word in words:
        assert word in error["message"], error["message"]


def test_wrong_paths_models_media_types_and_sizes_have_their_own_status(address):
    good = {"messages": [user("x")]}
    assert post(address, **good, model="other").status_code == 404
    assert post(address, **good, model="tiny", max_tokens=2).status_code == 200
    assert httpx.get(f"{address}{CHAT}").status_code == 405
    missing = httpx.get(f"{address}/v1/files/../../etc/passwd")
    assert missing.status_code == 404 and "error" in missing.json()
    plain = httpx.post(f"{address}{CHAT}", content=json.dumps(good), headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    large = json.dumps({"messages": [user("x" * (1 << 20))]}).encode()
    json_type = {"content-type": "application/json"}
    assert httpx.post(f"{address}{CHAT}", content=large, headers=json_type).status_code == 413

    def pieces():
        yield from (large[at : at + 65536] for at in range(0, len(large), 65536))

    assert httpx.post(f"{address}{CHAT}", content=pieces(), headers=json_type).status_code == 413
    deep = b'{"messages":' + b"[" * 100_000
    assert httpx.post(f"{address}{CHAT}", content=deep, headers=json_type).status_code == 400


def test_health_models_and_metrics(address):
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert [m["id"] for m in httpx.get(f"{address}/v1/models").json()["data"]] == ["tiny"]
    before = metric(address, 'vlgpt_requests_total{outcome="answered"}')
    drawn = metric(address, "vlgpt_pictures_drawn_total")
    post(address, messages=[user("x")], modalities=["image"])
    assert metric(address, 'vlgpt_requests_total{outcome="answered"}') == before + 1
    assert metric(address, "vlgpt_pictures_drawn_total") == drawn + 1
    assert metric(address, "vlgpt_waiting") == 0


def metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def wait_for(condition, *, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


class Gate:
    """Holds the thread that decodes at the first step of every reply until `open`."""

    def __init__(self, generator: Generator, monkeypatch):
        self._event = threading.Event()
        real = generator.generate

        def generate(prompts, settings, **callbacks):
            assert self._event.wait(60)
            return real(prompts, settings, **callbacks)

        monkeypatch.setattr(generator, "generate", generate)

    def open(self) -> None:
        self._event.set()


def requests(count: int, **options) -> tuple[list[Request], list[list]]:
    heard: list[list] = [[] for _ in range(count)]
    made = [
        Request(
            Dialogue().asking(f"question {number}"),
            DecodeSettings(max_new_tokens=4, images="never"),
            heard[number].append,
            **options,
        )
        for number in range(count)
    ]
    return made, heard


def test_the_queue_is_bounded_and_waiting_requests_become_one_batch(generator, monkeypatch):
    gate = Gate(generator, monkeypatch)
    sizes: list[int] = []
    batcher = Batcher(generator, max_batch=4, max_waiting=6, on_batch=lambda size, _: sizes.append(size))
    made, heard = requests(8)
    batcher.submit(made[0])
    wait_for(lambda: batcher.num_running == 1)
    for request in made[1:7]:
        batcher.submit(request)
    with pytest.raises(QueueFull) as full:
        batcher.submit(made[7])
    assert full.value.retry_after_s >= 1
    made[2].cancel()
    batcher.submit(made[7])  # a request that nobody waits for makes room
    assert heard[2] == [Failed("cancelled", "the request was cancelled")]
    gate.open()
    wait_for(lambda: all(heard) and batcher.num_running == 0)
    wait_for(lambda: sum(sizes) == 7)
    assert sizes == [1, 4, 2]
    assert all(isinstance(h[-1], Finished) for n, h in enumerate(heard) if n != 2)
    batcher.close()
    with pytest.raises(ShuttingDown):
        batcher.submit(made[0])


def test_requests_of_other_settings_wait_for_their_own_batch_in_order(generator, monkeypatch):
    gate = Gate(generator, monkeypatch)
    sizes: list[int] = []
    batcher = Batcher(generator, on_batch=lambda size, _: sizes.append(size))
    made, heard = requests(6)
    made[3].settings = DecodeSettings(max_new_tokens=5, images="never")
    # greedy: the seed is no matter, and neither is what only drawing reads
    made[4].settings = DecodeSettings(max_new_tokens=4, images="never", seed=9, guidance=2.0)
    batcher.submit(made[0])
    wait_for(lambda: batcher.num_running == 1)
    for request in made[1:]:
        batcher.submit(request)
    gate.open()
    wait_for(lambda: sum(sizes) == 6)
    assert sizes == [1, 4, 1]
    assert all(isinstance(h[-1], Finished) for h in heard)
    batcher.close()


def test_closing_fails_what_waits_and_late_requests_time_out(generator, monkeypatch):
    gate = Gate(generator, monkeypatch)
    batcher = Batcher(generator)
    (running_one, waiting), heard = requests(2)
    (late,), late_heard = requests(1, timeout_s=0.05)
    batcher.submit(running_one)
    wait_for(lambda: batcher.num_running == 1)
    batcher.submit(waiting)
    batcher.submit(late)
    time.sleep(0.06)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_for(lambda: bool(heard[1]))
    assert heard[1][0].kind == "unavailable" and late_heard[0][0].kind == "unavailable"
    gate.open()
    closing.join(30)
    assert heard[0][-1].kind == "cancelled"
    late_again: list = []
    answer(generator, [Request(late.dialogue, late.settings, late_again.append, timeout_s=-1)])
    assert [event.kind for event in late_again] == ["timeout"]


def test_a_lost_device_ends_the_queue_so_that_health_says_down(generator, monkeypatch):
    gate = Gate(generator, monkeypatch)
    batcher = Batcher(generator, max_batch=1)
    (first, waiting), heard = requests(2)
    batcher.submit(first)
    wait_for(lambda: batcher.num_running == 1)
    batcher.submit(waiting)
    monkeypatch.setattr(type(generator), "is_device_alive", False)
    gate.open()
    wait_for(lambda: bool(heard[1]))
    assert heard[1][-1].kind == "unavailable" and isinstance(heard[0][-1], Finished)
    wait_for(lambda: not batcher.is_alive)
    with pytest.raises(ShuttingDown):
        batcher.submit(first)
    batcher.close()


def test_a_fault_of_the_model_is_a_500_and_the_server_lives_on(generator, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret detail")

    with running(create_app(generator, model_name="tiny")) as address:
        with monkeypatch.context() as patch:
            patch.setattr(generator, "generate", broken)
            response = post(address, messages=[user("x")])
            assert response.status_code == 500 and "secret" not in response.text
            streamed = post(address, messages=[user("x")], stream=True)
            assert '"code": "internal"' in streamed.text and "[DONE]" in streamed.text
        assert post(address, messages=[user("x")], max_tokens=2).status_code == 200


def test_timeouts_full_queues_and_clients_that_leave(generator, monkeypatch):
    limits = ServerLimits(max_waiting=2, max_batch=1, timeout_s=1.0, read_timeout_s=0.5)
    app = create_app(generator, model_name="tiny", limits=limits)
    gate = Gate(generator, monkeypatch)
    case = cases_of_nothing()
    with running(app) as address:
        batcher = app.state.server.batcher
        asyncio.run(hang_up(address, case, after_s=0.2, is_streaming=True, is_half=False))
        wait_for(lambda: batcher._running and batcher._running[0].is_cancelled)
        asyncio.run(hang_up(address, case, after_s=0.2, is_streaming=False, is_half=False))
        wait_for(lambda: batcher.num_waiting == 1 and batcher._waiting[0].is_cancelled)
        threads = [threading.Thread(target=post, args=(address,), kwargs=case.body) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: batcher.num_waiting == 2 and not any(r.is_cancelled for r in batcher._waiting))
        full = post(address, **case.body)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join(30)
        late = post(address, **case.body)
        assert late.status_code == 504 and "within 1 s" in late.json()["error"]["message"]
        streamed = post(address, **case.body, stream=True)
        assert '"code": "timeout"' in streamed.text
        asyncio.run(hang_up(address, case, after_s=1.0, is_streaming=False, is_half=True))
        wait_for(lambda: metric(address, 'vlgpt_requests_total{outcome="status_408"}') == 1)
        gate.open()
        wait_for(lambda: batcher.num_waiting == 0 and batcher.num_running == 0)
        assert post(address, **case.body).status_code == 200


def cases_of_nothing():
    return Case({"messages": [user("hello")], "max_tokens": 4}, "", 0)


def num_requests() -> int:
    """Requests that anything still holds."""
    gc.collect()
    return sum(isinstance(found, Request) for found in gc.get_objects())


def test_fifty_clients_at_once_get_their_own_replies_whoever_leaves_or_sends_nonsense(generator):
    known, before = cases(generator, 16), num_requests()
    assert len({case.text for case in known}) == 16
    limits = ServerLimits(max_waiting=20)
    app = create_app(generator, model_name="tiny", limits=limits)
    outcome = Outcome()
    with running(app) as address:
        batcher = app.state.server.batcher
        peak = 0
        real = batcher.submit

        def submit(request):
            nonlocal peak
            real(request)
            peak = max(peak, batcher.num_waiting)

        batcher.submit = submit
        asyncio.run(storm(address, known, num_clients=50, seed=0, outcome=outcome))
        wait_for(lambda: batcher.num_waiting == 0 and batcher.num_running == 0)
        assert outcome.wrong == []
        assert outcome.statuses[200] == 30 and outcome.statuses[400] == 10
        assert set(outcome.statuses) <= {200, 400, 429}
        assert 0 < peak <= 20
        sizes = metric(address, "vlgpt_batch_size_sum") / metric(address, "vlgpt_batch_size_count")
        assert sizes > 1.5, "waiting requests were not decoded together"
        wait_for(lambda: num_requests() <= before)


def test_a_stream_of_the_storm_is_read_as_it_was_sent():
    body = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\n: waiting\n\ndata: [DONE]\n\n'
    assert read_stream(body) == ("a", [])
