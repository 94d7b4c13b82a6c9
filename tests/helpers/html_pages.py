"""What a page of ours may hold, whatever stands in the data that it shows."""

import base64
import hashlib
import re
from html.parser import HTMLParser

ACTIVE = {"script", "iframe", "object", "embed", "form", "base", "link"}


class Page(HTMLParser):
    """Tags, attributes and words of a page, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def inert(text: str) -> Page:
    """The page, which runs nothing, loads nothing and holds its images itself."""
    page = Page(text)
    assert not ACTIVE & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert not [s[:80] for s in sources if not re.match(r"#|data:image/(png|jpeg);base64,", s)]
    assert not re.search(r"url\(|@import", text)
    return page


def assert_only_own_style(text: str) -> None:
    """The content policy allows the page's own style, by its digest, and nothing else."""
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    policy = re.search(r'Policy" content="([^"]*)"', text)
    assert style and policy
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy[1] and "img-src data:" in policy[1]
    assert f"style-src 'sha256-{digest}'" in policy[1] and "unsafe" not in policy[1]
    assert not [name for name, _ in Page(text).attributes if name == "style"]
