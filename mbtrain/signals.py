"""Signals that ask a loop to end are handled for as long as it runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # of a scheduler, a person, and one that warns


@contextmanager
def handled(handle: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """While inside, each of these signals calls `handle` with its number; afterwards all is as before."""
    before = {number: signal.signal(number, lambda got, frame: handle(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
