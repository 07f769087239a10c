"""Rows of ids, cut from a data set's samples. A row is a pure function of its position.

layout       samples one after the other in an epoch's order, a boundary after each (if wanted), filled up to a multiple
             of `align`: 1 packs them, a patch lets each begin at a patch, T gives every sample rows of its own
training     an endless stream: epoch 0 in its order, epoch 1 in its order, ...; cut i is ids [i T, (i + 1) T).
             Nothing is dropped at an epoch's end: the cut that crosses it goes on with the next epoch. So the
             cuts fall elsewhere in every epoch, unless T divides the stream.
             Rows are these cuts, shuffled within windows of about an epoch: neighbours in a stream are pieces of one
             document, and a batch of one document trains on that document alone (it cost 0.5 bits per byte).
evaluation   one pass in shard order (seed None), cut by windows.py.

What fills up is masked, never an id of its own. Many rows are laid out at once, by arrays: a call for each would cost
more than the reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbtrain import vocab
from mbtrain.data import scan
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


@dataclass(frozen=True)
class Pieces:
    """Samples' parts that make up some rows, in the order of the rows: one array element a part.

    sample          its number
    first, last     of the sample's ids (bytes, boundary, filling) those in [first, last)
    to              where they go in the rows, laid end to end
    """

    sample: np.ndarray
    first: np.ndarray
    last: np.ndarray
    to: np.ndarray


class Stream:
    """Rows of one split, endless in shuffled order (seed given), or one pass in shard order (seed None).

    Not for several threads at once: it keeps orders.

    boundary   id 256 after each sample
    align      each sample begins at a multiple of so many ids
    patches    image pixels in patch scan for these patch sizes (bytes, coarse to fine); None: as in the shards
    filling    what stands where nothing counts
    """

    def __init__(
        self,
        split: Split,
        *,
        boundary: bool,
        seed: int | None,
        align: int = 1,
        patches: Sequence[int] | None = None,
        filling: int = 0,
    ):
        self.split, self.boundary, self.seed, self.align, self.filling = split, boundary, seed, align, filling
        self.patches = None if patches is None or not scan.block_sides(patches) else tuple(patches)
        self.bytes_per_epoch = int(split.lengths.sum())
        self.ids_per_epoch = int(self._sizes(split.lengths).sum())
        if self.bytes_per_epoch == 0:
            raise DataError(f"split {split.name!r}: no bytes in this split; prepare it with a larger share of the data")
        if self.patches is not None:
            self._check_blocks(self.patches)
        self._epochs: dict[int, Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def epoch(self, number: int) -> Epoch:
        """The order of one epoch; the two last made are kept, since a window of rows touches two."""
        if number not in self._epochs:
            n = len(self.split.lengths)
            chosen = np.arange(n) if self.seed is None else permutation(self.seed, number, n)
            made = Epoch(number, _compact(chosen), np.cumsum(self._sizes(self.split.lengths[chosen])))
            kept = list(self._epochs.items())[-1:]
            self._epochs = {**dict(kept), number: made}
        return self._epochs[number]

    def positions(self, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Where training rows begin in the stream, int64: row -> cut. Every cut is one row, once."""
        window_rows = min(max(self.ids_per_epoch // seq_len, 1), LARGEST_WINDOW)
        numbers, i = np.divmod(np.asarray(rows, np.int64), window_rows)
        cuts = np.empty(len(i), np.int64)
        for number in set(numbers.tolist()):
            of = numbers == number
            cuts[of] = number * window_rows + self._window(number, window_rows)[i[of]]
        return cuts * seq_len

    def rows(self, rows: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Training rows: ids int16 [r, seq_len], and which of them count, bool [r, seq_len] (None: all)."""
        return self.read_rows(self.positions(rows, seq_len), seq_len)

    def targets(self, rows: np.ndarray, seq_len: int) -> int:
        """How many ids of these training rows count; nothing is read."""
        if self.align == 1:
            return len(rows) * seq_len
        at = self.positions(rows, seq_len)
        pieces = self._pieces(at, np.full(len(at), seq_len, np.int64), seq_len)
        used = self.split.lengths[pieces.sample] + int(self.boundary)
        return int(np.maximum(np.minimum(pieces.last, used) - pieces.first, 0).sum())

    def read_rows(
        self, at: np.ndarray, seq_len: int, counts: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids from these positions of the stream on, int16 [r, seq_len], and which count, bool (None: all).

        counts: ids wanted of each row (seq_len by default); what is left of a row does not count.
        """
        at = np.asarray(at, np.int64)
        wanted = np.full(len(at), seq_len, np.int64) if counts is None else np.asarray(counts, np.int64)
        pieces = self._pieces(at, wanted, seq_len)
        lengths = self.split.lengths[pieces.sample]
        stops = np.clip(lengths + int(self.boundary), pieces.first, pieces.last)  # what follows is filling
        read = self.split.read_many if self.patches is None else self._read_scanned
        content = np.frombuffer(read(pieces.sample, pieces.first, stops), np.uint8)
        mask: np.ndarray | None = None
        if len(content) == len(at) * seq_len:
            ids = content.astype(np.int16)
        else:
            mask = np.ones(len(at) * seq_len, bool)
            short = np.flatnonzero(wanted < seq_len)
            mask[_ranges(short * seq_len + wanted[short], seq_len - wanted[short])] = False
            mask[_ranges(pieces.to + stops - pieces.first, pieces.last - stops)] = False
            ids = np.full(len(mask), self.filling, np.int16)
            ids[mask] = content
            mask = mask.reshape(len(at), seq_len)
        if self.boundary:
            ends = np.flatnonzero((lengths < stops) & (pieces.first < stops))
            ids[(pieces.to + stops - pieces.first)[ends] - 1] = vocab.BOUNDARY
        return ids.reshape(len(at), seq_len), mask

    def samples(self, at: np.ndarray, seq_len: int, counts: np.ndarray) -> np.ndarray:
        """Sample numbers of the ids that `read_rows` gives for the same arguments, int32 [r, seq_len]; -1: none.

        A boundary belongs to the sample that it ends, and so does what fills up behind it.
        """
        pieces = self._pieces(np.asarray(at, np.int64), np.asarray(counts, np.int64), seq_len)
        out = np.full(len(at) * seq_len, -1, np.int32)
        sizes = pieces.last - pieces.first
        out[_ranges(pieces.to, sizes)] = np.repeat(pieces.sample, sizes)
        return out.reshape(len(at), seq_len)

    def read(self, position: int, count: int) -> np.ndarray:
        """`count` ids from `position` on, as int64; crosses samples and epochs."""
        return self.read_rows(np.array([position]), count)[0][0].astype(np.int64)

    def _sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Ids that samples take up: bytes, boundary, filling."""
        ids = lengths + int(self.boundary)
        return ids if self.align == 1 else -(-ids // self.align) * self.align

    def _window(self, number: int, rows: int) -> np.ndarray:
        if (number, rows) not in self._windows:
            kept = list(self._windows.items())[-1:]
            order = permutation(mix_numbers(self.seed or 0, _ROWS), number, rows)
            self._windows = {**dict(kept), (number, rows): _compact(order)}
        return self._windows[number, rows]

    def _pieces(self, at: np.ndarray, counts: np.ndarray, seq_len: int) -> Pieces:
        """The samples' parts in [at, at + counts) of each row, which go to row * seq_len on."""
        to = np.arange(len(at), dtype=np.int64) * seq_len
        found: list[Pieces] = []
        while len(at):  # once for each epoch that a row reaches into; nearly always once
            numbers, within = np.divmod(at, self.ids_per_epoch)
            here = np.minimum(counts, self.ids_per_epoch - within)
            for number in set(numbers.tolist()):
                of = numbers == number
                found.append(self._in_epoch(self.epoch(number), within[of], here[of], to[of]))
            rest = counts > here
            at, counts, to = (at + here)[rest], (counts - here)[rest], (to + here)[rest]
        if len(found) == 1:
            return found[0]
        if not found:
            return Pieces(*(np.zeros(0, np.int64) for _ in range(4)))
        columns = zip(*((p.sample, p.first, p.last, p.to) for p in found), strict=True)
        sample, first, last, to = (np.concatenate(column) for column in columns)
        order = np.argsort(to, kind="stable")
        return Pieces(sample[order], first[order], last[order], to[order])

    def _in_epoch(self, epoch: Epoch, at: np.ndarray, counts: np.ndarray, to: np.ndarray) -> Pieces:
        begin = epoch.ends.searchsorted(at, side="right")
        # samples that a row touches; none, where it is empty
        number = np.maximum(epoch.ends.searchsorted(at + counts - 1, side="right") - begin + 1, 0)
        row = np.arange(len(at)).repeat(number)
        i = np.arange(len(row)) + (begin - number.cumsum() + number)[row]
        sample = epoch.order[i].astype(np.int64)
        starts = epoch.ends[i] - self._sizes(self.split.lengths[sample])
        first = np.maximum(at[row], starts)
        last = np.minimum(at[row] + counts[row], epoch.ends[i])
        return Pieces(sample, first - starts, last - starts, to[row] + first - at[row])

    def _check_blocks(self, patches: Sequence[int]) -> None:
        """Raise DataError if an image cannot be scanned: at the start, not when its row comes, hours later."""
        side = scan.block_sides(patches)[0]
        if (i := self.split.first_image_off(side)) is not None:
            height, width = self.split.image_size(i)
            raise DataError(
                f"sample {self.split.key(i)} of split {self.split.name!r}: {height} x {width} pixels are no whole "
                f"number of blocks of {side} x {side}; prepare the images with --size, choose another "
                "model.stages.0.patch_size, or set data.scan=raster"
            )

    def _read_scanned(self, samples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """As Split.read_many, for images in patch scan: an image is read whole."""
        assert self.patches is not None
        out = np.zeros(int((stops - starts).sum()), np.uint8)
        to = 0
        for sample, start, stop in zip(samples.tolist(), starts.tolist(), stops.tolist(), strict=True):
            part = scan.order(*self.split.image_size(sample), self.patches)[start:stop]
            out[to : to + len(part)] = np.frombuffer(self.split.read(sample), np.uint8)[part]
            to += stop - start
        return out


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers of [start, start + size) for each pair, one range after the other."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def _compact(order: np.ndarray) -> np.ndarray:
    """The same numbers in four bytes each, where they fit."""
    return order.astype(np.int32) if len(order) < 2**31 else order
