"""An HTML page as blocks of text and images in reading order (DocBook's HTML; nothing is fetched or run)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

BLOCK_TAGS = frozenset(
    "p li dt dd td th h1 h2 h3 h4 h5 h6 div pre table ul ol dl caption blockquote".split()  # noqa: SIM905
)
HIDDEN_TAGS = frozenset(["head", "script", "style"])
HIDDEN_CLASSES = frozenset(["navheader", "navfooter", "toc"])
FIGURE_CLASSES = frozenset(["figure", "informalfigure"])


@dataclass(slots=True)
class Block:
    """A piece of text, or an image (`source` is set) with its caption. `figure` numbers figures, 0 outside."""

    text: str = ""
    source: str = ""
    caption: str = ""
    figure: int = 0


@dataclass(frozen=True, slots=True)
class HtmlPage:
    """`title` is the first heading, without its number."""

    title: str
    blocks: tuple[Block, ...]


def read_page(html: str) -> HtmlPage:
    """Parse a page; damaged HTML gives what could be read."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.flush()
    number, _, rest = reader.title.partition(" ")
    has_number = rest and number.rstrip(".").replace(".", "").isdigit()
    return HtmlPage(rest if has_number else reader.title, tuple(reader.blocks))


def captioned_images(page: HtmlPage) -> Iterator[list[Block]]:
    """The images of every figure."""
    figures: dict[int, list[Block]] = {}
    for block in page.blocks:
        if block.source and block.figure:
            figures.setdefault(block.figure, []).append(block)
    yield from figures.values()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.title = ""
        self._open: list[tuple[str, frozenset[str]]] = []  # open tags that mean something here
        self._text: list[str] = []
        self._num_figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.flush()
            source = dict(attrs).get("src") or ""
            if source and not self._is_hidden:
                self.blocks.append(
                    Block(source=source, figure=self._num_figures if self._is_in_figure else 0)
                )
        elif tag in BLOCK_TAGS or tag in HIDDEN_TAGS:
            self.flush()
            classes = frozenset((dict(attrs).get("class") or "").split())
            self._num_figures += not classes.isdisjoint(FIGURE_CLASSES)
            self._open.append((tag, classes))

    def handle_endtag(self, tag: str) -> None:
        if not any(name == tag for name, _ in self._open):
            return
        self.flush()
        while self._open.pop()[0] != tag:
            continue

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def flush(self) -> None:
        """End the current piece of text."""
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if not text or self._is_hidden:
            return
        if not self.title and self._open and self._open[-1][0] in ("h1", "h2", "h3", "h4"):
            self.title = text
        if any("caption" in classes for _, classes in self._open) and self.blocks and self.blocks[-1].source:
            self.blocks[-1].caption = text
        self.blocks.append(Block(text=text))

    @property
    def _is_hidden(self) -> bool:
        return any(
            tag in HIDDEN_TAGS or not classes.isdisjoint(HIDDEN_CLASSES) for tag, classes in self._open
        )

    @property
    def _is_in_figure(self) -> bool:
        return any(not classes.isdisjoint(FIGURE_CLASSES) for _, classes in self._open)
