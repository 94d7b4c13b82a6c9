"""Laws of conversations: what is said is what the model reads, and what is saved is what was said."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace

import pytest
import torch

from tests.helpers.chat_parts import new_generator, picture_bytes
from vlgpt.chat import files
from vlgpt.chat.dialogue import Dialogue, Picture, Turn, interleave
from vlgpt.chat.reply import Drawn, Failed, Finished, Notice, Request, TextPiece, answer
from vlgpt.chat.terminal import Terminal, printable
from vlgpt.decoding.api import DecodeSettings, Prompt
from vlgpt.decoding.generator import Generator
from vlgpt.document import ImagePart, TextPart
from vlgpt.errors import UserError

SETTINGS = DecodeSettings(max_new_tokens=12)
DRAW = DecodeSettings(images="force")


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    return new_generator(tmp_path_factory.mktemp("parts"))


def ask(generator: Generator, dialogue: Dialogue, settings: DecodeSettings = SETTINGS) -> list:
    events: list = []
    answer(generator, [Request(dialogue, settings, events.append)])
    return events


def picture(seed: int) -> Picture:
    return Picture.read(picture_bytes(seed))


def a_conversation(generator: Generator) -> Dialogue:
    """Picture in, picture out, text in between: two exchanges."""
    asked = Dialogue().asking(picture(1), "what is in the picture")
    asked = asked.answered(ask(generator, asked)[-1].turn).asking("draw it", picture(2), "like this")
    return asked.answered(ask(generator, asked, DRAW)[-1].turn)


def test_the_model_reads_turns_in_order_and_its_own_drawings_as_it_predicted_them(generator):
    dialogue = a_conversation(generator).asking("and now?")
    prompt = dialogue.prompt()
    kinds = [(type(part), part.role) for part in prompt.document.parts]
    assert kinds[:2] == [(ImagePart, "user"), (TextPart, "user")]
    assert kinds[-1] == (TextPart, "user")
    drawing = dialogue.turns[3].pictures[0]
    reply = generator.generate([dialogue.up_to(3).prompt()], DRAW)[0]
    torch.testing.assert_close(drawing.visual, reply.visual[0], atol=1e-5, rtol=0)
    assert prompt.images[-1] == ("visual", drawing.visual)
    assert prompt.images[0] == picture_bytes(1)


def test_a_reply_is_what_the_generator_gives_for_the_same_document(generator):
    dialogue = Dialogue().asking(picture(3), "what is in the picture")
    document = replace(dialogue.prompt().document, id="other")
    wanted = generator.generate([Prompt(document, (picture_bytes(3),))], SETTINGS)[0]
    events = ask(generator, dialogue)
    assert isinstance(events[-1], Finished)
    assert events[-1].turn.text == wanted.text
    pieces = "".join(event.text for event in events if isinstance(event, TextPiece))
    assert pieces == wanted.text
    drawn = [event.picture for event in events if isinstance(event, Drawn)]
    assert drawn == list(events[-1].turn.pictures)


def test_replies_and_pictures_do_not_depend_on_who_else_asks(generator):
    settings = DecodeSettings(max_new_tokens=10, temperature=1.0, seed=5, max_images=2)
    dialogues = [Dialogue().asking(picture(n), f"question {'very ' * n} long") for n in range(5)]
    alone = [ask(generator, dialogue, settings)[-1].turn for dialogue in dialogues]
    heard: list[list] = [[] for _ in dialogues]
    answer(generator, [Request(d, settings, h.append) for d, h in zip(dialogues, heard)])
    for single, events in zip(alone, heard):
        together = events[-1].turn
        assert together.text == single.text
        assert [p.data for p in together.pictures] == [p.data for p in single.pictures]
    assert len({turn.text for turn in alone}) > 1


def test_a_bad_request_spoils_no_other(generator):
    good = Dialogue().asking("hello there")
    wanted = ask(generator, good)[-1].turn
    heard: list[list] = [[] for _ in range(4)]
    broken = Dialogue((Turn("user", (Picture(b"no picture"), "x")),))
    endless = Dialogue().asking("very " * 900)
    requests = [Request(d, SETTINGS, h.append) for d, h in zip((broken, good, endless, good), heard)]
    requests[3].cancel()
    answer(generator, requests)
    assert isinstance(heard[0][-1], Failed) and heard[0][-1].kind == "bad_request"
    assert heard[1][-1].turn == wanted
    assert heard[2][-1].kind == "bad_request" and "positions" in heard[2][-1].message
    assert [event.kind for event in heard[3]] == ["cancelled"]


def test_a_fault_while_pictures_are_encoded_ends_its_request_only(generator, monkeypatch):
    def fail(images):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generator, "tokenize", fail)
    heard: list[list] = [[], []]
    dialogues = Dialogue().asking(picture(1), "what?"), Dialogue().asking("hello there")
    answer(generator, [Request(d, SETTINGS, h.append) for d, h in zip(dialogues, heard)])
    assert heard[0][-1].kind == "internal" and "out of memory" not in heard[0][-1].message
    assert isinstance(heard[1][-1], Finished)


def test_a_full_context_is_trimmed_at_turn_borders_and_the_user_is_told(generator):
    turns = []
    for number in range(12):
        turns += [Turn("user", (picture(number), f"question number {number}"))]
        turns += [Turn("assistant", (f"answer {number}",))]
    events = ask(generator, Dialogue((*turns, Turn("user", ("and in the end?",)))))
    assert isinstance(events[0], Notice) and "no longer read" in events[0].text
    assert isinstance(events[-1], Finished)
    assert events[-1].num_prompt_positions <= generator.max_length - 12
    assert not [event for event in ask(generator, Dialogue(tuple(turns[:3]))) if isinstance(event, Notice)]


def test_speakers_alternate_and_only_user_turns_are_edited(generator):
    dialogue = Dialogue().asking(picture(1), "one").answered(Turn("assistant", ("yes",))).asking("two")
    edited = dialogue.edited(0, "other words")
    assert edited.turns == (Turn("user", (dialogue.turns[0].content[0], "other words")),)
    pieces = Dialogue().asking("a", picture(1), "b")
    assert pieces.edited(0, "c", instead_of="b").turns[0].content == ("a", picture(1), "c")
    for wrong in (
        lambda: dialogue.asking("three"),
        lambda: dialogue.up_to(1).answered(Turn("user", ("x",))),
        lambda: Dialogue().asking(),
        lambda: dialogue.edited(1, "x"),
        lambda: dialogue.edited(9, "x"),
        lambda: dialogue.up_to(2).prompt(),
        lambda: interleave("<image> and <image>", [picture(0)]),
    ):
        with pytest.raises(UserError):
            wrong()
    assert [type(c) for c in interleave("a <image> b", [picture(0)])] == [str, Picture, str]


@pytest.mark.parametrize("way", ["folder", "zip"])
def test_a_saved_dialogue_goes_on_as_if_it_had_never_been_closed(way, generator, tmp_path):
    dialogue = a_conversation(generator)
    if way == "folder":
        files.save(dialogue, tmp_path / "d", info={"model": "m"})
        found = files.load(tmp_path / "d")
        names = sorted(path.name for path in (tmp_path / "d").glob("*.png"))
        assert len(names) == sum(len(turn.pictures) for turn in dialogue.turns) >= 3
    else:
        (tmp_path / "d.zip").write_bytes(files.to_zip(dialogue))
        found = files.load(tmp_path / "d.zip")
        assert files.to_zip(dialogue) == files.to_zip(dialogue)
    assert [turn.text for turn in found.turns] == [turn.text for turn in dialogue.turns]
    before, after = (ask(generator, d.asking("and now?"))[-1].turn for d in (dialogue, found))
    assert before.text == after.text
    assert [p.data for p in before.pictures] == [p.data for p in after.pictures]


def test_damaged_dialogue_files_are_refused_in_one_sentence(generator, tmp_path):
    good = files.to_files(a_conversation(generator))
    record = json.loads(good[files.RECORD])

    def zipped(**changes: bytes | None) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in {**good, **changes}.items():
                if data is not None:
                    archive.writestr(name, data)
        return buffer.getvalue()

    def with_file(name: str) -> bytes:
        changed = json.loads(json.dumps(record))
        changed["turns"][0]["content"][0]["file"] = name
        return json.dumps(changed).encode()

    first = record["turns"][0]["content"][0]["file"]
    cases = {
        "no zip": b"PK nonsense",
        "record": zipped(**{files.RECORD: b"{"}),
        "outside": zipped(**{files.RECORD: with_file("../../etc/passwd")}),
        "absolute": zipped(**{files.RECORD: with_file("/etc/passwd")}),
        "missing": zipped(**{files.RECORD: with_file("other.png")}),
        "picture": zipped(**{first: b"not a picture"}),
        "embeddings": zipped(**{files.EMBEDDINGS: b"\x00" * 40}),
        "no embeddings": zipped(**{files.EMBEDDINGS: None}),
    }
    assert files.from_zip(zipped()).turns
    for name, data in cases.items():
        with pytest.raises(UserError) as caught:
            files.from_zip(data)
        assert "\n" not in str(caught.value), name
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(files.RECORD, b" " * (files.MAX_FILE_BYTES + 10))
    with pytest.raises(UserError, match="larger than"):
        files.from_zip(bomb.getvalue())
    with pytest.raises(FileNotFoundError, match="no saved dialogue"):
        files.load(tmp_path)


def talk(generator: Generator, tmp_path, lines: list[str], **options) -> tuple[Terminal, str]:
    written: list[str] = []
    terminal = Terminal(generator, SETTINGS, output=tmp_path / "out", write=written.append, **options)
    terminal.run(iter(lines))
    return terminal, "".join(written)


def test_the_terminal_attaches_draws_undoes_and_saves(generator, tmp_path):
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    lines = [f"/image {tmp_path}/a.png", "what is <image> in the picture", "/draw a red circle"]
    terminal, text = talk(generator, tmp_path, [*lines, f"/save {tmp_path}/saved"])
    kinds = [type(item) for item in terminal.dialogue.turns[0].content]
    assert kinds == [str, Picture, str]
    drawings = sorted((tmp_path / "out").glob("*.png"))
    assert terminal.dialogue.turns[3].pictures[0].data == drawings[-1].read_bytes()
    assert all(str(path) in text for path in drawings)
    assert all(
        printable(piece) in text for piece in terminal.dialogue.turns[1].content if isinstance(piece, str)
    )
    again, _ = talk(generator, tmp_path, [f"/load {tmp_path}/saved", "/undo", "/draw a red circle"])
    assert again.dialogue.turns[3].pictures[0].data == drawings[-1].read_bytes()
    assert len(sorted((tmp_path / "out").glob("*.png"))) == len(drawings) + 1
    fresh, _ = talk(generator, tmp_path, ["hello there", "/undo", "/quit", "never read"])
    assert fresh.dialogue == Dialogue()


def test_the_terminal_regenerates_with_the_seed_and_edits_with_the_pictures(generator, tmp_path):
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    start = ["/temperature 1.5", f"/image {tmp_path}/a.png", "what is it"]
    first, _ = talk(generator, tmp_path, start)
    second, _ = talk(generator, tmp_path, [*start, "/seed 3", "/again"])
    third, _ = talk(generator, tmp_path, [*start, "/seed 3", "/again", "/seed 0", "/again"])
    replies = [t.dialogue.turns[1].text for t in (first, second, third)]
    assert replies[0] != replies[1] and replies[0] == replies[2]
    edited, _ = talk(generator, tmp_path, [*start, "/edit something else"])
    assert edited.dialogue.turns[0].text == "something else"
    assert len(edited.dialogue.turns[0].pictures) == 1 and len(edited.dialogue.turns) == 2


def test_mistakes_in_the_terminal_are_one_line_and_change_nothing(generator, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    wrong = ["/seed x", "/nothing", "/image /no/such.png", f"/image {tmp_path}/bad.png", "/again", "/undo"]
    wrong += [
        "/edit x",
        "/save",
        "/load /no/where",
        "/guidance",
        "/temperature -1",
        "<image> where?",
        "/draw",
    ]
    terminal, text = talk(generator, tmp_path, wrong)
    assert text.count("error: ") == len(wrong)
    assert terminal.dialogue == Dialogue()
    assert len(text.splitlines()) == len(wrong) + 1


def test_what_a_model_writes_cannot_drive_the_terminal(generator, tmp_path):
    terminal, _ = talk(generator, tmp_path, [])
    written: list[str] = []
    terminal._write = written.append
    terminal._show(TextPiece("a\x1b[2Jb\x07c\r\nd"), [])
    assert written == ["a[2Jbc\nd"]
