"""Markup by construction: what was not made here is text, and text is escaped where it goes into a page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["POLICY", "Html", "breakable", "document", "element", "join", "text"]

# No script runs, nothing is fetched and nothing is sent, whatever stands in the page. Pictures are data: URIs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_VOID = frozenset({"br", "img", "link", "meta", "wbr"})
# Shapes of SVG; like those above they have no closing tag where they hold nothing.
_SHAPES = frozenset({"circle", "polygon", "polyline", "rect"})


class Html(str):
    """Markup that `element` made. Strings formed of it are plain ones again, and are escaped as any other."""

    __slots__ = ()


def text(value: object) -> Html:
    """The one function that writes text into a page: markup stays as it is, anything else is escaped.

    What UTF-8 cannot hold becomes a question mark.
    """
    return value if isinstance(value, Html) else Html(_escaped(value))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name ...>children</name>``. Children that are no `Html` are text, and attributes always are.

    Underscores of an attribute's name stand for hyphens, one at its end for nothing: ``class_``, ``aria_label``.
    Attributes that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    if name in _SHAPES and not children:
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: object = "") -> Html:
    """Markup and text, one after the other."""
    return Html(text(between).join(map(text, parts)))


def breakable(label: str) -> Html:
    """A label that may break where a field begins and after its name."""
    return join(re.split(r"(?=\()|(?<=[,=])", label), element("wbr"))


def document(title: str, style: str, *body: object) -> str:
    """A whole page of one file, with a heading of its own in ``body``.

    Args:
        style: CSS; it is not escaped, and nothing that was read from a file may stand in it.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        "\n",
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        "\n",
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    page = element("html", head, element("body", "\n", join(body, "\n"), "\n"), lang="en")
    return f"<!doctype html>{page}\n"


def _escaped(value: object) -> str:
    plain = str(value)
    return html.escape(plain if plain.isascii() else plain.encode("utf-8", "replace").decode())
