"""Seven dialogues with the demo's export: their pictures into docs/images/chat/, their text into docs/chat.md.

python docs/make_dialogues.py [--model runs/demo/finetune/result] [--page docs/chat.md]

Everything is greedy with seed 0: the same export gives the same page. Replies stand as they come, wrong ones too.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from data_prep.sources.emoji_catalogue import Picture as Emoji
from data_prep.sources.emoji_catalogue import load_catalogue
from vlgpt.chat.dialogue import Content, Dialogue, Picture, Turn, png_bytes
from vlgpt.chat.reply import Failed, Finished, ReplySettings, Request, answer
from vlgpt.decoding.api import DecodeSettings
from vlgpt.generate import Generator

BEGIN, END = "<!-- dialogues: written by docs/make_dialogues.py -->", "<!-- end of dialogues -->"
SIZE_PX = 96
DESCRIBE = "Provide a brief description of the given image"
DRAW = "Create an image that visually represents the description: {}."
WORDS = ReplySettings(DecodeSettings(max_new_tokens=32, images="never"))
FREE = ReplySettings(DecodeSettings(max_new_tokens=32))
PICTURE = ReplySettings(DecodeSettings(images="force"))


class Album:
    """The emoji by caption and style, and the files of the page's pictures."""

    def __init__(self, folder: Path):
        self._emoji = {(emoji.caption, emoji.style): emoji for emoji in load_catalogue()}
        self.folder, self._num_written = folder, 0

    def emoji(self, caption: str, style: str = "noto") -> Emoji:
        return self._emoji[caption, style]

    def picture(self, caption: str, style: str = "noto") -> Picture:
        return Picture.read(self.emoji(caption, style).path.read_bytes())

    def was_trained(self, caption: str, style: str = "noto") -> str:
        """Whether the model has seen this very picture."""
        return "trained on" if self.emoji(caption, style).split == "train" else "never trained on"

    def write(self, picture: Picture) -> str:
        """Store a picture of the page; -> its file name."""
        self._num_written += 1
        name = f"{self._num_written:02d}.png"
        image = picture.image.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
        (self.folder / name).write_bytes(png_bytes(image))
        return name


class Scene:
    """One dialogue and how it is shown."""

    def __init__(self, generator: Generator, album: Album, title: str, about: str):
        self.generator, self.album, self.title, self.about = generator, album, title, about
        self.dialogue = Dialogue()

    def given(self, *content: Content, reply: tuple[Content, ...]) -> None:
        """An exchange that is an example: the reply is ours, not the model's."""
        self.dialogue = self.dialogue.asking(*content).answered(Turn("assistant", reply))

    def ask(self, *content: Content, settings: ReplySettings = FREE) -> None:
        asked = self.dialogue.asking(*content)
        events: list = []
        answer(self.generator, [Request(asked, settings, events.append)])
        last = events[-1]
        if isinstance(last, Failed):
            raise SystemExit(f"{self.title}: {last.message}")
        assert isinstance(last, Finished)
        self.dialogue = asked.answered(last.turn)

    def table(self, *, num_examples: int = 0) -> str:
        """The dialogue as an HTML table, which GitHub and plain Markdown viewers show alike."""
        rows = []
        for number, turn in enumerate(self.dialogue.turns):
            name = "user" if turn.speaker == "user" else "VL-GPT"
            if number < 2 * num_examples:
                name += " (example)" if turn.speaker == "user" else " (given)"
            cells = " ".join(self._cell(item) for item in turn.content)
            rows.append(f"<tr><td><b>{name}</b></td><td>{cells}</td></tr>")
        return "\n".join(["<table>", *rows, "</table>"])

    def _cell(self, item: Content) -> str:
        if isinstance(item, str):
            return html.escape(item)
        name = self.album.write(item)
        return f'<img src="images/chat/{name}" width="{SIZE_PX}" alt="picture">'


def caption(scene: Scene) -> None:
    for name in ("farmer, dark skin tone", "rocket"):
        scene.ask(DESCRIBE, scene.album.picture(name), settings=WORDS)


def question(scene: Scene) -> None:
    scene.ask(scene.album.picture("farmer, dark skin tone"), "What skin tone is this?", settings=WORDS)
    scene.ask("Is this a flag?", settings=WORDS)


def draw(scene: Scene) -> None:
    scene.ask(DRAW.format("red heart"))


def edit(scene: Scene) -> None:
    scene.ask(scene.album.picture("raised hand, light skin tone"), "Change the skin tone to dark.")


def edit_twice(scene: Scene) -> None:
    edit(scene)
    scene.ask("Change the skin tone to medium-light.")


def in_context(scene: Scene) -> None:
    for name in ("red heart", "orange heart", "yellow heart"):
        scene.given(DRAW.format(name), reply=("Here's the image:", scene.album.picture(name)))
    scene.ask(DRAW.format("blue heart"), settings=PICTURE)


def long_prompt(scene: Scene) -> None:
    scene.ask(
        DRAW.format("woman farmer, medium-dark skin tone, with a red heart and a rocket"), settings=PICTURE
    )


SCENES: list[tuple[str, str, Callable[[Scene], None], int]] = [
    ("Caption", "", caption, 0),
    ("Question", "", question, 0),
    ("Draw", "", draw, 0),
    ("Edit", "", edit, 0),
    ("Edit in two turns", "", edit_twice, 0),
    ("In-context generation", "", in_context, 3),
    ("A long prompt with several concepts", "", long_prompt, 0),
]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the dialogues of docs/chat.md.")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/finetune/result"))
    parser.add_argument("--page", type=Path, default=Path("docs/chat.md"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = arguments.page.parent / "images" / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    album = Album(folder)
    generator = Generator.load(arguments.model)
    sections = []
    for number, (title, about, play, num_examples) in enumerate(SCENES, 1):
        scene = Scene(generator, album, title, about)
        play(scene)
        sections.append(f"### {number}. {title}\n\n{about}\n\n{scene.table(num_examples=num_examples)}\n")
    page = arguments.page.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join(sections)
    arguments.page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
