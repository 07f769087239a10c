"""What a person reads while something runs: lines on stderr and in RUN/log.txt, sizes and durations in plain units."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

from mbtrain.redact import one_line

# To the line's start, and erase it.
_CLEAR = "\r\x1b[K"


def say(run: Path, text: str) -> None:
    """A line on stderr and in RUN/log.txt, with the time."""
    line = f"{time.strftime('%H:%M:%S')}  {one_line(text)}"
    sys.stderr.write((_CLEAR if sys.stderr.isatty() else "") + line + "\n")
    sys.stderr.flush()
    with suppress(OSError), (run / "log.txt").open("a", encoding="utf-8") as file:  # a full disk: stderr has it
        file.write(line + "\n")


def bar(done: float, text: str) -> None:
    """On a terminal, a line with a bar of the share that is done; the next line is written over it."""
    if sys.stderr.isatty():
        filled = ("#" * round(30 * min(done, 1))).ljust(30, "-")
        sys.stderr.write(f"{_CLEAR}{filled} {done:4.0%} · {text}")
        sys.stderr.flush()


def size(count: float) -> str:
    """1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """0.4 s, 2:05 min, 1:02:05 h by length."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"
