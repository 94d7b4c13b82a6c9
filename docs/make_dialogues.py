"""Seven dialogues with the demo's export: their pictures into docs/images/chat/, their text into docs/chat.md.

python docs/make_dialogues.py [--model runs/demo/finetune/result] [--pages-model runs/demo/pretrain/result]
                              [--page docs/chat.md]

Learning from a page is the work of the pre-trained model, as the few-shot benchmarks ask it: instruction tuning saw
dialogues only. Everything is greedy with seed 0: the same exports give the same page. Replies stand as they come,
wrong ones too.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from demo.catalogue import Emoji, load_catalogue
from vlgpt.chat.dialogue import Content, Dialogue, Picture
from vlgpt.chat.reply import Event, Finished, Request, answer
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.document import Document, ImagePart, Part, TextPart
from vlgpt.images import png_bytes

BEGIN, END = "<!-- dialogues: written by docs/make_dialogues.py -->", "<!-- end of dialogues -->"
SIZE_PX = 96
DESCRIBE = "Provide a brief description of the given image"
DRAW = "Create an image that visually represents the description: {}."
WORDS = DecodeSettings(max_new_tokens=32, images="never")
FREE = DecodeSettings(max_new_tokens=32)
PICTURE = DecodeSettings(images="force")


class Album:
    """The emoji by caption and style, and the files of the page's pictures."""

    def __init__(self, folder: Path):
        self._emoji = {(emoji.caption, emoji.style): emoji for emoji in load_catalogue()}
        self.folder, self._num_written = folder, 0

    def emoji(self, caption: str, style: str = "noto") -> Emoji:
        """The emoji with this caption in this style. Raises KeyError when the catalogue has none."""
        return self._emoji[caption, style]

    def picture(self, caption: str, style: str = "noto") -> Picture:
        """The image of an emoji, ready for a dialogue."""
        return Picture.read(self.emoji(caption, style).path.read_bytes())

    def write(self, picture: Picture) -> str:
        """Store a picture of the page; -> its file name."""
        self._num_written += 1
        name = f"{self._num_written:02d}.png"
        image = picture.image.resize((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
        (self.folder / name).write_bytes(png_bytes(image))
        return name


class Scene:
    """One section of the page: a dialogue, or several that know nothing of each other."""

    def __init__(self, generator: Generator, album: Album):
        self.generator, self.album = generator, album
        self.dialogue = Dialogue()
        self._tables: list[str] = []

    def ask(self, *content: Content, settings: DecodeSettings = FREE) -> None:
        """Say something and keep the model's reply, whatever it is."""
        asked = self.dialogue.asking(*content)
        events: list[Event] = []
        answer(self.generator, [Request(asked, settings, events.append)])
        last = events[-1]
        if not isinstance(last, Finished):
            raise SystemExit(f"no reply: {last}")
        self.dialogue = asked.answered(last.turn)

    def draw_next(self, captions: Sequence[str], last: str) -> None:
        """A page of a picture dictionary: the model draws the picture of its last name."""
        parts: list[Part] = []
        shown: list[Content] = []
        pictures = [self.album.picture(caption) for caption in captions]
        for number, (caption, picture) in enumerate(zip(captions, pictures)):
            parts += [TextPart(f"{caption}:"), ImagePart(number)]
            shown += [f"{caption}:", picture]
        parts.append(TextPart(f"{last}:"))
        prompt = Prompt(Document("page", "docs", tuple(parts)), tuple(p.data for p in pictures))
        (reply,) = self.generator.generate([prompt], PICTURE.decode)
        (image,) = self.generator.draw(reply.visual[0][None], seeds=[(0, "draw", 0)])
        drawn = Picture.drawn(image, reply.visual[0])
        self._add_table([("the page so far", [*shown, f"{last}:"]), ("VL-GPT goes on", [drawn])])

    def finish_dialogue(self) -> None:
        """Show the dialogue; the next one begins empty."""
        names = {"user": "user", "assistant": "VL-GPT"}
        self._add_table([(names[turn.speaker], turn.content) for turn in self.dialogue.turns])
        self.dialogue = Dialogue()

    def _add_table(self, rows: Sequence[tuple[str, Sequence[Content]]]) -> None:
        """An HTML table, which GitHub and plain Markdown viewers show alike."""
        lines = [
            f"<tr><td><b>{name}</b></td><td>{' '.join(map(self._cell, content))}</td></tr>"
            for name, content in rows
        ]
        self._tables.append("\n".join(["<table>", *lines, "</table>"]))

    def _cell(self, item: Content) -> str:
        if isinstance(item, str):
            return html.escape(item)
        name = self.album.write(item)
        return f'<img src="images/chat/{name}" width="{SIZE_PX}" alt="picture">'

    def text(self) -> str:
        """All dialogues so far as Markdown tables."""
        if self.dialogue.turns:
            self.finish_dialogue()
        return "\n\n".join(self._tables)


def caption(scene: Scene) -> None:
    """Describe two emoji, each in a dialogue of its own."""
    for name in ("farmer, dark skin tone", "rocket"):
        scene.ask(DESCRIBE, scene.album.picture(name), settings=WORDS)
        scene.finish_dialogue()


def question(scene: Scene) -> None:
    """Three questions about one emoji, each in a dialogue of its own."""
    for text in ("What skin tone is this?", "Is this a flag?", "What category is this?"):
        scene.ask(scene.album.picture("farmer, dark skin tone"), text, settings=WORDS)
        scene.finish_dialogue()


def draw(scene: Scene) -> None:
    """Draw two emoji from their captions."""
    for name in ("red heart", "waving hand, dark skin tone"):
        scene.ask(DRAW.format(name))
        scene.finish_dialogue()


def edit(scene: Scene) -> None:
    """Change the skin tone of one image."""
    scene.ask(scene.album.picture("raised hand, light skin tone"), "Change the skin tone to dark.")


def edit_twice(scene: Scene) -> None:
    """Change an image, and then the image that the model drew."""
    scene.ask(scene.album.picture("person, light skin tone"), "Change the skin tone to dark.")
    scene.ask("Change the skin tone to medium-light.")


def in_context(scene: Scene) -> None:
    """Continue three series of captioned images; the stage 2 model has seen such pages."""
    scene.draw_next(("woman, light skin tone", "woman, medium skin tone"), "woman, dark skin tone")
    scene.draw_next(("one o’clock", "two o’clock", "three o’clock"), "four o’clock")
    scene.draw_next(("red heart", "orange heart", "yellow heart"), "blue heart")


def long_prompt(scene: Scene) -> None:
    """Draw what no emoji shows, from long captions."""
    for text in (
        "women holding hands, medium and dark skin tone",
        "a woman farmer with medium-dark skin tone beside a red heart, a rocket and a yellow star, under the sun",
    ):
        scene.ask(DRAW.format(text), settings=PICTURE)
        scene.finish_dialogue()


SCENES: dict[str, Callable[[Scene], None]] = {
    "Caption": caption,
    "Question": question,
    "Draw": draw,
    "Edit": edit,
    "Edit in two turns": edit_twice,
    "In-context generation": in_context,
    "A long prompt with several concepts": long_prompt,
}


def main() -> int:
    """Command line: plays every scene with trained exports and writes the page and its images."""
    parser = argparse.ArgumentParser(description="Write the dialogues of docs/chat.md.")
    parser.add_argument("--model", type=Path, default=Path("runs/demo/finetune/result"))
    parser.add_argument("--pages-model", type=Path, default=Path("runs/demo/pretrain/result"))
    parser.add_argument("--page", type=Path, default=Path("docs/chat.md"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = arguments.page.parent / "images" / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    album = Album(folder)
    tuned, pretrained = Generator.load(arguments.model), Generator.load(arguments.pages_model)
    pretrained.decoder = tuned.decoder  # the image tokenizer of both is the same; stage 2 needs no decoder
    sections = []
    for number, (title, play) in enumerate(SCENES.items(), 1):
        scene = Scene(pretrained if play is in_context else tuned, album)
        play(scene)
        sections.append(f"### {number}. {title}\n\n{scene.text()}\n")
    page = arguments.page.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join(sections)
    arguments.page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
