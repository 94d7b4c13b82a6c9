"""HTML pages that are one file: everything from data is escaped, nothing runs and nothing is loaded.

`page` renders the body's template with jinja2, which escapes every value, and puts a content security policy in
front: images only as data: addresses (`vlgpt.images.data_uri`), and no style but the page's own, by its hash. So a
hostile caption or reply stays text even if a template has a fault.
"""

from __future__ import annotations

import base64
import hashlib

import jinja2
from markupsafe import Markup

_PAGE = """<!doctype html>
<html lang="en"><head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head><body>
{{ body }}
</body></html>
"""


def page(template: str, *, title: str, style: str, **content: object) -> str:
    """A whole page: `template` is jinja2 source for the body, `style` its CSS, `content` what the template shows.

    Elements cannot have `style` attributes, which the policy forbids. Raises jinja2.UndefinedError for a value
    that the template needs and `content` lacks.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    body = environment.from_string(template).render(title=title, **content)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    # Style and body are finished HTML: escaping them again would show their markup as text.
    return environment.from_string(_PAGE).render(
        title=title, policy=Markup(policy), style=Markup(style), body=Markup(body)
    )
