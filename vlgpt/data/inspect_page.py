"""An `Inspection` as text for a terminal and as one self-contained HTML page. Everything from the data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from PIL import Image

from vlgpt.data.inspect import Inspection, RowView, SampleView, SegmentView, TokenView
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
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


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
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f'<p class="warning">warning: {escape(text)}</p>' for text in inspection.warnings]
    body += [_row_html(row) for row in inspection.rows]
    if inspection.samples:
        body.append("<table>" + "".join(_sample_html(sample) for sample in inspection.samples) + "</table>")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _row_html(row: RowView) -> str:
    parts = [f"<h2>batch {row.batch}, row {row.row}</h2>"]
    for segment in row.segments:
        images = iter(segment.images)
        cells = [f"<div><b>segment {segment.number}</b> {escape(_title(segment))}</div>"]
        for role, tokens in _spans(segment.tokens):
            cells.append(f'<div><span class="role">{escape(role)}</span>')
            for is_visual, group in groupby(tokens, key=lambda token: token.is_visual):
                cells += [_token_html(token, segment.number) for token in group]
                if is_visual:
                    cells.append(_image_html(next(images, None)))
            cells.append("</div>")
        parts.append(f'<div class="segment">{"".join(cells)}</div>')
    return "".join(parts)


def _token_html(token: TokenView, segment: int) -> str:
    kinds = "token" + " target" * token.is_target + " visual" * token.is_visual
    target = f"target, weight {token.weight:.3g}" if token.is_target else "no target"
    about = f"position {token.position}, id {token.token_id}, segment {segment}, {token.role}, {target}"
    return f'<span class="{kinds}" title="{escape(about)}">{escape(token.token)}</span>'


def _sample_html(sample: SampleView) -> str:
    tensors = "".join(f"<div>{escape(name)}: {escape(text)}</div>" for name, text in sample.tensors.items())
    state = "" if sample.is_valid else ' <span class="warning">masked</span>'
    caption = escape(sample.caption) or "<i>no text</i>"
    about = f"{escape(sample.source)} {escape(sample.document)}{state}"
    return f"<tr><td>{_image_html(sample.image)}</td><td>{about}<br><b>{caption}</b>{tensors}</td></tr>"


def _image_html(image: Image.Image | None) -> str:
    if image is None:
        return '<span class="warning">no picture</span>'
    return f'<img alt="" src="{data_uri(png_bytes(image))}">'
