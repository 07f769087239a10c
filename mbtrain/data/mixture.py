"""Which source each training row comes from: a pure function of the row's number, in constant time.

Within a phase the sources have whole-number quotas that sum to CYCLE rows. Row j of a source with quota q is due at
(2 j + 1) / (2 q) of a cycle; the rows of all sources in the order of these times are one cycle, and the phase repeats
it. So any stretch of rows holds each source's share of it, to within a few rows, and row i is looked up, not counted.

A phase ends where a weight changes by its schedule or a source has been read as often as it may be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbtrain.config import DataConfig
from mbtrain.data.rows import Stream
from mbtrain.errors import DataError

CYCLE = 1 << 16
LARGEST_CAP = 1 << 40  # rows; nobody reads more, and CYCLE times as many still fit in 64 bits


@dataclass(frozen=True)
class Source:
    """A stream of a mixture, and what the configuration says of it. `weights` are (first row, weight) pairs."""

    name: str
    stream: Stream
    weights: tuple[tuple[int, float], ...]
    largest_rows: int | None


@dataclass(frozen=True)
class Phase:
    """Rows from `first` on: which source each row of a cycle is from, and how many of that source came before it.

    before   rows of each source before the phase;  quotas: rows of each source in a cycle
    """

    first: int
    before: np.ndarray
    quotas: np.ndarray
    pattern: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class Rows:
    """A batch of rows: ids int16 [r, T], which count (None: all), and the number of each row's source, int64 [r]."""

    ids: np.ndarray
    mask: np.ndarray | None
    sources: np.ndarray


class Mixture:
    """Training rows of several sources, endless unless all of them are capped."""

    def __init__(self, sources: Sequence[Source], seq_len: int):
        self.sources, self.seq_len = list(sources), seq_len
        self.phases, self.end = _phases(self.sources)

    def place(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows first .. first + count: the source of each, and which of that source's rows it is; int64 [count].

        Raises:
            DataError: the sources have been read as often as they may be before that.
        """
        if self.end is not None and first + count > self.end:
            names = ", ".join(source.name for source in self.sources)
            raise DataError(
                f"data.sources: {names} have been read as often as epochs allows after row {self.end} of "
                f"{self.seq_len} bytes; raise epochs, or train less"
            )
        rows = np.arange(first, first + count, dtype=np.int64)
        if len(self.sources) == 1:
            return np.zeros(count, np.int64), rows
        of, index = np.empty(count, np.int64), np.empty(count, np.int64)
        starts = np.array([phase.first for phase in self.phases])
        numbers = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here, phase = numbers == number, self.phases[number]
            cycle, slot = np.divmod(rows[here] - phase.first, CYCLE)
            of[here] = phase.pattern[slot]
            index[here] = phase.before[of[here]] + cycle * phase.quotas[of[here]] + phase.rank[slot]
        return of, index

    def counts(self, row: int) -> np.ndarray:
        """Rows of each source among the first `row`, int64 [sources]."""
        starts = [phase.first for phase in self.phases]
        phase = self.phases[int(np.searchsorted(starts, row, side="right")) - 1]
        return phase.before + _counts(phase, row - phase.first)

    def epochs(self, row: int) -> np.ndarray:
        """How often each source was read in the first `row` rows, float64 [sources]."""
        ids = np.array([source.stream.ids_per_epoch for source in self.sources])
        return self.counts(row) * self.seq_len / ids

    def rows(self, first: int, count: int) -> Rows:
        """Rows first .. first + count, read."""
        of, index = self.place(first, count)
        if len(self.sources) == 1:
            ids, mask = self.sources[0].stream.rows(index, self.seq_len)
            return Rows(ids, mask, of)
        ids = np.empty((count, self.seq_len), np.int16)
        full: np.ndarray | None = None
        for number in np.unique(of).tolist():
            here = of == number
            ids[here], mask = self.sources[number].stream.rows(index[here], self.seq_len)
            if mask is not None:
                full = np.ones(ids.shape, bool) if full is None else full
                full[here] = mask
        return Rows(ids, full, of)

    def targets(self, first: int, count: int) -> int:
        """How many ids of these rows count; nothing is read."""
        if all(source.stream.align == 1 for source in self.sources):
            return count * self.seq_len
        of, index = self.place(first, count)
        return sum(source.stream.targets(index[of == i], self.seq_len) for i, source in enumerate(self.sources))


def mixture(data: DataConfig, streams: Sequence[tuple[str, Stream]]) -> Mixture:
    """The mixture that a configuration asks for, over its opened sources, (name, stream) in its order.

    Weights are shares of bytes; a row of a source counts as many as its rows hold on average.

    Raises:
        DataError: no source has a weight above zero.
    """
    seq_len = data.seq_len
    sources = []
    for source, (name, stream) in zip(data.mixture, streams, strict=True):
        rows_per_epoch = stream.ids_per_epoch / seq_len
        natural = float(stream.bytes_per_epoch) ** (1 / data.temperature)
        given = source.schedule or ((0, natural if source.weight is None else source.weight),)
        row_bytes = stream.bytes_per_epoch / rows_per_epoch
        weights = tuple((-(-start // seq_len), weight / row_bytes) for start, weight in given)
        most = math.inf if source.epochs is None else source.epochs * rows_per_epoch
        largest = max(math.floor(most), 1) if most < LARGEST_CAP else None
        sources.append(Source(name, stream, weights, largest))
    return Mixture(sources, seq_len)


def _phases(sources: Sequence[Source]) -> tuple[list[Phase], int | None]:
    """All phases, and the row at which every source has ended (None: never)."""
    phases: list[Phase] = []
    before = np.zeros(len(sources), np.int64)
    row = 0
    while True:
        open_ = [s.largest_rows is None or before[i] < s.largest_rows for i, s in enumerate(sources)]
        weights = [_weight(source, row) if some else 0.0 for source, some in zip(sources, open_, strict=True)]
        if not any(weights):
            if not phases:
                raise DataError("data.sources: no source has a weight above zero at the start; give one")
            if any(open_) and any(start > row for source in sources for start, _ in source.weights):
                raise DataError(
                    f"data.sources: no source has a weight above zero at row {row}; give one in its schedule"
                )
            return phases, row
        phase = _phase(row, before, _quotas(weights))
        changes = [start for source in sources for start, _ in source.weights if start > row]
        for i, source in enumerate(sources):
            if source.largest_rows is not None and phase.quotas[i]:
                changes.append(row + _row_after(phase, i, source.largest_rows - int(before[i])))
        phases.append(phase)
        if not changes:
            return phases, None
        before = before + _counts(phase, min(changes) - row)
        row = min(changes)


def _weight(source: Source, row: int) -> float:
    return next(weight for start, weight in reversed(source.weights) if start <= row)


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers that sum to CYCLE in the proportion of the weights; at least 1 where a weight is above 0."""
    exact = np.array(weights, np.float64) / math.fsum(weights) * CYCLE
    quotas = np.where(exact > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    # What is missing goes to the largest remainders; what is too much (for the many tiny) comes from the largest.
    order = np.argsort(np.floor(exact) - exact, kind="stable")
    missing = CYCLE - int(quotas.sum())
    for i in order[: max(missing, 0)].tolist():
        quotas[i] += 1
    quotas[int(np.argmax(quotas))] += min(missing, 0)
    return quotas


def _phase(first: int, before: np.ndarray, quotas: np.ndarray) -> Phase:
    sources = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(quota) for quota in quotas.tolist()])
    due = (2 * rank + 1) / (2 * quotas[sources])
    order = np.argsort(due, kind="stable")
    return Phase(first, before, quotas, sources[order], rank[order])


def _counts(phase: Phase, rows: int) -> np.ndarray:
    """Rows of each source among the first `rows` of a phase."""
    cycles, rest = divmod(rows, CYCLE)
    return cycles * phase.quotas + np.bincount(phase.pattern[:rest], minlength=len(phase.quotas))


def _row_after(phase: Phase, source: int, count: int) -> int:
    """How many rows of the phase hold the first `count` of a source."""
    cycles, rest = divmod(count - 1, int(phase.quotas[source]))
    slot = np.flatnonzero((phase.pattern == source) & (phase.rank == rest))[0]
    return cycles * CYCLE + int(slot) + 1
