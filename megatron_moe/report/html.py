"""Build HTML from values; everything that is not `Html` already is escaped.

A run's files contain names chosen by users (runs, domains, paths). They reach a page only through
`el` and `join`, so escaping happens in one module; in addition, the page allows no scripts.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

VOID = frozenset({"meta", "link", "br", "hr", "wbr"})
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them."""


class Html(str):
    """Markup that can be inserted into a page without escaping."""

    __slots__ = ()


Child = Html | str | int | float | None | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: Any) -> Html:
    """Return one element; text and attributes are escaped, and None is omitted.

    >>> el("p", "a < b", el("b", 1), class_="note", aria_label='"x"')
    '<p class="note" aria-label="&quot;x&quot;">a &lt; b<b>1</b></p>'
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(plain(str(value)))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Html(f"<{tag}{named}>")
    return Html(f"<{tag}{named}>{join(children)}</{tag}>")


def join(children: Child) -> Html:
    """Concatenate children, escaping text.

    >>> join(["<script>", Html("<br>"), None, ["x"]])
    '&lt;script&gt;<br>x'
    """
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int | float):
        return Html(html.escape(plain(str(children))))
    return Html("".join(join(child) for child in children))


def plain(text: str) -> str:
    """Replace control characters, surrogates and direction changes by U+FFFD."""
    return "".join(
        "\ufffd"
        if char in _BIDI_CONTROLS
        or (unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t")
        else char
        for char in text
    )


def number(value: float | None) -> str:
    """Format a number for readers.

    >>> [number(x) for x in (0.000312, 2.64862, 1234567, 0, 12.0, None, float("nan"))]
    ['0.000312', '2.649', '1,234,567', '0', '12', '-', '-']
    """
    if value is None or math.isnan(value):
        return "-"
    if value == int(value if math.isfinite(value) else 0):
        return f"{int(value):,}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(
    head: Sequence[Child], rows: Iterable[Sequence[Child]], *, caption: str, names: int = 1
) -> Html:
    """Return a table that scrolls horizontally on narrow screens.

    Args:
        head: Titles of the columns.
        rows: The cells; numbers must be formatted with `number`.
        caption: Title of the table.
        names: Number of columns at the left that are row headers.
    """
    top = el("tr", [el("th", title, scope="col") for title in head])
    body = [
        el(
            "tr",
            [el("th", cell, scope="row") for cell in row[:names]],
            [el("td", cell) for cell in row[names:]],
        )
        for row in rows
    ]
    inner = el("table", el("caption", caption), el("thead", top), el("tbody", body))
    return el("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def folded(summary: str, *children: Child) -> Html:
    """Return a collapsed section that the reader can open."""
    return el("details", el("summary", summary), *children)


def command(*words: str) -> Html:
    """Format a command line."""
    return el("code", " ".join(words))


def missing(what: Child, *how: Child) -> Html:
    """Return a note for a part without data: what is missing, and how to produce it."""
    return el("p", what, " ", *how, class_="missing")
