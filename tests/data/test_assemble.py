"""Laws of assembly: what is planned from lengths is what is rendered, and nothing is cut that must not be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.small_data import NUM_VISUAL, WORDS, chat, lengths_of, make_tokenizer, page, pair
from vlgpt.data.assemble import Assembler, LengthMismatch, PartLengths, SequencePlan
from vlgpt.data.mixture import Draws
from vlgpt.document import ROLES, Document, ImagePart, Part, TextPart
from vlgpt.errors import UserError
from vlgpt.settings import SourceSettings

TOKENIZER = make_tokenizer()
IMAGE = NUM_VISUAL + 2


def assembler(length: int = 64, **options: Any) -> Assembler:
    source = SourceSettings(name="s", path="x", **options)
    return Assembler(source, tokenizer=TOKENIZER, sequence_length=length)


def part_lengths(document: Document) -> PartLengths:
    return PartLengths(
        [IMAGE if isinstance(p, ImagePart) else len(TOKENIZER.encode_text(p.text)) for p in document.parts],
        [isinstance(p, ImagePart) for p in document.parts],
        bytes(ROLES.index(p.role) for p in document.parts),
    )


def plain(*parts: str | int) -> Document:
    """Numbers are texts of so many words, "i" is an image."""
    made: list[Part] = []
    for part in parts:
        if part == "i":
            made.append(ImagePart(sum(isinstance(p, ImagePart) for p in made)))
        else:
            made.append(TextPart(" ".join(WORDS[: int(part)])))
    return Document("d", "s", tuple(made))


def plan(document: Document, key: int = 0, length: int = 64, **options: Any) -> SequencePlan:
    return assembler(length, **options).plan(part_lengths(document), Draws(key))


documents = st.one_of(
    st.integers(0, 10**6).map(pair), st.integers(0, 10**6).map(page), st.integers(0, 10**6).map(chat)
)


@given(
    document=documents,
    key=st.integers(0, 2**64 - 1),
    length=st.integers(IMAGE + 2, 130),
    image_first=st.sampled_from([0.0, 0.5, 1.0]),
    start=st.sampled_from(["beginning", "random"]),
    max_images=st.integers(1, 5),
)
@settings(max_examples=400, deadline=None)
def test_what_is_planned_is_what_is_rendered(
    document: Document, key: int, length: int, image_first: float, start: str, max_images: int
) -> None:
    maker = assembler(length, image_first=image_first, start=start, max_images=max_images)
    found = maker.plan(part_lengths(document), Draws(key))
    assert bool(found.rejection) != bool(found.parts)
    if found.rejection:
        return
    sequence = maker.render(found, document)
    assert len(sequence.token_ids) == found.length <= length
    assert sequence.is_target.any()
    assert not sequence.is_target[0]
    assert len(sequence.images) <= max_images
    assert sequence.is_visual.sum() == len(sequence.images) * NUM_VISUAL
    assert list(sequence.images) == sorted(set(sequence.images))
    is_begin = sequence.token_ids == TOKENIZER.begin_image_id
    assert is_begin.sum() == (sequence.token_ids == TOKENIZER.end_image_id).sum() == len(sequence.images)
    assert maker.plan(part_lengths(document), Draws(key)) == found


@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=30), keep=st.sampled_from([0.0, 1.0]))
@settings(max_examples=60, deadline=None)
def test_many_at_once_agree_with_one_by_one(numbers: list[int], keep: float) -> None:
    made = [(pair, page, chat)[n % 3](n) for n in numbers] + [Document("empty", "s", ())]
    lengths = lengths_of(made, TOKENIZER)
    maker = assembler(48, keep_single_image=keep, max_images=2)
    samples = np.arange(len(made))[::-1]
    length, is_whole = maker.whole_lengths(lengths, samples)
    for sample, found, is_known in zip(samples.tolist(), length.tolist(), is_whole.tolist()):
        assert lengths.parts(sample) == part_lengths(made[sample])
        if is_known:
            single = maker.plan(lengths.parts(sample), Draws(7))
            assert (single.length, single.rejection, single.num_dropped_images) == (found, "", 0)
        else:
            assert found == 0


def test_a_short_document_is_taken_whole_and_ends() -> None:
    document = plain("i", 5, "i", 3)
    assert plan(document) == SequencePlan((0, 1, 2, 3), 2 + 2 * IMAGE + 8)
    sequence = assembler().render(plan(document), document)
    assert sequence.token_ids[0] == TOKENIZER.bos_id
    assert sequence.token_ids[-1] == TOKENIZER.eos_id
    assert sequence.is_target[-1]


def test_an_image_is_never_cut_and_text_is_cut_only_at_the_end() -> None:
    assert plan(plain(5, "i", "i"), length=2 + 5 + IMAGE + IMAGE - 1) == SequencePlan(
        (0, 1), 6 + IMAGE, None, False
    )
    found = plan(plain("i", 30, 4), length=20)
    assert found == SequencePlan((0, 1), 19, 18 - IMAGE, False)


def test_a_sequence_that_stops_early_has_no_end_token() -> None:
    document = plain("i", 30)
    sequence = assembler(20).render(plan(document, length=20), document)
    assert sequence.token_ids[-1] != TOKENIZER.eos_id
    assert len(sequence.token_ids) == 19


def test_images_change_places_with_their_text_by_chance() -> None:
    document = plain("i", 2, "i", "i", 3)
    assert plan(document, image_first=1.0).parts == (0, 1, 2, 3, 4)
    assert plan(document, image_first=0.0).parts == (1, 0, 2, 4, 3)
    swaps = sum(plan(plain("i", 2), key, image_first=0.3).parts == (1, 0) for key in range(2000))
    assert 0.65 < swaps / 2000 < 0.75
    orders = {plan(plain("i", 2, "i", 2), key, image_first=0.5).parts for key in range(60)}
    assert len(orders) == 4  # every image has its own draw


@pytest.mark.parametrize(("length", "num_seen"), [(130, 8), (60, 7)])
def test_every_image_of_a_window_with_too_many_has_the_same_chance_to_stay(
    length: int, num_seen: int
) -> None:
    """A page of 8 images that fits, and one whose window ends in the text before the last."""
    document = plain(*["i", 2] * 7, 0 if num_seen == 8 else 40, "i", 2)
    maker, parts = assembler(length, max_images=5), part_lengths(document)
    stayed: Counter[int] = Counter()
    for key in range(4000):
        found = maker.plan(parts, Draws(key))
        images = [part for part in found.parts if parts.is_image[part]]
        assert len(images) == 5
        assert found.num_dropped_images == num_seen - 5
        stayed.update(images)
    assert len(stayed) == num_seen
    assert all(abs(count / 4000 - 5 / num_seen) < 0.04 for count in stayed.values())


def test_images_left_out_leave_their_text_and_the_order_and_cost_no_place() -> None:
    document = plain(*["i", 2] * 8, 100)
    for key in range(50):
        found = plan(document, key, length=60, max_images=3, image_first=0.5)
        texts = [part for part in found.parts if not part_lengths(document).is_image[part]]
        assert texts == [*range(1, 17, 2), 16]
        assert (found.length, found.last_tokens) == (59, 60 - 2 - 3 * IMAGE - 16)
        images = assembler(60, max_images=3).render(found, document).images
        assert list(images) == sorted(images)


def test_a_random_window_begins_at_part_borders_and_can_reach_the_end() -> None:
    document = plain("i", 10, "i", 10, "i", 10, "i", 10)
    length = 2 + 2 * (10 + IMAGE)
    found = [plan(document, key, length=length, start="random") for key in range(300)]
    firsts = {p.parts[0] for p in found if not p.rejection}
    assert firsts >= {0, 1, 2, 3, 4}
    assert any(7 in p.parts and p.has_end for p in found)
    assert all(p.parts == tuple(range(p.parts[0], p.parts[-1] + 1)) for p in found if not p.rejection)
    assert {plan(document, key, length=length).parts[0] for key in range(50)} == {0}


def test_single_images_are_kept_with_the_given_probability() -> None:
    kept = [not plan(plain("i", 4), key, keep_single_image=0.2).rejection for key in range(3000)]
    assert 0.17 < np.mean(kept) < 0.23
    assert plan(plain("i", 4), keep_single_image=0.0).rejection == "single_image"
    assert not plan(plain("i", 4, "i", 4), keep_single_image=0.0).rejection
    assert not plan(plain(4), keep_single_image=0.0).rejection


def test_a_window_without_its_documents_images_is_rejected() -> None:
    assert plan(plain(100, "i"), length=40).rejection == "no_image_in_window"
    assert not plan(plain(100), length=40).rejection


def test_nothing_gives_no_sequence() -> None:
    assert plan(Document("d", "s", ())).rejection == "empty"
    assert plan(Document("d", "s", (TextPart(""),))).rejection == "empty"


def exchange(question: int, answer: int | str) -> tuple[Part, ...]:
    reply = (
        ImagePart(0, "assistant") if answer == "i" else TextPart(" ".join(WORDS[: int(answer)]), "assistant")
    )
    return TextPart(" ".join(WORDS[:question]), "user"), reply


def conversation(*exchanges: tuple[Part, ...]) -> Document:
    return Document("d", "s", sum(exchanges, ()))


def test_a_chat_is_cut_after_the_last_reply_that_fits() -> None:
    document = conversation(exchange(3, 4), exchange(2, 5), exchange(1, 9))
    # per exchange: USER: question ASSISTANT: reply end
    lengths = [1 + 3 + 7, 1 + 3 + 7 + 3 + 7, 1 + 3 + 7 + 3 + 7 + 3 + 10]
    for limit, parts in ((lengths[2], 6), (lengths[2] - 1, 4), (lengths[1], 4), (lengths[1] - 1, 2)):
        found = plan(document, length=limit)
        assert (found.parts, found.length, found.has_end) == (
            tuple(range(parts)),
            lengths[parts // 2 - 1],
            True,
        )
        assert assembler(limit).render(found, document).token_ids[-1] == TOKENIZER.eos_id


def test_a_first_reply_that_is_too_long_is_cut_without_an_end() -> None:
    document = conversation(exchange(3, 40), exchange(1, 1))
    found = plan(document, length=20)
    assert (found.parts, found.length, found.last_tokens, found.has_end) == ((0, 1), 20, 20 - 6, False)
    sequence = assembler(20).render(found, document)
    assert sequence.is_target.sum() == 14
    assert TOKENIZER.eos_id not in sequence.token_ids[1:]


def test_a_chat_without_room_or_without_reply_is_rejected_by_name() -> None:
    assert plan(conversation(exchange(30, 4)), length=20).rejection == "too_long"
    assert plan(conversation(exchange(8, "i")), length=12).rejection == "too_long"
    assert plan(Document("d", "s", (TextPart("w1", "user"),))).rejection == "no_target"
    three = (ImagePart(0, "user"), ImagePart(1, "user"), TextPart("w1", "assistant"))
    assert plan(Document("d", "s", three), max_images=1).rejection == "too_many_images"


def test_only_replies_are_targets_in_a_chat() -> None:
    document = chat(3)
    maker = assembler(130)
    sequence = maker.render(maker.plan(part_lengths(document), Draws(0)), document)
    replies = [p.text for p in document.parts if isinstance(p, TextPart) and p.role == "assistant"]
    wanted = sum(len(TOKENIZER.encode_text(reply)) + 1 for reply in replies)
    assert sequence.is_target.sum() == wanted
    assert not (sequence.is_target & sequence.is_visual).any()


def test_another_text_than_the_indexed_one_is_noticed() -> None:
    document = plain("i", 5)
    with pytest.raises(LengthMismatch):
        assembler().render(plan(plain("i", 6)), document)


def test_rows_too_short_for_one_image_are_refused() -> None:
    with pytest.raises(UserError, match="sequence_length"):
        assembler(IMAGE + 1)


def test_draws_are_uniform_and_addressed() -> None:
    values = np.array([[Draws(key).uniform(purpose) for purpose in range(20)] for key in range(500)])
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(np.histogram(values, bins=10, range=(0, 1))[0] / 10_000 - 0.1).max() < 0.012
    assert len(np.unique(values)) == values.size
    assert {Draws(key).below(3, 0) for key in range(50)} == {0, 1, 2}
