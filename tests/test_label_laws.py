"""Label laws: what is predicted is exactly the answers, their end tokens and the embeddings of their images.

The expected labels are written down here from the templates alone; then text goes through the tokenizer, the packer's
rows and the one shift of `targets_of`. `make mutants` breaks these steps.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.chat_tokenizers import SMOLLM2
from tests.helpers.tiny_unified import NUM_VISUAL, TEXTS, VISUAL_WIDTH, new_document_tokenizer
from vlgpt.data.collate import collate_rows
from vlgpt.data.samples import LoadedSequence
from vlgpt.document import Document, ImagePart, Part, TextPart, text_places
from vlgpt.models.losses import TargetPositions, count_targets, targets_of
from vlgpt.tokens import DocumentTokenizer, flatten
from vlgpt.turns import TEMPLATES

Label = tuple[str, int]  # ("text", token id) or ("visual", number of the embedding in the batch)
LENGTH = 1024


def tokenizer_of(template: str) -> DocumentTokenizer:
    tokenizer = new_document_tokenizer()
    tokenizer.text_tokenizer.chat_template = SMOLLM2
    return DocumentTokenizer(tokenizer.text_tokenizer, num_visual=NUM_VISUAL, template=template)


def fuzz(random: np.random.Generator, number: int) -> Document:
    """A chat of 1 to 4 exchanges, or a plain document, with texts and images in any order on any side."""
    words = " ".join(TEXTS).split()
    parts: list[Part] = []
    num_images = 0
    is_chat = random.random() < 0.7
    turns = ["user", "assistant"] * int(random.integers(1, 4)) if is_chat else ["plain"]
    if is_chat and random.random() < 0.2:
        turns = turns[:-1]  # nobody answers
    for role in turns:
        for _ in range(int(random.integers(1, 4))):
            if random.random() < 0.35:
                parts.append(ImagePart(num_images, role))
                num_images += 1
            else:
                parts.append(TextPart(" ".join(random.choice(words, int(random.integers(1, 7)))), role))
    return Document(f"d{number}", "test", tuple(parts))


def expected_labels(
    document: Document, tokenizer: DocumentTokenizer, first_image: int
) -> list[tuple[Label, bool]]:
    """Every position of a rendered document and whether it is predicted, from the ids around turns alone.

    (tests/test_turns.py holds these against `apply_chat_template`.)
    """
    turns = tokenizer.turns
    places = text_places([part.role for part in document.parts])

    def fixed(ids: tuple[int, ...], is_predicted: bool = False) -> list[tuple[Label, bool]]:
        return [(("text", token), is_predicted) for token in ids]

    def content(at: int, is_answer: bool) -> list[tuple[Label, bool]]:
        part = document.parts[at]
        if isinstance(part, ImagePart):
            first = (first_image + part.index) * NUM_VISUAL
            inside: list[Label] = [("visual", first + slot) for slot in range(NUM_VISUAL)]
            span: list[Label] = [
                ("text", tokenizer.begin_image_id),
                *inside,
                ("text", tokenizer.end_image_id),
            ]
            return [(label, is_answer) for label in span]
        ids = tokenizer.encode_text(part.text, places[at])
        before = document.parts[at - 1] if at else part
        if places[at] in turns.bare and before.role == part.role and isinstance(before, TextPart) and at:
            ids = [*tokenizer.encode_text("\n", places[at]), *ids]
        return [(("text", token), is_answer) for token in ids]

    if not document.is_chat:
        body = [label for at in range(len(document.parts)) for label in content(at, True)]
        return [*fixed((tokenizer.bos_id,)), *body, *fixed((tokenizer.eos_id,), True)]
    result = fixed(turns.system + turns.first)
    for at, part in enumerate(document.parts):
        is_answer = part.role == "assistant"
        is_last = at + 1 == len(document.parts)
        if at and document.parts[at - 1].role != part.role:
            result += fixed(turns.reply if is_answer else turns.user)
        result += content(at, is_answer)
        if is_answer and (is_last or document.parts[at + 1].role != part.role):
            result += fixed(turns.end, True)
        if is_last:
            result += fixed(turns.tail if is_answer else turns.user_end)
    return result


def found_labels(targets: TargetPositions) -> list[tuple[int, Label]]:
    """(position that predicts, what it predicts), by position."""
    text = zip(targets.text_from.tolist(), [("text", token) for token in targets.text_ids.tolist()])
    visual = zip(targets.visual_from.tolist(), [("visual", row) for row in targets.visual_rows.tolist()])
    return sorted([*text, *visual])


@pytest.mark.parametrize("template", [*TEMPLATES, "own"])
def test_targets_are_exactly_the_answers_with_their_end_tokens_and_images(template):
    """Fuzzed documents are packed into rows; every single label is compared."""
    tokenizer = tokenizer_of(template)
    random = np.random.default_rng(7)
    for round_number in range(6):
        rows, expected, num_answer_images, num_images = [], [], 0, 0
        for row in range(2):
            loaded, at = [], row * LENGTH
            for number in range(3):
                document = fuzz(random, number)
                labels = expected_labels(document, tokenizer, num_images)
                sequence = flatten(tokenizer.spans(document))
                if at - row * LENGTH + len(labels) > LENGTH:
                    continue
                expected += [(at + i - 1, label) for i, (label, is_target) in enumerate(labels) if is_target]
                answers = [p for p in document.parts if isinstance(p, ImagePart) and p.role != "user"]
                num_answer_images += len(answers)
                num_images += document.num_images
                images = np.zeros((document.num_images, NUM_VISUAL, VISUAL_WIDTH), np.float32)
                loaded.append(
                    LoadedSequence(document.id, 0, sequence, images if document.num_images else None, 0)
                )
                at += len(labels)
            rows.append(loaded)
        batch = collate_rows(
            rows, sequence_length=LENGTH, kind="visual" if num_images else None, num_visual=NUM_VISUAL
        )
        assert found_labels(targets_of(batch)) == sorted(expected), f"round {round_number}"
        counts = count_targets(batch)
        assert counts["visual"] == NUM_VISUAL * num_answer_images
        assert counts["text"] + counts["visual"] == len(expected)


def test_there_are_five_templates_and_the_fuzz_reaches_every_kind_of_document():
    assert len(TEMPLATES) == 5
    random = np.random.default_rng(7)
    documents = [fuzz(random, number) for number in range(36)]
    sides = {(part.role, type(part).__name__) for document in documents for part in document.parts}
    assert len(sides) == 6
    assert any(document.is_chat and document.parts[-1].role == "user" for document in documents)
    assert any(document.num_images >= 4 for document in documents)


@pytest.mark.parametrize("template", [*TEMPLATES, "own"])
def test_an_answer_is_predicted_from_just_what_a_prompt_shows(template):
    """The rendering of the prompt is the beginning of the rendering with the reply: training and chat cannot drift."""
    tokenizer = tokenizer_of(template)
    random = np.random.default_rng(1)
    checked = 0
    for number in range(40):
        document = fuzz(random, number)
        if not document.is_chat or document.parts[-1].role != "assistant":
            continue
        last = max(at for at, part in enumerate(document.parts) if part.role == "user")
        asked = Document("p", "test", document.parts[: last + 1])
        prompt = flatten(tokenizer.spans(asked, is_prompt=True)).token_ids
        whole = flatten(tokenizer.spans(document))
        assert whole.token_ids[: len(prompt)].tolist() == prompt.tolist()
        end, size = tokenizer.reply_end_ids, len(whole.token_ids) - len(tokenizer.turns.tail)
        assert whole.is_target[len(prompt) : size].all()
        assert not whole.is_target[size:].any()
        assert tuple(whole.token_ids[size - len(end) : size].tolist()) == end
        checked += 1
    assert checked >= 10


def test_boundary_tokens_are_left_out_when_the_setting_says_so():
    base = new_document_tokenizer()
    tokenizer = DocumentTokenizer(
        base.text_tokenizer, num_visual=NUM_VISUAL, template="short", is_boundary_target=False
    )
    document = Document("d", "test", (TextPart("draw", "user"), ImagePart(0, "assistant")))
    sequence = flatten(tokenizer.spans(document))
    assert sequence.is_target.sum() == NUM_VISUAL + 1
    assert (sequence.is_target & sequence.is_visual).sum() == NUM_VISUAL
