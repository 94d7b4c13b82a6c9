"""A page to talk with a model: text and pictures, both ways.

python launchers/chat.py [--model runs/demo/finetune/result] [--port 7860]
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vlgpt import log
from vlgpt.errors import UserError, run_command

DEMO = Path("runs/demo/finetune/result")
DEMO_EXAMPLES = (
    "Create an image that visually represents the description: red apple.",
    "Provide a brief description of the given image <image>",
    "<image> Change the skin tone to dark.",
    "<image> What category is this?",
)


class LocalFilesOnly:
    """ASGI middleware: Gradio can fetch foreign addresses for a client; this page never does."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "").lower()
        if scope["type"] == "http" and ("/proxy=" in path or "file=http" in path):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"not allowed"})
            return
        await self.app(scope, receive, send)


def launch(arguments: argparse.Namespace) -> int:
    """Load the model and serve the page until interrupted."""
    folder = Path(tempfile.mkdtemp(prefix="vlgpt-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # uploads too: gone when the page ends
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from starlette.middleware import Middleware

        from launchers.chat_page import CSS, Page, theme
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'vlgpt[chat]'") from error
    from vlgpt.chat.batching import Batcher
    from vlgpt.generate import Generator

    batcher = Batcher(Generator.load(arguments.model, device=arguments.device))
    page = Page(
        batcher,
        model_name=arguments.model.as_posix(),
        pictures=folder,
        max_new_tokens=arguments.max_new_tokens,
    )
    blocks = page.build(DEMO_EXAMPLES if arguments.model == DEMO else ())
    blocks.queue(max_size=64, default_concurrency_limit=8, api_open=False)
    blocks.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        max_file_size=f"{arguments.max_upload_mib}mb",
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
    sys.stdout.write(f"http://{arguments.host}:{blocks.server_port}\n")
    sys.stdout.flush()
    blocks.block_thread()
    batcher.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A page to talk with a model: text and pictures, both ways.")
    parser.add_argument("--model", type=Path, default=DEMO, help="export folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--host", default="127.0.0.1", help="there is no login: mind who can reach it")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-upload-mib", type=int, default=10, help="size of one picture file")
    arguments = parser.parse_args(argv)
    log.configure()
    return run_command(lambda: launch(arguments))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `launchers` is no installed package
    sys.exit(main())
