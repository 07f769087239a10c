"""The order of samples: a pure function of (seed, epoch, number of samples), the same on every machine and version."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64: a bijection whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of range(n) as int64, from nothing but the arguments.

    numpy's generators may change their streams between versions, so samples are sorted by a hash of their number.
    """
    with np.errstate(over="ignore"):
        key = np.uint64(mix_numbers(seed, epoch))
        hashes = mix(key + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return np.argsort(hashes, kind="stable")


def mix_numbers(*numbers: int) -> int:
    """One 63-bit number from several; for seeds that follow from (seed, step, ...)."""
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for number in numbers:
            state = mix(state + np.array([number], np.uint64) + _GOLDEN)
    return int(state[0] >> np.uint64(1))
