"""How far a score could be off, had other documents of the same kind been at hand: the bootstrap over documents."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(above) / sum(below) over documents (Efron and Tibshirani 1993, chapter 13).

    above, below: one number a document, float64 [n]; documents without either are left out. So many documents are drawn
    with replacement, 1000 times, by a fixed seed: the same interval each time. None for fewer than two documents.
    """
    there = (above != 0) | (below != 0)
    above, below = above[there], below[there]
    n = len(above)
    if n < 2:
        return None
    rng = np.random.default_rng(SEED)
    ratios = np.full(RESAMPLES, np.nan)
    for i in range(RESAMPLES):
        drawn = rng.integers(0, n, n)
        if total := below[drawn].sum():
            ratios[i] = above[drawn].sum() / total
    low, high = np.nanquantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def of_bpb(nats: np.ndarray, bytes_: np.ndarray) -> tuple[float, float] | None:
    """The interval of bits per byte, from nats and real bytes by document."""
    found = ratio_of_sums(nats, bytes_)
    return None if found is None else (found[0] / math.log(2), found[1] / math.log(2))
