"""Names and errors of others, as they stand in messages: on one line, printable, of bounded length."""

from __future__ import annotations

from mbtrain.redact import redact

_SHOWN_CHARACTERS = 400


def printable(text: str) -> str:
    """A text of whatever characters (names of files may hold any bytes), written so that it can be shown and stored."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def reason_of(error: Exception) -> str:
    """What an error says; of one of the system, without number and path; of one that says nothing, what it is."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(redact(text).split())) or type(error).__name__
