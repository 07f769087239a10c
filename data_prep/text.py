"""The modality of text: a document's own bytes, never decoded or changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

from data_prep.sources import Item, Modality, Rejection, Sample
from data_prep.wording import printable
from mbtrain.errors import ConfigError

_FILTERED_BYTES = 1024**3


def text_modality(column: str, *, match: str = "", reject: str = "") -> Modality:
    """Text; `column` names the documents' field in records.

    Args:
        column: as in `Modality`.
        match: a regular expression; documents in which it is nowhere found are left out. Empty: none are.
        reject: a regular expression; documents in which it is found are left out. Empty: none are.

    Both are Python's `re` on bytes: `.` is one byte, letters beyond ASCII stand for their UTF-8 (so not in `[...]`),
    and `\\w`, `\\s` and `(?i)` know ASCII alone. A document that is filtered is held in memory whole, and rejected if
    it is longer than 1 GiB; without a filter it is streamed. There is no limit of time: one such as `(a+)+$`
    may need a time exponential in a document's length, so repeat nothing that repeats.

    Raises:
        ConfigError: match or reject is no regular expression.
    """
    filters = _pattern("--match", match), _pattern("--reject", reject)
    options = {"column": column, "match": match, "reject": reject}
    return Modality("text", partial(_decode, *filters), column, options=options)


def _pattern(key: str, text: str) -> re.Pattern[bytes] | None:
    try:
        return re.compile(text.encode()) if text else None
    except (re.error, OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise ConfigError(f"{key}: expected a regular expression, got {text!r} ({error})") from None


def _decode(
    match: re.Pattern[bytes] | None, reject: re.Pattern[bytes] | None, item: Item
) -> Iterator[Sample | Rejection]:
    if match is None and reject is None:
        yield Sample(item.chunks, item.where, plain=item.plain)
        return
    parts, size = [], 0
    for chunk in item.chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > _FILTERED_BYTES:
            yield Rejection(item.where, f"longer than {_FILTERED_BYTES} bytes, the most that is filtered")
            return
    content = b"".join(parts)
    if match is not None and not match.search(content):
        yield Rejection(item.where, f"does not match '{printable(match.pattern.decode())}'", bad=False)
    elif reject is not None and reject.search(content):
        yield Rejection(item.where, f"matches '{printable(reject.pattern.decode())}'", bad=False)
    else:
        yield Sample(iter((content,)), item.where, plain=item.plain)
