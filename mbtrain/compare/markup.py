"""HTML and SVG out of elements: whatever is not markup made here is escaped, so no name or sample can be any."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = ("br", "img", "meta", "circle", "line", "path", "rect")


class Markup(str):
    """Text that is markup already; only this module and the page's own style and script make it."""

    __slots__ = ()


def element(name: str, /, *content: str | Iterable[str], **attributes: object) -> Markup:
    """<name attributes>content</name>. Content that is no Markup is escaped; attributes always are.

    Attributes are written with - for _, and without a leading one (class is _class); those that are None are left out.
    """
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}/>" if name not in ("br", "img", "meta") else f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(content)}</{name}>")


def joined(content: Iterable[str | Iterable[str]]) -> Markup:
    """Pieces one after the other, escaped where they are no Markup."""
    out = []
    for piece in content:
        if isinstance(piece, Markup):
            out.append(str(piece))
        elif isinstance(piece, str):
            out.append(_escaped(piece))
        else:
            out.append(joined(piece))
    return Markup("".join(out))


def shown(content: bytes, most_characters: int = 4000) -> str:
    """A text of any bytes as a person reads it: what is no UTF-8, or no printable character, is written as \\xNN."""
    return _visible(content.decode("utf-8", "backslashreplace")[:most_characters])


def _escaped(text: str) -> str:
    return escape(_visible(text))


def _visible(text: str) -> str:
    """Control characters, which a browser or an editor would obey (as those that turn the direction), written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
