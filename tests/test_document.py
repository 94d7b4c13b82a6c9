"""Laws of the one record type: it survives JSON, and what is no document is refused by name."""

import json

import pytest

from vlgpt.document import Document, ImagePart, TextPart

PAGE = (TextPart("a fox"), ImagePart(0), TextPart("and its cubs"), ImagePart(1))
CHAT = (ImagePart(0, "user"), TextPart("what is it?", "user"), TextPart("a fox", "assistant"))


@pytest.mark.parametrize("parts", [(), PAGE, CHAT])
def test_a_document_survives_its_json_form(parts):
    document = Document("x", "toy", parts, {"url": "https://example.org/ä"})
    assert Document.from_record(json.loads(json.dumps(document.to_record()))) == document


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((ImagePart(1),), r"numbered 0, 1, ... in reading order, found \[1\]"),
        ((ImagePart(0), ImagePart(0)), r"found \[0, 0\]"),
        ((ImagePart(1), ImagePart(0)), r"found \[1, 0\]"),
        ((TextPart("hi", "system"),), "unknown role 'system'; valid: plain, user, assistant"),  # type: ignore[arg-type]
        ((TextPart("hi"), TextPart("hi", "user")), "plain parts cannot be mixed"),
    ],
)
def test_what_is_no_document_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Document("x", "toy", parts)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "x", "parts": []}, "missing .*source"),
        ({"id": "x", "source": "toy", "parts": [{"image": True}]}, "`text` string or an `image` number"),
        ({"id": "x", "source": "toy", "parts": [{"text": 7}]}, "found .*7"),
    ],
)
def test_a_bad_record_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Document.from_record(record)
