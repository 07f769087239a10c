"""Packed rows: documents in order, a boundary after each, cut every T ids. A row is a pure function of its position.

training     an endless stream: epoch 0 in its order, epoch 1 in its order, ...; cut i is ids [i T, (i + 1) T).
             Nothing is dropped at an epoch's end: the cut that crosses it goes on with the next epoch. So the
             cuts fall elsewhere in every epoch, unless T divides the stream.
             Rows are these cuts, shuffled within windows of about an epoch: neighbours in a stream are pieces of one
             document, and a batch of one document trains on that document alone (it cost 0.5 bits per byte).
evaluation   one pass in shard order; the last row is filled up and masked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbtrain import vocab
from mbtrain.data.order import mix_numbers, permutation
from mbtrain.errors import DataError
from mbtrain.shards import Split

LARGEST_WINDOW = 1 << 22  # rows that are shuffled together: 32 MiB of numbers
_ROWS = 1  # tells the numbers that shuffle rows from those that shuffle samples


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
            raise DataError(f"split {split.name!r}: no bytes in this split; prepare it with a larger share of the data")
        self._epochs: dict[int, Epoch] = {}
        self._window: tuple[int, int, np.ndarray] | None = None

    def epoch(self, number: int) -> Epoch:
        """The order of one epoch; the two last made are kept, since a window of rows touches two."""
        if number not in self._epochs:
            n = len(self.split.lengths)
            order = np.arange(n) if self.seed is None else permutation(self.seed, number, n)
            made = Epoch(number, order, np.cumsum(self.split.lengths[order] + int(self.boundary)))
            kept = list(self._epochs.items())[-1:]
            self._epochs = {**dict(kept), number: made}
        return self._epochs[number]

    def row(self, index: int, seq_len: int) -> np.ndarray:
        """Training row `index`: seq_len ids. Every cut of the endless stream is one row, once."""
        rows = min(max(self.ids_per_epoch // seq_len, 1), LARGEST_WINDOW)
        number, i = divmod(index, rows)
        if self._window is None or self._window[:2] != (number, rows):
            self._window = (number, rows, permutation(mix_numbers(self.seed or 0, _ROWS), number, rows))
        return self.read((number * rows + int(self._window[2][i])) * seq_len, seq_len)

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
