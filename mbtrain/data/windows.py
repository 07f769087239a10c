"""Evaluation: which windows of a split a model is given, and which of their ids are scored in each.

In every mode every id of the split is scored exactly once, from ids that stand before it in its document stream and
from no others; the modes differ in how many of those the model sees, and in where the id stands in a patch.

T ids in a window · P ids in a patch of the coarsest stage · S = T / 2, rounded down to whole patches, at least one

stretch   what windows lie in and never cross: the whole pass, where samples are packed; one sample, where each has rows
          of its own (images and sounds)
basic     windows begin every T ids; all their ids are scored. Cost 1
sliding   windows begin every S ids; of the first all ids are scored, of the others the last S, which have T - S ids
          before them at least (the paper says "sliding window" and twice the cost: half a window). Cost T / S
strided   the paper's strided inference: two passes of basic windows, those of the second beginning P / 2 ids later. An
          id is scored in the pass in which it stands in the first half of a patch. But the first P ids of a window of
          the first pass are all scored there: the second pass begins in the middle of them and sees none. Cost 2
both      two passes of sliding windows, P / 2 apart; otherwise as strided. Cost 2 T / S

Source: Yu et al. 2023 (arXiv 2305.07185), section 3.3 of v1 and its table of inference tricks; where the paper leaves
the borders open, as above. A sample that fits one window has it alone: sliding is then basic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbtrain.data.rows import Stream

MODES = ("basic", "sliding", "strided", "both")


@dataclass(frozen=True)
class Windows:
    """Windows in the order in which they begin, one array element each.

    at       where it begins in the pass
    counts   ids that it has; what is left of seq_len is filled up
    first    its ids from this one on are scored; those before are context
    halves   P, where of those only the ones in the first half of their patch, or in the first patch, are; else 0
    """

    at: np.ndarray
    counts: np.ndarray
    first: np.ndarray
    halves: int

    def __len__(self) -> int:
        return len(self.at)


def evaluation_windows(
    stream: Stream, seq_len: int, *, mode: str = "basic", patch_size: int = 1, limit_bytes: int | None = None
) -> Windows:
    """The windows of one pass over a stream in shard order; with a limit, over the first rows that hold so many ids.

    patch_size: P; windows are cut at multiples of it. strided and both need an even one.
    The ids scored are the same in all modes, with a limit too.
    """
    passes = ((0, 0), (patch_size // 2, patch_size)) if mode in ("strided", "both") else ((0, 0),)
    stride = stride_of(seq_len, patch_size) if mode in ("sliding", "both") else seq_len
    starts, sizes = _stretches(stream, seq_len)
    if limit_bytes is not None:
        sizes = np.clip(-(-limit_bytes // seq_len) * seq_len - starts, 0, sizes)
    parts = []
    for offset, first in passes:  # `first` of the second: what the first pass scores in the first patch of its windows
        later = seq_len - stride if stride < seq_len else first
        left = sizes - offset
        number = np.maximum(left > first, -((later - left) // stride))
        stretch = np.repeat(np.arange(len(starts)), number)
        i = np.arange(len(stretch)) - np.repeat(np.cumsum(number) - number, number)
        at = starts[stretch] + offset + i * stride
        counts = np.minimum(seq_len, starts[stretch] + sizes[stretch] - at)
        parts.append((at, counts, np.where(i == 0, first, later)))
    at, counts, first_scored = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(at, kind="stable")
    return Windows(at[order], counts[order], first_scored[order], patch_size if len(passes) > 1 else 0)


def stride_of(seq_len: int, patch_size: int) -> int:
    """S: ids between the beginnings of two sliding windows."""
    return max(seq_len // 2 // patch_size, 1) * patch_size


def evaluation_batch(
    stream: Stream, seq_len: int, windows: Windows, chosen: Sequence[int], batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, which of them are scored here, and sample numbers, each (batch, seq_len), of these windows.

    Missing windows and what fills up the others are never scored, and mean nothing.
    """
    ids = np.full((batch, seq_len), stream.filling, np.int16)
    scored = np.zeros((batch, seq_len), bool)
    samples = np.full((batch, seq_len), -1, np.int32)
    if n := len(chosen):
        at, counts = windows.at[chosen], windows.counts[chosen]
        ids[:n], mask = stream.read_rows(at, seq_len, counts)
        column = np.arange(seq_len)
        scored[:n] = column >= windows.first[chosen, None]
        if p := windows.halves:
            scored[:n] &= (column % p < p // 2) | (column < p)
        if mask is not None:
            scored[:n] &= mask
        samples[:n] = stream.samples(at, seq_len, counts)
    return ids, scored, samples


def _stretches(stream: Stream, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the stretches begin in the pass, and how many ids each has, int64."""
    if stream.align != seq_len:
        return np.zeros(1, np.int64), np.array([stream.ids_per_epoch], np.int64)
    epoch = stream.epoch(0)
    starts = np.concatenate([[0], epoch.ends[:-1]])
    return starts, stream.split.lengths[epoch.order] + int(stream.boundary)
