"""Which samples are kept, which split and shard each belongs to: pure functions over arrays, one row per sample."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def first_occurrences(hashes: np.ndarray) -> np.ndarray:
    """bool [n]: True for the first row of each distinct hash. `hashes` is uint8 [n, 32]."""
    words = hashes.view(">u8")
    leading = words[:, 0].astype(np.uint64)
    order = np.argsort(leading, kind="stable")  # among equal ones the rows stay in their order
    # Only rows that share their first eight bytes need a look at the others: a tenth of the memory at many rows.
    ties = np.flatnonzero(np.diff(leading[order]) == 0) + 1
    if (hashes[order[ties]] != hashes[order[ties - 1]]).any():
        order = np.lexsort(words.T[::-1])  # different hashes among equal first words: sort by all of them
        differs = np.ones(len(words), bool)
        differs[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
        ties = np.flatnonzero(~differs)
    first = np.ones(len(words), bool)
    first[order[ties]] = False
    return first


def split_by_hash(hashes: np.ndarray, shares: Sequence[Fraction]) -> np.ndarray:
    """int64 [n]: the number of each sample's split. `hashes` is uint8 [n, 32]; `shares` sum to 1.

    The first eight bytes of the hash, read as a fraction of 2^64, fall into one of the splits' intervals of [0, 1).
    So the split depends on the content alone: data added later moves nothing, and equal samples stay together.
    """
    position = np.ascontiguousarray(hashes[:, :8]).view(">u8").ravel().astype(np.uint64)
    bounds = [int(sum(shares[: number + 1]) * 2**64) for number in range(len(shares) - 1)]
    return np.searchsorted(np.array(bounds, np.uint64), position, side="right")


def cut_pieces(split_bytes: Sequence[int], sample_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, length and split number of the pieces of one file, in its order; the last of each split may be shorter.

    The file's first split_bytes[0] bytes are the first split, the next split_bytes[1] the second, and so on.
    """
    ends = np.cumsum(split_bytes)
    starts = ends - np.array(split_bytes)
    offsets = [np.arange(start, end, sample_bytes) for start, end in zip(starts, ends, strict=True)]
    lengths = [np.minimum(sample_bytes, end - offset) for offset, end in zip(offsets, ends, strict=True)]
    numbers = [np.full(len(offset), number) for number, offset in enumerate(offsets)]
    return np.concatenate(offsets), np.concatenate(lengths), np.concatenate(numbers)


def tar_bytes(lengths: np.ndarray) -> np.ndarray:
    """Bytes that members of these lengths take in a tar: a header block, and the content padded to whole blocks."""
    return 512 + -(-lengths // 512) * 512


def cut_shards(sizes: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Row ranges [start, stop) of the shards: each is closed by the sample with which it reaches `shard_bytes`."""
    ends = np.cumsum(sizes)
    cuts: list[tuple[int, int]] = []
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = min(int(np.searchsorted(ends, before + shard_bytes)) + 1, len(sizes))
        cuts.append((start, stop))
        start = stop
    return cuts
