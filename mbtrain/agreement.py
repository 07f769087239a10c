"""How ranks come to the same answer, or the same error, so that none is left alone in a collective."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mbtrain import watch
from mbtrain.engine import Ranks, from_rank_0, gathered, launched, start, stop
from mbtrain.errors import CheckpointError, MbtrainError

LOST_AFTER_S = 60.0


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of a launcher, joined for a while; or this process alone, without a process group.

    To be used by what is short and leaves nothing behind: a rank that is lost, or fails alone, ends all of them with
    exit status 75 and its name.
    """
    if not launched():
        yield Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    ranks = start()

    def last_words(verdict: str) -> None:
        if ranks.rank == (1 if verdict.startswith("rank 0 ") else 0):  # one speaks for all
            sys.stderr.write(f"mbtrain: {verdict}\n")

    try:
        with watched(ranks, LOST_AFTER_S, last_words):
            yield ranks
            gathered(None)  # all have done their part: who leaves now is not lost
    finally:
        stop()


@contextmanager
def watched(ranks: Ranks, lost_after_s: float, last_words: Callable[[str], None]) -> Iterator[watch.Watch | None]:
    """While inside, a rank that is lost, or fails alone, ends all of them with exit status 75, after these last words.

    None for a single rank, which nobody watches.
    """
    watching = watch.begin(ranks.rank, ranks.ranks, lost_after_s, last_words)
    try:
        yield watching
    except Exception as error:
        if watching and not isinstance(error, MbtrainError):  # those come on all ranks alike
            if not watch.is_secondary(error):
                traceback.print_exc()
            watching.wait_for_verdict(error)
        raise
    finally:
        if watching:
            watching.stop()


def on_rank_0(make: Callable[[], Any], ranks: Ranks) -> Any:
    """What `make` returns on rank 0, on every rank; what it raises there of MbtrainError is raised on every rank."""
    value, problem = None, None
    if ranks.rank == 0:
        try:
            value = make()
        except MbtrainError as error:
            problem = error
        except OSError as error:
            problem = CheckpointError(str(error))
    value, problem = from_rank_0((value, problem))
    if problem is not None:
        raise problem
    return value


def on_all_ranks(make: Callable[[], Any]) -> Any:
    """What `make` returns on this rank; when it raises MbtrainError on any, all ranks raise the first of those."""
    value, problem = None, None
    try:
        value = make()
    except MbtrainError as error:
        problem = error
    problems = [found for found in gathered(problem) if found is not None]
    if problems:
        raise problems[0]
    return value
