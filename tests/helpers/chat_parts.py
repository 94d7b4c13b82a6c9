"""A tiny random model with image encoder and picture decoder, and an HTTP server around it, for tests of chat."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from demo.decoder import ConvDecoder
from tests.helpers.tiny_clip import save_fitting_clip
from tests.helpers.tiny_unified import CONDITION_SHAPES, new_document_tokenizer, new_model
from vlgpt.decoding.generator import Generator
from vlgpt.export import export_model
from vlgpt.models.encoders import load_clip
from vlgpt.models.unified import UnifiedModel


def save_parts(folder: Path) -> None:
    """clip/ and decoder/ that fit `new_model(tokenizer, num_patches=5)`."""
    save_fitting_clip(folder / "clip")
    torch.manual_seed(1)
    ConvDecoder(**CONDITION_SHAPES, size_px=24, width=24, num_heads=2, channels=32).save(folder / "decoder")


def new_chat_model(tokenizer, **shape) -> UnifiedModel:
    """A model whose replies differ from prompt to prompt: its attention and MLPs are far from zero."""
    options = {"num_patches": 5, "image_wish": 3.0, "end_wish": 0.7, "max_positions": 256, **shape}
    model = new_model(tokenizer, **options)
    with torch.no_grad():
        for name, parameter in model.lm.backbone.named_parameters():
            if "_proj" in name:
                parameter *= 8
    return model


def new_generator(folder: Path, **shape) -> Generator:
    """A random model that likes to draw and to end its replies."""
    save_parts(folder)
    tokenizer = new_document_tokenizer()
    return Generator(
        model=new_chat_model(tokenizer, **shape),
        tokenizer=tokenizer,
        encoder=load_clip(folder / "clip"),
        decoder=ConvDecoder.from_folder(folder / "decoder").eval(),
    )


def save_export(folder: Path, model: UnifiedModel | None = None) -> Path:
    """The same, or another model, as an export folder with its CLIP and its image decoder."""
    save_parts(folder)
    tokenizer = new_document_tokenizer()
    export_model(
        model or new_chat_model(tokenizer),
        folder / "export",
        tokenizer=tokenizer,
        encoder={"path": str(folder / "clip"), "library": "open_clip", "layer": -2, "has_cls": True},
        picture_decoder=folder / "decoder",
    )
    return folder / "export"


def picture_bytes(seed: int, *, size: tuple[int, int] = (40, 30), format: str = "PNG") -> bytes:
    """A picture of noise."""
    values = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(values.to(torch.uint8).numpy()).save(buffer, format)
    return buffer.getvalue()


@contextlib.contextmanager
def running(app) -> Iterator[str]:
    """Serve an ASGI application on a free port of this machine: -> its address."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + 200
        while not server.started:
            assert time.monotonic() < end and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server did not stop"
