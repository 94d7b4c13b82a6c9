"""The web page of `launchers/chat.py`: its layout and what its buttons do. The only file that imports gradio.

The conversation lives in a `gr.State` as an immutable `Dialogue`; the Chatbot only shows it. Text of users and of the
model is shown as it is, never as HTML or Markdown. Files are served from one private folder and from nowhere else.
"""

from __future__ import annotations

import hashlib
import html
import queue
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from vlgpt.chat import files
from vlgpt.chat.batching import Batcher, QueueFull, ShuttingDown
from vlgpt.chat.dialogue import Content, Dialogue, Picture, Turn, interleave
from vlgpt.chat.reply import Drawn, Event, Failed, Finished, Notice, Request, TextPiece
from vlgpt.decoding.api import DecodeSettings
from vlgpt.errors import UserError
from vlgpt.images import png_bytes

IMAGES: dict[str, Literal["free", "never", "force"]] = {
    "words and pictures": "free",
    "words only": "never",
    "a picture only": "force",
}
PICTURE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
MAX_PICTURES = 16  # of one message
MAX_SHOWN_PX = 640
TIMEOUT_S = 180.0
CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto !important}
#head h1 {font-size: 1.35rem; font-weight: 650; letter-spacing: -0.01em; margin: 0}
#head p {color: var(--body-text-color-subdued); margin: 0.1rem 0 0; font-size: 0.9rem}
#dialogue {height: calc(100vh - 330px) !important; min-height: 340px; border-radius: 14px}
#dialogue .message {white-space: pre-wrap; overflow-wrap: anywhere}
#dialogue .message.component {background: transparent !important; border: none; box-shadow: none; padding: 0}
#dialogue img {min-width: 150px; max-width: 300px; border-radius: 12px; background: #fff; object-fit: contain;
  border: 1px solid var(--border-color-primary)}
#dialogue button[aria-label="Share"], #dialogue button[title="Share"] {display: none}
#dialogue .message-buttons {opacity: 0.55} #dialogue .message-buttons:hover {opacity: 1}
#images, #images fieldset {border: 0 !important; padding: 0; background: none; box-shadow: none}
#images .wrap {gap: 6px}
footer {display: none !important}
"""
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
IDLE: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
EMPTY: dict[str, object] = {"text": "", "files": []}


class ChatPage:
    """Builds the page. `pictures` is the private folder that images and exports are served from."""

    def __init__(self, batcher: Batcher, *, model_name: str, pictures: Path, max_new_tokens: int = 256):
        self.batcher, self.model_name, self.pictures = batcher, model_name, pictures
        self.max_new_tokens = max_new_tokens
        self.has_pictures = batcher.generator.decoder is not None

    # ---------------------------------------------------------------------------------------------------- what is shown

    def shown(self, dialogue: Dialogue) -> list[dict[str, object]]:
        """The dialogue as messages of a Chatbot, one per turn."""
        return [
            {"role": turn.speaker, "content": [self._shown_item(item) for item in turn.content] or [""]}
            for turn in dialogue.turns
        ]

    def _shown_item(self, item: Content) -> str | dict[str, object]:
        if isinstance(item, str):
            return escaped(item)
        return {"path": str(self._file_of(item)), "alt_text": "picture"}

    def _file_of(self, picture: Picture) -> Path:
        """A PNG without metadata in the private folder; its name is the hash of the image."""
        path = self.pictures / f"{hashlib.sha256(picture.data).hexdigest()[:32]}.png"
        if not path.exists():
            image = picture.image
            image.thumbnail((MAX_SHOWN_PX, MAX_SHOWN_PX))
            path.write_bytes(png_bytes(image))
        return path

    def exported(self, dialogue: Dialogue) -> dict[str, object]:
        """The download button for a dialogue."""
        if not dialogue.turns:
            return gr.update(value=None, interactive=False)
        data = files.to_zip(dialogue, info={"model": self.model_name})
        folder = self.pictures / hashlib.sha256(data).hexdigest()[:32]
        folder.mkdir(exist_ok=True)
        (folder / "dialogue.zip").write_bytes(data)
        return gr.update(value=str(folder / "dialogue.zip"), interactive=True)

    # ----------------------------------------------------------------------------------------------------- what happens

    def say(
        self, message: dict[str, Any], dialogue: Dialogue, *controls: object
    ) -> Iterator[tuple[object, Dialogue, object]]:
        """A new message: -> (Chatbot, dialogue, text box), again and again while the reply grows."""
        paths = message.get("files") or []
        if not paths and not message["text"].strip():
            yield gr.skip(), dialogue, gr.skip()
            return
        try:
            if len(paths) > MAX_PICTURES:
                raise UserError(f"{len(paths)} pictures in one message, wanted at most {MAX_PICTURES}")
            pictures = [Picture.read(Path(path).read_bytes(), name=Path(path).name) for path in paths]
            asked = _settled(dialogue).asking(*interleave(message["text"], pictures))
        except UserError as error:
            gr.Warning(str(error))
            yield gr.skip(), dialogue, gr.skip()
            return
        for shown, state in self._reply(asked, controls):
            yield shown, state, gr.update(value=EMPTY, **BUSY)

    def retry(
        self, dialogue: Dialogue, seed: float, event: gr.RetryData, *controls: object
    ) -> Iterator[tuple[object, Dialogue, object, int]]:
        """Another reply, with the next seed: -> (Chatbot, dialogue, text box, seed)."""
        number = _turn_number(event.index) // 2 * 2
        seed = int(seed) + 1
        if controls[2] == 0:
            gr.Info("Words are chosen greedily: raise the temperature for other ones.")
        for shown, state in self._reply(dialogue.up_to(number + 1), (controls[0], seed, *controls[2:])):
            yield shown, state, gr.update(**BUSY), seed

    def edit(
        self, dialogue: Dialogue, event: gr.EditData, *controls: object
    ) -> Iterator[tuple[object, Dialogue, object]]:
        """A user turn said differently; what came after it is gone: -> (Chatbot, dialogue, text box)."""
        text, before = (html.unescape(str(value)) for value in (event.value, event.previous_value))
        try:
            asked = dialogue.edited(_turn_number(event.index), text, instead_of=before)
        except UserError as error:
            gr.Warning(str(error))
            yield self.shown(dialogue), dialogue, gr.skip()
            return
        for shown, state in self._reply(asked, controls):
            yield shown, state, gr.update(**BUSY)

    def undo(self, dialogue: Dialogue, event: gr.UndoData) -> tuple[object, Dialogue, object]:
        """Take back a user turn and all after it; its text returns to the box."""
        number = _turn_number(event.index) // 2 * 2
        text = dialogue.turns[number].text if number < len(dialogue.turns) else ""
        kept = dialogue.up_to(number)
        return self.shown(kept), kept, {"text": text, "files": []}

    def load(self, path: str, dialogue: Dialogue) -> tuple[object, Dialogue]:
        """Go on with an exported dialogue."""
        try:
            found = files.from_zip(Path(path).read_bytes())
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip(), dialogue
        return self.shown(found), found

    def _reply(self, asked: Dialogue, controls: Sequence[Any]) -> Iterator[tuple[object, Dialogue]]:
        """The dialogue with the reply as far as it has come; a reply that is stopped stays as it is."""
        events: queue.Queue[Event] = queue.Queue()
        yield self.shown(asked), asked
        try:
            request = Request(asked, self._settings(*controls), events.put, timeout_s=TIMEOUT_S)
            self.batcher.submit(request)
        except (UserError, QueueFull, ShuttingDown) as error:
            gr.Warning(str(error))
            return
        content: list[Content] = []
        try:
            while True:
                event = events.get()
                if isinstance(event, Finished):
                    done = asked.answered(event.turn)
                    yield self.shown(done), done
                    return
                if isinstance(event, Failed):
                    gr.Warning(event.message)
                    return
                if isinstance(event, Notice):
                    gr.Info(event.text)
                    continue
                _grow(content, event)
                partial = asked.answered(Turn("assistant", tuple(content)))
                yield self.shown(partial), partial
        finally:
            request.cancel()

    def _settings(
        self,
        images: str,
        seed: float,
        temperature: float,
        top_p: float,
        max_new_tokens: float,
        max_images: float,
        visual_guidance: float,
        decoder_guidance: float,
    ) -> DecodeSettings:
        """Raises UserError."""
        return DecodeSettings(
            max_new_tokens=min(int(max_new_tokens), self.max_new_tokens),
            temperature=float(temperature),
            top_p=float(top_p),
            images=IMAGES[images],
            max_images=int(max_images),
            visual_guidance=float(visual_guidance),
            seed=int(seed),
            guidance=float(decoder_guidance),
        )

    # ------------------------------------------------------------------------------------------------------- the layout

    def build(self, examples: Sequence[str] = ()) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="vlgpt chat", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            state = gr.State(Dialogue(), time_to_live=86400)
            gr.HTML(
                f"<h1>VL-GPT</h1><p>{html.escape(self.model_name)}: text and pictures, both ways</p>",
                elem_id="head",
            )
            chatbot = gr.Chatbot(
                elem_id="dialogue",
                show_label=False,
                height="60vh",
                layout="bubble",
                render_markdown=False,
                sanitize_html=True,
                allow_tags=False,
                editable="user",
                feedback_options=None,
                buttons=["copy"],
                group_consecutive_messages=False,
                placeholder="Say something, or attach a picture and ask about it.",
            )
            box = gr.MultimodalTextbox(
                elem_id="box",
                show_label=False,
                placeholder="Type a message; paste or attach pictures. <image> in the text says where they stand.",
                file_count="multiple",
                file_types=PICTURE_TYPES,
                sources=["upload"],
                max_plain_text_length=20_000,
                autofocus=True,
                **IDLE,
            )
            kinds = list(IMAGES) if self.has_pictures else ["words only"]
            with gr.Row(equal_height=False):
                images = gr.Radio(
                    kinds, value=kinds[0], show_label=False, container=False, elem_id="images", scale=5
                )
                new = gr.Button("New", size="sm", min_width=80, elem_id="new")
                load = gr.UploadButton("Open", file_types=[".zip"], size="sm", min_width=80, elem_id="open")
                export = gr.DownloadButton(
                    "Export", interactive=False, size="sm", min_width=80, elem_id="export"
                )
            for component in (box, load):
                refuse_addresses(component)
            controls = [images, *self._controls()]
            if examples:
                gr.Examples([{"text": text, "files": []} for text in examples], box, label="Try")
            self._connect(state, chatbot, box, controls, new=new, load=load, export=export)
        return blocks

    def _controls(self) -> list[gr.components.Component]:
        """In the order of `_settings`, from the seed on."""
        most = self.max_new_tokens
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, elem_id="seed")
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature (0: greedy)", elem_id="temperature"
                )
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                length = gr.Slider(1, most, min(64, most), step=1, label="Most words (tokens)")
            with gr.Row():
                max_images = gr.Slider(1, 4, 1, step=1, label="Most pictures")
                visual = gr.Slider(0, 10, 1, step=0.25, label="Guidance of the embeddings (1: off)")
                own = getattr(self.batcher.generator.decoder, "guidance", 1)
                decoder = gr.Slider(0, max(15, own), own, step=0.25, label="Guidance of the drawing (1: off)")
        return [seed, temperature, top_p, length, max_images, visual, decoder]

    def _connect(
        self,
        state: gr.State,
        chatbot: gr.Chatbot,
        box: gr.MultimodalTextbox,
        controls: Sequence[gr.components.Component],
        *,
        new: gr.Button,
        load: gr.UploadButton,
        export: gr.DownloadButton,
    ) -> None:
        hidden: Any = {"api_visibility": "private", "show_progress": "hidden"}
        replying = [chatbot, state, box]
        said = box.submit(self.say, [box, state, *controls], replying, **hidden)
        again = chatbot.retry(self.retry, [state, controls[1], *controls], [*replying, controls[1]], **hidden)
        edited = chatbot.edit(self.edit, [state, *controls], replying, **hidden)
        undone = chatbot.undo(self.undo, [state], replying, **hidden)
        cleared = chatbot.clear(lambda: ([], Dialogue()), None, [chatbot, state], **hidden)
        # Gradio's stubs give `cancels` a narrower type than its code takes.
        running: list[Any] = [said, again, edited]
        renewed = new.click(lambda: ([], Dialogue()), None, [chatbot, state], cancels=running, **hidden)
        opened = load.upload(self.load, [load, state], [chatbot, state], **hidden)
        stopped = box.stop(lambda: gr.update(**IDLE), None, [box], cancels=running, **hidden)
        for event in (*running, undone, cleared, renewed, opened, stopped):
            event.then(
                lambda dialogue: (self.exported(dialogue), gr.update(**IDLE)),
                [state],
                [export, box],
                **hidden,
            )


def _grow(content: list[Content], event: TextPiece | Drawn) -> None:
    """Append what is new to a reply under way."""
    if isinstance(event, Drawn):
        content.append(event.picture)
    elif content and isinstance(content[-1], str):
        content[-1] += event.text
    elif event.text.strip():
        content.append(event.text.lstrip())


def _settled(dialogue: Dialogue) -> Dialogue:
    """Without a question that never got its reply: the new one takes its place."""
    return dialogue.up_to(len(dialogue.turns) // 2 * 2)


def _turn_number(index: int | tuple[int, int] | list[int]) -> int:
    """Chatbots tell the message, and for some of its parts the place inside."""
    return int(index if isinstance(index, (int, float)) else index[0])


def refuse_addresses(component: Any) -> None:
    """Gradio downloads http addresses that a client names instead of an uploaded file; this page does not."""
    move = component.async_move_resource_to_block_cache

    async def move_local(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("Only uploaded files are read, no addresses.")
        return await move(path)

    component.async_move_resource_to_block_cache = move_local


def escaped(text: str) -> str:
    """Text that a browser shows unchanged: tags and entities in it stay letters. `html.unescape` undoes it."""
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", re.sub(r"&(?=#|\w+;?)", "&amp;", text))


class LocalFilesOnly:
    """ASGI middleware: Gradio can fetch foreign addresses for a client; this page never does."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").lower()
        if scope["type"] == "http" and ("/proxy=" in path or "file=http" in path):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not allowed"})
            return
        await self.app(scope, receive, send)


def launch(
    page: ChatPage, *, host: str, port: int | None, max_upload_mib: int, examples: Sequence[str]
) -> gr.Blocks:
    """Start to serve the page, in threads of its own."""
    blocks = page.build(examples)
    blocks.queue(max_size=64, default_concurrency_limit=8, api_open=False)
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{max_upload_mib}mb",
        app_kwargs={"middleware": [Middleware(LocalFilesOnly)]},
        theme=theme(),
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return blocks


def theme() -> gr.Theme:
    """Calm colours, fonts of the reader's own machine: nothing is fetched from anywhere."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
