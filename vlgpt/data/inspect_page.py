"""An `Inspection` as text for a terminal and as one self-contained HTML page. Everything from the data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image

from vlgpt.data.inspect import Inspection, SegmentView, TokenView
from vlgpt.html import page
from vlgpt.images import data_uri, png_bytes

RESET, BOLD, DIM, RED = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m"
TERMINAL_IMAGE_COLUMNS = 16

STYLE = """
body { font: 14px/1.6 system-ui, sans-serif; margin: 2em; max-width: 80em; color: #222; background: #fff }
.segment { border-left: 4px solid #bbb; margin: .6em 0; padding: .2em .8em }
.token { padding: 1px 2px; margin: 1px; border-radius: 3px; background: #eee; color: #777; white-space: pre-wrap }
.token.target { background: #cdeccd; color: #000; font-weight: 600 }
.token.visual { background: #dde; color: #669 }
.token.visual.target { background: #b9d4f5; color: #024 }
.role { color: #a50; font-size: 12px; margin-right: .4em }
.warning { color: #a00 }
img { image-rendering: auto; height: 96px; margin: 4px; vertical-align: middle; border: 1px solid #ccc }
th, td { text-align: left; vertical-align: top; padding: 2px 10px }
"""
PAGE = """{% macro shown(image) %}
{% if image is none %}<span class="warning">no image</span>
{% else %}<img alt="" src="{{ data_uri(png_bytes(image)) }}">{% endif %}
{% endmacro %}
<h1>{{ title }}</h1>
{% for text in inspection.warnings %}<p class="warning">warning: {{ text }}</p>{% endfor %}
{% for row in inspection.rows %}
<h2>batch {{ row.batch }}, row {{ row.row }}</h2>
{% for segment in row.segments %}
<div class="segment"><div><b>segment {{ segment.number }}</b> {{ title_of(segment) }}</div>
{% for role, groups in groups_of(segment) %}
<div><span class="role">{{ role }}</span>
{%- for tokens, image in groups %}
{%- for token in tokens %}<span title="{{ about(token, segment.number) }}"
class="token{{ " target" if token.is_target }}{{ " visual" if token.is_visual }}">{{ token.token }}</span>{% endfor %}
{%- if tokens[0].is_visual %}{{ shown(image) }}{% endif %}
{%- endfor %}</div>
{% endfor %}</div>
{% endfor %}
{% endfor %}
{% if inspection.samples %}<table>
{% for sample in inspection.samples %}
<tr><td>{{ shown(sample.image) }}</td><td>{{ sample.source }} {{ sample.document }}
{% if not sample.is_valid %}<span class="warning">masked</span>{% endif %}<br>
<b>{% if sample.caption %}{{ sample.caption }}{% else %}<i>no text</i>{% endif %}</b>
{% for name, text in sample.tensors.items() %}<div>{{ name }}: {{ text }}</div>{% endfor %}</td></tr>
{% endfor %}</table>{% endif %}
"""


def to_text(inspection: Inspection, *, has_colour: bool = True, is_full: bool = False) -> str:
    """For a terminal: one line per span, targets bold (`*` without colour); `is_full` gives one line per position.

    Control characters in the data are replaced, so that it cannot write to the terminal.
    """
    bold, dim, red, reset = (BOLD, DIM, RED, RESET) if has_colour else ("", "", "", "")
    lines = [f"{red}warning: {_plain(text)}{reset}" for text in inspection.warnings]
    for row in inspection.rows:
        lines.append(f"{bold}batch {row.batch}, row {row.row}{reset}")
        for segment in row.segments:
            lines.append(f"  segment {segment.number}  {_plain(_title(segment))}")
            lines += [
                f"    {line}" for line in _segment_lines(segment, has_colour=has_colour, is_full=is_full)
            ]
    for sample in inspection.samples:
        state = "" if sample.is_valid else " MASKED"
        lines.append(
            f"{bold}batch {sample.batch}{state}{reset} {_plain(f'{sample.source} {sample.document}: {sample.caption}')}"
        )
        lines += [f"  {dim}{name}: {text}{reset}" for name, text in sample.tensors.items()]
        lines += _blocks(sample.image) if has_colour else []
    return "\n".join(lines) + "\n"


def _segment_lines(segment: SegmentView, *, has_colour: bool, is_full: bool) -> list[str]:
    lines: list[str] = []
    images = iter(segment.images)
    if is_full:
        for t in segment.tokens:
            target = f"target {t.weight:.3g}" if t.is_target else "-"
            lines.append(f"{t.position:5d} {t.token_id:6d} {t.role:9s} {target:12s} {_plain(t.token)}")
        return lines
    for role, tokens in _spans(segment.tokens):
        lines.append(f"{role:9s} {' '.join(_marked(token, has_colour=has_colour) for token in tokens)}")
        for is_visual, _ in groupby(tokens, key=lambda token: token.is_visual):
            if is_visual and has_colour:
                lines += _blocks(next(images, None))
    return lines


def _spans(tokens: Sequence[TokenView]) -> list[tuple[str, list[TokenView]]]:
    return [(role, list(group)) for role, group in groupby(tokens, key=lambda token: token.role)]


def _marked(token: TokenView, *, has_colour: bool) -> str:
    text = _plain(token.token)
    if has_colour:
        return f"{BOLD}{text}{RESET}" if token.is_target else f"{DIM}{text}{RESET}"
    return f"{text}*" if token.is_target else text


def _plain(text: str) -> str:
    """Text without control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _blocks(image: Image.Image | None) -> list[str]:
    """A small image of half blocks in 24-bit colour."""
    if image is None:
        return []
    width = TERMINAL_IMAGE_COLUMNS
    height = max(2, round(width * image.height / image.width) // 2 * 2)
    small = image.convert("RGB").resize((width, height))
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(width):
            top, bottom = small.getpixel((x, y)), small.getpixel((x, y + 1))
            assert isinstance(top, tuple) and isinstance(bottom, tuple)
            cells.append(
                f"\x1b[38;2;{top[0]};{top[1]};{top[2]};48;2;{bottom[0]};{bottom[1]};{bottom[2]}m\u2580"
            )
        lines.append("".join(cells) + RESET)
    return lines


def _title(segment: SegmentView) -> str:
    if not segment.number:
        return segment.note
    num_targets = sum(token.is_target for token in segment.tokens)
    where = f"{segment.source} {segment.document} (key {segment.key})"
    counts = f"{len(segment.tokens)} positions, {num_targets} targets"
    return f"{where}: {counts}{'; ' + segment.note if segment.note else ''}"


def to_html(inspection: Inspection, *, title: str = "vlgpt inspect") -> str:
    """One page without scripts or links; hovering over a token shows everything about it."""
    return page(
        PAGE,
        title=title,
        style=STYLE,
        inspection=inspection,
        title_of=_title,
        groups_of=_groups,
        about=_about,
        data_uri=data_uri,
        png_bytes=png_bytes,
    )


def _groups(segment: SegmentView) -> list[tuple[str, list[tuple[list[TokenView], Image.Image | None]]]]:
    """The spans of a segment: role, and its runs of text and of visual tokens, these with their image."""
    images = iter(segment.images)
    spans = []
    for role, tokens in _spans(segment.tokens):
        runs = [
            (is_visual, list(run)) for is_visual, run in groupby(tokens, key=lambda token: token.is_visual)
        ]
        spans.append((role, [(run, next(images, None) if is_visual else None) for is_visual, run in runs]))
    return spans


def _about(token: TokenView, segment: int) -> str:
    target = f"target, weight {token.weight:.3g}" if token.is_target else "no target"
    return f"position {token.position}, id {token.token_id}, segment {segment}, {token.role}, {target}"
