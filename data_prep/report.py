"""An HTML page of random documents as the model will see them: order, roles, and what is to be predicted.

The page is one file without scripts, and what came from data stays text (`vlgpt/html.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlgpt.document import Document, ImagePart
from vlgpt.files import write_atomic
from vlgpt.html import page
from vlgpt.images import BadImage, data_uri, decode_image, png_bytes, thumbnail
from vlgpt.seeds import generator
from vlgpt.shards import BadSample, Sample, ShardSet

if TYPE_CHECKING:
    from vlgpt.tokens import DocumentTokenizer

THUMBNAIL_PX = 160
MAX_TEXT_CHARS = 2000
STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
article { border-top: 1px solid #ccc; padding: .8rem 0 }
h2 { font: 13px monospace; color: #666; margin: 0 0 .4rem }
img { vertical-align: middle; border: 1px solid #ddd; max-width: 100% }
.part { display: inline-block; margin: .15rem }
.text { background: #f2f2f2; border-radius: .2rem; padding: .05rem .3rem }
.text { overflow-wrap: anywhere; white-space: pre-wrap }
.target { outline: 2px solid #2a7 }
.role { font: 11px monospace; color: #888 }
.mark { color: #2a7 }
.bad { color: #b00 }
"""
PAGE = """<h1>{{ title }}</h1>
<p>Parts in reading order. Green: the model is trained to predict it.{% if has_tokenizer %} Shown after
tokenisation, with the chat template.{% endif %}</p>
{% for document in documents %}<article>
<h2>{{ document.source }} &middot; {{ document.key }} &middot; {{ document.id }}</h2>
{% for part in document.parts %}{% if part.begins_line %}<br>{% endif %}<span class="part">
{%- if part.role != "plain" %}<span class="role">{{ part.role }}</span> {% endif %}
{%- if part.image -%}
<img class="{{ 'target' if part.is_target }}" alt="image {{ part.number }}" src="{{ part.image }}">
{%- else -%}
<span class="text {{ 'target' if part.is_target }} {{ 'bad' if part.is_bad }}">
{%- if part.begins_line %}<span class="mark">{{ part.marks }}</span>{% endif %}{{ part.shown_text }}</span>
{%- endif %}</span>
{% endfor %}</article>
{% endfor %}
"""


@dataclass(frozen=True)
class ShownPart:
    """One piece of a document on the page."""

    role: str
    is_target: bool
    text: str = ""
    image: str = ""
    number: int = 0
    is_bad: bool = False

    @property
    def marks(self) -> str:
        """The white space that the text begins with, its line breaks made visible."""
        return self.text[: len(self.text) - len(self.text.lstrip(" \n"))].replace("\n", "\u21b5")

    @property
    def begins_line(self) -> bool:
        """Whether the text begins with a line break: then the part begins a line on the page."""
        return "\u21b5" in self.marks

    @property
    def shown_text(self) -> str:
        """The text without what `marks` shows."""
        return self.text[len(self.marks) :] if self.begins_line else self.text


def write_report(
    path: Path,
    folders: Sequence[Path],
    *,
    count: int,
    seed: int = 0,
    tokenizer: DocumentTokenizer | None = None,
) -> None:
    """Write the page with `count` documents drawn over all folders, with their tokens if there is a `tokenizer`."""
    sets = [ShardSet.open(folder) for folder in folders]
    places = [
        (number, shard, sample)
        for number, shards in enumerate(sets)
        for shard, sample in _draw(shards, count // len(sets) or 1, seed)
    ]
    documents = []
    for number, shard, sample in places:
        shown = {"source": sets[number].name, "key": f"shard {shard}, sample {sample}", "id": ""}
        try:
            read = sets[number].read(shard, sample)
            parts = _parts(read) if tokenizer is None else _tokenised_parts(read, tokenizer)
            documents.append({**shown, "key": read.key, "id": read.document.id, "parts": parts})
        except BadSample as error:
            documents.append({**shown, "parts": [ShownPart("", False, text=str(error), is_bad=True)]})
    title = f"{len(documents)} documents of {', '.join(shards.name for shards in sets)}"
    html = page(PAGE, title=title, style=STYLE, documents=documents, has_tokenizer=tokenizer is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode("utf-8", "replace"))


def _draw(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different samples, in order."""
    chosen = generator(seed, "report", shards.name).permutation(shards.num_samples)[:count]
    places = []
    for position in sorted(chosen.tolist()):
        for shard, record in enumerate(shards.shards):
            if position < record.num_samples:
                places.append((shard, position))
                break
            position -= record.num_samples
    return places


def _parts(sample: Sample) -> list[ShownPart]:
    """Without a tokenizer: pre-training predicts everything, chats predict what the assistant says."""
    shown = []
    for part in sample.document.parts:
        is_target = part.role != "user"
        if isinstance(part, ImagePart):
            shown.append(_image(sample.images[part.index], part.role, is_target, part.index))
        else:
            shown.append(ShownPart(part.role, is_target, text=part.text[:MAX_TEXT_CHARS]))
    return shown


def _tokenised_parts(sample: Sample, tokenizer: DocumentTokenizer) -> list[ShownPart]:
    """The spans of training, decoded again."""
    shown = []
    for span in tokenizer.spans(_shortened(sample.document)):
        is_target = any(span.is_target)
        if span.image is not None:
            shown.append(_image(sample.images[span.image], span.role, is_target, span.image))
        else:
            text = tokenizer.text_tokenizer.decode(list(span.ids))
            shown.append(ShownPart(span.role, is_target, text=text[:MAX_TEXT_CHARS]))
    return shown


def _shortened(document: Document) -> Document:
    parts = tuple(
        part if isinstance(part, ImagePart) else type(part)(part.text[: 4 * MAX_TEXT_CHARS], part.role)
        for part in document.parts
    )
    return Document(document.id, document.source, parts)


def _image(data: bytes, role: str, is_target: bool, number: int) -> ShownPart:
    """A thumbnail. It is encoded here, so no byte of a source file reaches the reader's browser."""
    try:
        image = decode_image(data)
    except BadImage as error:
        return ShownPart(role, is_target, text=f"[image {number}: {error}]", is_bad=True)
    address = data_uri(png_bytes(thumbnail(image, THUMBNAIL_PX)))
    return ShownPart(role, is_target, image=address, number=number)
