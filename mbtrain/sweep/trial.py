"""One trial of a sweep: which values it has on the sweep's axes, its seed, where its run is, and how that stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    name     of the trial, and of its run directory
    values   axis -> value as written in the sweep; axes are dotted keys (optim.lr) and named ones (variant, width)
    seed     its train.seed
    run      the run directory, there or not yet
    status   waiting, running, finished, diverged, failed or stopped
    """

    name: str
    values: dict[str, str]
    seed: int
    run: Path
    status: str
