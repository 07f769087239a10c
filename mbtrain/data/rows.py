"""Packed rows: documents in order, a boundary after each, cut every T ids. A row is a pure function of its position.

training     an endless stream: epoch 0 in its order, epoch 1 in its order, ...; row i is ids [i T, (i + 1) T).
             Nothing is dropped at an epoch's end: the row that crosses it goes on with the next epoch. So the
             cuts fall elsewhere in every epoch, unless T divides the stream.
evaluation   one pass in shard order; the last row is filled up and masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbtrain import vocab
from mbtrain.data.order import permutation
from mbtrain.errors import DataError
from mbtrain.shards import Split


@dataclass(frozen=True)
class Epoch:
    """One pass over a split: sample numbers in order, and where each one ends in the epoch's ids."""

    number: int
    order: np.ndarray
    ends: np.ndarray


class Stream:
    """Reads ids at any position of the endless stream (seed given), or of one pass in shard order (seed None)."""

    def __init__(self, split: Split, *, boundary: bool, seed: int | None):
        self.split, self.boundary, self.seed = split, boundary, seed
        self.ids_per_epoch = int(split.lengths.sum()) + len(split.lengths) * int(boundary)
        if self.ids_per_epoch == 0:
            raise DataError(f"{split.path}: no bytes in this split; prepare it with a larger share of the data")
        self._epoch: Epoch | None = None

    def epoch(self, number: int) -> Epoch:
        """The order of one epoch; the last one asked for is kept."""
        if self._epoch is None or self._epoch.number != number:
            n = len(self.split.lengths)
            order = np.arange(n) if self.seed is None else permutation(self.seed, number, n)
            self._epoch = Epoch(number, order, np.cumsum(self.split.lengths[order] + int(self.boundary)))
        return self._epoch

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` ids from `position` on, as int64; crosses samples and epochs."""
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            number, at = divmod(position + filled, self.ids_per_epoch)
            epoch = self.epoch(number)
            i = int(np.searchsorted(epoch.ends, at, side="right"))
            filled += self._copy(epoch, i, at, out[filled:])
        return out

    def sources(self, position: int, count: int) -> np.ndarray:
        """Source numbers of the ids from `position` on, as int64; fewer at the end of an epoch, which it stays in."""
        epoch = self.epoch(position // self.ids_per_epoch)
        at = position % self.ids_per_epoch
        last = min(at + count, self.ids_per_epoch)
        i = np.searchsorted(epoch.ends, np.arange(at, last), side="right")
        return self.split.source_index[epoch.order[i]].astype(np.int64)

    def _copy(self, epoch: Epoch, i: int, at: int, out: np.ndarray) -> int:
        """Copy the i-th sample of an epoch, from epoch position `at` on, into out; returns how many ids that were."""
        sample = int(epoch.order[i])
        size = int(self.split.lengths[sample])
        first = at - (int(epoch.ends[i]) - size - int(self.boundary))
        last = min(first + len(out), size)
        if last > first:
            out[: last - first] = np.frombuffer(self.split.read(sample, first, last), np.uint8)
        taken = max(last - first, 0)
        if self.boundary and last == size and taken < len(out):
            out[taken] = vocab.BOUNDARY
            taken += 1
        return taken


def evaluation_rows(stream: Stream, seq_len: int, limit_bytes: int | None = None) -> int:
    """Rows that one pass has; with a limit, whole rows that hold at least so many bytes, if there are."""
    rows = -(-stream.ids_per_epoch // seq_len)
    return rows if limit_bytes is None else min(rows, -(-limit_bytes // seq_len))


def evaluation_batch(stream: Stream, seq_len: int, rows: list[int], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask, each (batch, seq_len), of these rows; missing rows and the end of the last one are masked.

    Masked ids are 0 and mean nothing: the mask alone says what is scored.
    """
    ids = np.zeros((batch, seq_len), np.int64)
    mask = np.zeros((batch, seq_len), bool)
    for i, row in enumerate(rows):
        count = min(seq_len, stream.ids_per_epoch - row * seq_len)
        ids[i, :count] = stream.read(row * seq_len, count)
        mask[i, :count] = True
    return ids, mask
