"""HTML as text: whatever comes from a run is escaped here, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NewType

Markup = NewType("Markup", str)
"""Text that is HTML: made by this module, or written in the source of the report."""


def text(value: str) -> Markup:
    """The characters of `value`, none of which is read as HTML."""
    return Markup(html.escape(value, quote=True))


def joined(*parts: Markup) -> Markup:
    """The parts, one after the other."""
    return Markup("".join(parts))


def element(tag: str, *content: Markup, **attributes: str) -> Markup:
    """An element; `class_` and `aria_label` are the attributes `class` and `aria-label`."""
    said = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{said}>{''.join(content)}</{tag}>")


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1
) -> Markup:
    """A table of texts whose first column heads its rows. The first `words` columns are words, the
    others numbers."""
    heads = [
        element("th", text(name), scope="col", class_="word" if column < words else "number")
        for column, name in enumerate(header)
    ]
    body = []
    for row in rows:
        first, *others = row
        cells = [element("th", text(first), scope="row", class_="word")]
        for column, cell in enumerate(others, start=1):
            kind = "word" if column < words else "number"
            cells.append(element("td", text(cell), class_=kind))
        body.append(element("tr", *cells))
    whole = element(
        "table",
        element("caption", element("span", text(caption))),
        element("thead", element("tr", *heads)),
        element("tbody", *body),
    )
    # It scrolls by itself where it is wider than the page, by keys too.
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def folded(summary: str, *content: Markup) -> Markup:
    """Content that is opened by its summary."""
    return element("details", element("summary", text(summary)), *content)
