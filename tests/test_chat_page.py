"""The page of launchers/chat.py: what it refuses, and, in a real browser, that people can use it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.helpers.chat_parts import picture_bytes, save_export
from tests.helpers.processes import ROOT

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'vlgpt[chat]'")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MARKUP = "<b id=evil>bold</b> <script>window.evil=1</script> <img src=x onerror=window.evil=1> **stars** a < b &amp; c"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The launcher as a user starts it, with a tiny random export."""
    export = save_export(tmp_path_factory.mktemp("page"))
    command = [sys.executable, "launchers/chat.py", "--model", str(export), "--max-upload-mib", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path_factory.mktemp("served"))}
    # shells start background jobs with SIGINT ignored, which children inherit
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": listen}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    try:
        line = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", line), line
        yield line
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(200)
        finally:
            process.kill()


def config(address: str) -> dict:
    return httpx.get(f"{address}/config", timeout=600).json()


@pytest.mark.parametrize("route", ["/file=", "/gradio_api/file=", "/gradio_api/file/"])
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../../../etc/passwd",
        "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/proc/self/environ",
        "file:///etc/passwd",
        str(ROOT / "README.md"),
        "README.md",
        "launchers/chat.py",
        "http://127.0.0.1:1/x",
        "https://example.org/",
    ],
)
def test_no_path_of_the_server_and_no_foreign_address_is_readable(route, path, address):
    response = httpx.get(f"{address}{route}{path}", follow_redirects=True, timeout=600)
    assert response.status_code in (403, 404), (route, path, response.text[:200])
    assert "root:" not in response.text and "import" not in response.text


def test_proxies_are_refused(address):
    for path in ("/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=https://example.org"):
        assert httpx.get(f"{address}{path}", timeout=600).status_code == 403


def call(address: str, target: str, data: list) -> str:
    """Call an event of the page as its own script would, with forged data: -> what comes back."""
    found = config(address)
    dependency = next(d for d in found["dependencies"] if target in [t[1] for t in d["targets"]])
    body = {"data": data, "fn_index": dependency["id"], "session_hash": "forged", "event_data": None}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=600)
    if joined.status_code != 200:
        return joined.text
    lines = []
    url = f"{address}/gradio_api/queue/data?session_hash=forged"
    with httpx.stream("GET", url, timeout=600) as response:
        for line in response.iter_lines():
            lines.append(line)
            if "process_completed" in line or "close_stream" in line:
                break
    return "\n".join(lines)


@pytest.mark.parametrize("path", ["/etc/hostname", str(ROOT / "tests/assets"), "http://127.0.0.1:1/x.png"])
def test_a_forged_upload_cannot_make_the_page_read_a_file_of_the_server(path, address):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}
    message = {"text": "what is it", "files": [file]}
    controls = ["words only", 0, 0, 1, 4, 1, 1, 1]
    reply = call(address, "submit", [message, None, *controls])
    assert '"success": false' in reply.lower().replace('"success":false', '"success": false'), reply[-500:]


def test_uploads_are_limited_in_size_and_type(address):
    upload = f"{address}/gradio_api/upload"
    big = httpx.post(upload, files={"files": ("x.png", b"x" * (2 << 20))}, timeout=600)
    assert big.status_code == 413, big.text
    small = httpx.post(upload, files={"files": ("x.html", b"<script>alert(1)</script>")}, timeout=600)
    served = httpx.get(f"{address}/gradio_api/file={small.json()[0]}", timeout=600)
    assert "attachment" in served.headers["content-disposition"]  # never shown as a page
    for name, content in {"x.html": b"<b>", "x.png": b"no picture"}.items():
        path = httpx.post(upload, files={"files": (name, content)}, timeout=600).json()[0]
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": name}
        controls = ["words only", 0, 0, 1, 4, 1, 1, 1]
        reply = call(address, "submit", [{"text": "x", "files": [file]}, None, *controls])
        assert "Invalid file type" in reply or "cannot be used" in reply, reply[-500:]


def test_the_page_asks_nothing_of_other_hosts_and_names_no_api(address):
    page = httpx.get(address, timeout=600).text
    hosts = set(re.findall(r"(?:src|href)=[\"']https?://([^/\"']+)", page))
    assert not hosts, hosts
    assert not [d for d in config(address)["dependencies"] if d.get("api_visibility") == "public"]


def test_shown_text_is_escaped_and_an_edit_gets_the_original_back():
    import html

    from vlgpt.chat.page import escaped

    shown = escaped(MARKUP)
    assert "<b" not in shown and "<script" not in shown and "<img" not in shown
    for text in (MARKUP, "a < b & c", "&lt;b&gt;", "x&y;", "&#60;i>", "< b", "</b>", "<!-- x"):
        assert html.unescape(escaped(text)) == text


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not tested in a browser")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.foreign = []
    page.on("request", lambda request: page.foreign.append(request.url))
    page.goto(address)
    page.wait_for_selector("#box textarea")
    yield page
    assert [u for u in page.foreign if not u.startswith((address, "data:", "blob:"))] == []
    context.close()


def choose(page, kind: str) -> None:
    page.click(f"#images label:has-text('{kind}')")


def say(page, text: str) -> None:
    """Type a message and wait until its reply is whole: the stop button has become the send button again."""
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")
    page.wait_for_function("document.querySelector('#box textarea').value === ''")
    page.wait_for_selector("#box button.stop-button", state="hidden")
    page.wait_for_selector("#box button.submit-button", state="visible")


def replies(page) -> list[str]:
    return page.locator("#dialogue [data-testid=bot]").all_inner_texts()


@pytest.mark.slow
def test_people_type_upload_and_receive_pictures(page, tmp_path):
    choose(page, "words only")
    say(page, "tell me more")
    page.wait_for_function("document.querySelectorAll('#dialogue [data-testid=bot]').length === 1")
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    (tmp_path / "b.png").write_bytes(picture_bytes(2))
    page.set_input_files("#box input[type=file]", [tmp_path / "a.png", tmp_path / "b.png"])
    page.wait_for_selector("#box .thumbnails img, #box .thumbnail-item img")
    choose(page, "a picture only")
    say(page, "draw <image> like <image> please")
    page.wait_for_function("document.querySelectorAll('#dialogue img').length === 3")
    widths = page.evaluate("[...document.querySelectorAll('#dialogue img')].map(i => i.naturalWidth)")
    assert all(width > 0 for width in widths), widths


@pytest.mark.slow
def test_markup_is_shown_as_typed(page):
    choose(page, "words only")
    say(page, MARKUP)
    page.wait_for_selector("#dialogue [data-testid=user]")
    assert MARKUP.replace("  ", " ") in page.locator("#dialogue [data-testid=user]").inner_text()
    assert page.evaluate("window.evil") is None
    assert (
        page.locator("#evil").count() == 0 and page.locator("#dialogue [data-testid=user] img").count() == 0
    )


@pytest.mark.slow
def test_replies_are_regenerated_edited_undone_and_the_dialogue_exported(page, tmp_path):
    from vlgpt.chat import files

    choose(page, "words only")
    page.click("#settings button")
    page.fill("#temperature input[type=number]", "1.5")
    page.press("#temperature input[type=number]", "Tab")
    say(page, "tell me more")
    before = replies(page)[0]
    page.click("#dialogue button[aria-label*='Retry' i], #dialogue button[title*='Retry' i]")
    page.wait_for_function(
        "t => ![t, undefined].includes(document.querySelector('#dialogue [data-testid=bot]')?.innerText)",
        arg=before,
    )
    assert page.input_value("#seed input") == "1"
    page.wait_for_selector("#box button.submit-button", state="visible")
    page.click("#dialogue button[aria-label='Edit']")
    page.fill("#dialogue textarea", "something <b>else</b>")
    page.click("#dialogue button[aria-label='Submit']")
    page.wait_for_function(
        "document.querySelector('#dialogue [data-testid=user]')?.innerText.includes('something <b>else</b>')"
    )
    page.wait_for_selector("#box button.submit-button", state="visible")
    page.wait_for_selector("#export:not([disabled])")
    time.sleep(1)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "dialogue.zip")
    dialogue = files.load(tmp_path / "dialogue.zip")
    assert dialogue.turns[0].text == "something <b>else</b>"
    assert dialogue.turns[1].text == replies(page)[0].strip()
    page.click("#dialogue button[aria-label*='Undo' i], #dialogue button[title*='Undo' i]")
    page.wait_for_function("document.querySelectorAll('#dialogue [data-testid=bot]').length === 0")
    assert page.input_value("#box textarea") == "something <b>else</b>"
    page.set_input_files("#open input[type=file], input[accept='.zip']", tmp_path / "dialogue.zip")
    page.wait_for_function("document.querySelectorAll('#dialogue [data-testid=bot]').length === 1")


@pytest.mark.slow
def test_a_broken_picture_is_refused_and_the_page_lives_on(page, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    choose(page, "words only")
    page.set_input_files("#box input[type=file]", tmp_path / "a.png")
    page.wait_for_selector("#box .thumbnails, #box .thumbnail-item")
    page.fill("#box textarea", "what is it")
    page.press("#box textarea", "Enter")
    page.wait_for_selector("text=cannot be used")
    assert page.input_value("#box textarea") == "what is it"
