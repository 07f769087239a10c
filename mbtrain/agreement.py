"""How ranks come to the same answer, or the same error, so that none is left alone in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbtrain.engine import Ranks, from_rank_0, gathered
from mbtrain.errors import CheckpointError, MbtrainError


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
