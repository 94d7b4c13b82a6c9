"""`vlgpt chat`: a conversation in a terminal. Lines go to the model, lines that begin with / are commands."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from vlgpt.chat import files
from vlgpt.chat.dialogue import Dialogue, Picture, interleave
from vlgpt.chat.reply import (
    Drawn,
    Event,
    Failed,
    Finished,
    Notice,
    Request,
    TextPiece,
    answer,
)
from vlgpt.decoding.api import DecodeSettings
from vlgpt.decoding.generator import Generator
from vlgpt.document import IMAGE_MARK
from vlgpt.errors import UserError

HELP = f"""\
/image PATH    attach a picture to the next message (again for more); {IMAGE_MARK} in the text says where it stands
/draw [TEXT]   say TEXT (or what was attached) and get a picture, nothing else
/write [TEXT]  say TEXT and get words, no picture
/again         another reply to the last message (change /seed or /temperature first)
/edit TEXT     say the last message differently, its pictures kept
/undo          take back the last message and its reply
/seed N        address of the random numbers; equal seeds give equal replies
/temperature T 0 is greedy
/guidance V [D]  guidance of the visual embeddings, and of the picture decoder; 1 is off
/save FOLDER   the dialogue as JSON with its pictures;  /load FOLDER  goes on with one (a folder or a zip file)
/new           begin a new dialogue
/quit          end (so does Ctrl-D)"""


class Terminal:
    """The state of one terminal conversation. `write` prints text unchanged, without a line break.

    Images of replies are written to `output` as they are drawn.
    """

    def __init__(
        self,
        generator: Generator,
        settings: DecodeSettings,
        *,
        output: Path,
        write: Callable[[str], None],
        model_name: str = "",
    ):
        self.generator, self.settings, self.output = generator, settings, output
        self._write, self._is_line_open = write, False
        self.model_name = model_name
        self.dialogue = Dialogue()
        self.attached: list[Picture] = []
        self._num_drawn = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.write(HELP + "\n"),
            "image": self._attach,
            "draw": lambda text: self._say(text, images="force"),
            "write": lambda text: self._say(text, images="never"),
            "again": lambda _: self._again(),
            "edit": self._edit,
            "undo": lambda _: self._undo(),
            "seed": lambda text: self._set(seed=_number(int, text, "/seed 7")),
            "temperature": lambda text: self._set(temperature=_number(float, text, "/temperature 0.7")),
            "guidance": self._guide,
            "save": self._save,
            "load": self._load,
            "new": lambda _: self._begin(),
        }

    def write(self, text: str) -> None:
        """Print text; remembers whether it ends a line."""
        self._write(text)
        self._is_line_open = not text.endswith("\n") if text else self._is_line_open

    def _end_line(self) -> None:
        if self._is_line_open:
            self.write("\n")

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line until there are no more or one of them is /quit."""
        self.write("Type a message, or /help for commands.\n")
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                self.take(line.strip())
            except (UserError, OSError) as error:
                self._end_line()
                self.write(f"error: {error}\n")
            except KeyboardInterrupt:
                self._end_line()
                self.write("[stopped: this reply is not kept]\n")

    def take(self, line: str) -> None:
        """One line. Raises UserError or OSError."""
        name, _, rest = line[1:].partition(" ")
        if not line.startswith("/"):
            if line or self.attached:
                self._say(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UserError(f"there is no command /{name}; /help lists them")

    def _set(self, **changes: int | float) -> None:
        self.settings = replace(self.settings, **changes)  # type: ignore[arg-type]

    def _guide(self, text: str) -> None:
        values = [_number(float, word, "/guidance 2 1.5") for word in text.split()]
        if len(values) not in (1, 2):
            raise UserError("/guidance takes one or two numbers, such as /guidance 2 1.5")
        self._set(visual_guidance=values[0])
        if len(values) == 2:
            self._set(guidance=values[1])

    def _attach(self, text: str) -> None:
        path = Path(text.strip("'\"")).expanduser()
        if not path.is_file():
            raise UserError(f"picture {path} does not exist")
        self.attached.append(Picture.read(path.read_bytes(), name=str(path)))
        self.write(f"attached {path} ({len(self.attached)} so far)\n")

    def _say(self, text: str, *, images: str | None = None) -> None:
        asked = self.dialogue.asking(*interleave(text, self.attached))
        self._reply(asked, images=images)
        self.attached = []

    def _reply(self, asked: Dialogue, *, images: str | None = None) -> None:
        """Ask the model; the dialogue only grows when a reply comes back."""
        settings = self.settings
        if images is not None:
            settings = replace(settings, images=images)  # type: ignore[arg-type]
        finished: list[Finished] = []
        answer(self.generator, [Request(asked, settings, lambda event: self._show(event, finished))])
        if finished:
            self.dialogue = asked.answered(finished[0].turn)

    def _show(self, event: Event, finished: list[Finished]) -> None:
        if isinstance(event, TextPiece):
            self.write(printable(event.text if self._is_line_open else event.text.lstrip()))
        elif isinstance(event, Drawn):
            path = self._next_file()
            path.write_bytes(event.picture.data)
            self._end_line()
            self.write(f"[picture: {path}]\n")
        elif isinstance(event, Notice):
            self.write(f"note: {event.text}\n")
        elif isinstance(event, Failed):
            raise UserError(event.message)
        else:
            self._end_line()
            if event.finish == "length":
                self.write("[cut: the reply is longer than allowed]\n")
            finished.append(event)

    def _next_file(self) -> Path:
        """A name that no file has: earlier conversations are never overwritten."""
        self.output.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.output / f"{self._num_drawn:03d}.png"
            self._num_drawn += 1
            if not path.exists():
                return path

    def _last_question(self) -> int:
        """Number of the last user turn. Raises UserError when nothing was said yet."""
        if not self.dialogue.turns:
            raise UserError("nothing was said yet")
        return (len(self.dialogue.turns) - 1) // 2 * 2

    def _again(self) -> None:
        self._reply(self.dialogue.up_to(self._last_question() + 1))

    def _edit(self, text: str) -> None:
        self._reply(self.dialogue.edited(self._last_question(), text))

    def _undo(self) -> None:
        self.dialogue = self.dialogue.up_to(self._last_question())
        self.write(f"taken back; {len(self.dialogue.turns)} turns are left\n")

    def _save(self, text: str) -> None:
        if not text:
            raise UserError("/save needs a folder, such as /save runs/dialogue")
        info = {"model": self.model_name, "seed": self.settings.seed}
        files.save(self.dialogue, Path(text).expanduser(), info=info)
        self.write(f"saved {len(self.dialogue.turns)} turns in {text}\n")

    def _load(self, text: str) -> None:
        self.dialogue = files.load(Path(text).expanduser())
        self.attached = []
        for turn in self.dialogue.turns:
            shown = [item if isinstance(item, str) else "[picture]" for item in turn.content]
            self.write(f"{turn.speaker}: {printable(' '.join(shown))}\n")

    def _begin(self) -> None:
        self.dialogue, self.attached = Dialogue(), []
        self.write("a new dialogue\n")


def printable(text: str) -> str:
    """Without control characters, which could drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _number(kind: type, text: str, example: str) -> int | float:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no number, wanted something like {example}") from error
