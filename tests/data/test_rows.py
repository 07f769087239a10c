"""Packed rows: any cut of the stream is the naive concatenation of documents.

pytest tests/data/test_rows.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.data.order import permutation
from mbtrain.data.rows import Stream
from mbtrain.errors import DataError
from mbtrain.shards import Split, open_split
from mbtrain.vocab import BOUNDARY


class Documents:
    """What Stream and score use of a Split, over documents in memory."""

    name = "made"

    def __init__(self, documents: Sequence[bytes], sources: Sequence[int] | None = None):
        self.documents = list(documents)
        self.lengths = np.array([len(d) for d in self.documents], np.int64)
        self.source_index = np.array(sources or [0] * len(self.documents), np.int32)
        self.source_names = [f"source{i}" for i in range(int(self.source_index.max(initial=0)) + 1)]

    def __len__(self) -> int:
        return len(self.documents)

    def read_many(self, samples: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> bytes:
        parts = []
        for i, start, stop in zip(samples, starts, stops, strict=True):
            assert 0 <= start <= stop <= len(self.documents[i]) + 1
            parts.append((self.documents[i] + b"?")[start:stop])  # what stands behind a document means nothing
        return b"".join(parts)


def split_of(documents: Sequence[bytes], sources: Sequence[int] | None = None) -> Split:
    """Documents in memory, to be read as a Split."""
    return cast(Split, Documents(documents, sources))


def row_by_row(stream: Stream, seq_len: int, rows: Iterable[int]) -> list[list[int]]:
    """Training rows, each asked for on its own."""
    return [stream.rows(np.array([row]), seq_len)[0][0].tolist() for row in rows]


def concatenated(documents: Sequence[bytes], order: Sequence[int], boundary: bool) -> list[int]:
    """The ids of one epoch, the naive way."""
    ids: list[int] = []
    for i in order:
        ids += [*documents[i], *([BOUNDARY] if boundary else [])]
    return ids


# Lengths from 0: data_prep leaves empty documents out, yet nothing here may break on one.
corpora = st.lists(st.binary(max_size=12), min_size=1, max_size=8).filter(lambda docs: any(docs))


@settings(max_examples=300, deadline=None)
@given(documents=corpora, boundary=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_any_cut_of_the_stream_is_the_naive_concatenation(
    documents: list[bytes], boundary: bool, seed: int, data: Any
) -> None:
    """Over three epochs, each in its own order; nothing is dropped at an epoch's end."""
    naive: list[int] = []
    for epoch in range(3):
        naive += concatenated(documents, permutation(seed, epoch, len(documents)).tolist(), boundary)
    stream = Stream(split_of(documents), boundary=boundary, seed=seed)
    assert stream.ids_per_epoch * 3 == len(naive)
    position = data.draw(st.integers(0, len(naive)))
    count = data.draw(st.integers(0, len(naive) - position))
    assert stream.read(position, count).tolist() == naive[position : position + count]
    at = data.draw(st.integers(0, len(naive) - 1))  # backwards, and into an epoch that was left
    assert stream.read(at, 1).tolist() == naive[at : at + 1]


@settings(max_examples=200, deadline=None)
@given(documents=corpora, boundary=st.booleans(), data=st.data())
def test_samples_go_with_the_ids(documents: list[bytes], boundary: bool, data: Any) -> None:
    """A boundary belongs to the document that it ends."""
    seed = data.draw(st.none() | st.integers(0, 9))
    stream = Stream(split_of(documents), boundary=boundary, seed=seed)
    naive: list[int] = []
    for epoch in range(2):
        order = range(len(documents)) if seed is None else permutation(seed, epoch, len(documents)).tolist()
        naive += [i for i in order for _ in range(len(documents[i]) + int(boundary))]
    position = data.draw(st.integers(0, len(naive) - 1))
    count = data.draw(st.integers(0, len(naive) - position))
    wide = count + data.draw(st.integers(0, 3))
    found = stream.samples(np.array([position]), wide, np.array([count]))
    assert found.tolist() == [naive[position : position + count] + [-1] * (wide - count)]


@settings(max_examples=100, deadline=None)
@given(documents=corpora, boundary=st.booleans(), seq_len=st.integers(1, 9), seed=st.integers(0, 9))
def test_training_rows_are_every_cut_of_the_stream_once(
    documents: list[bytes], boundary: bool, seq_len: int, seed: int
) -> None:
    """Window by window, in an order that is the same whatever was read before."""
    stream = Stream(split_of(documents), boundary=boundary, seed=seed)
    window = max(stream.ids_per_epoch // seq_len, 1)
    cuts = [stream.read(i * seq_len, seq_len).tolist() for i in range(3 * window)]
    rows = row_by_row(stream, seq_len, range(3 * window))
    together, mask = stream.rows(np.arange(3 * window), seq_len)
    assert together.tolist() == rows
    assert mask is None
    for first in range(0, 3 * window, window):
        assert sorted(rows[first : first + window]) == sorted(cuts[first : first + window])
    fresh = Stream(split_of(documents), boundary=boundary, seed=seed)
    assert row_by_row(fresh, seq_len, reversed(range(3 * window))) == rows[::-1]


def test_training_rows_are_shuffled_by_seed_and_window() -> None:
    stream = Stream(split_of([bytes(range(200))]), boundary=False, seed=0)
    other = Stream(split_of([bytes(range(200))]), boundary=False, seed=1)
    order = [[row[0] // 10 for row in row_by_row(s, 10, range(40))] for s in (stream, other)]
    assert sorted(order[0][:20]) == list(range(20)) == sorted(order[0][20:])
    assert order[0][:20] != list(range(20))
    assert order[0][:20] != order[0][20:]
    assert order[0] != order[1]


@pytest.mark.parametrize("documents", [[], [b""]])
def test_an_empty_split_is_an_error_that_names_it(documents: list[bytes]) -> None:
    with pytest.raises(DataError, match="'made': no bytes"):
        Stream(split_of(documents), boundary=False, seed=0)


def test_of_a_real_split(shards: Any) -> None:
    """The same over shards on disk: whole documents by key order, two sources, one pass."""
    split = open_split(shards, "val")
    stream = Stream(split, boundary=True, seed=None)
    documents = [split.read(i) for i in range(len(split))]
    naive = concatenated(documents, range(len(documents)), True)
    assert stream.read(0, stream.ids_per_epoch).tolist() == naive
    whole = np.array([stream.ids_per_epoch])
    samples = stream.samples(np.array([0]), stream.ids_per_epoch, whole).ravel()
    assert set(split.source_index[samples].tolist()) == {0, 1}
    assert int((stream.read(0, stream.ids_per_epoch) == BOUNDARY).sum()) == len(split)


def laid_out(documents: Sequence[bytes], order: Sequence[int], boundary: bool, align: int) -> list[int | None]:
    """The ids of one epoch, the naive way; None where it is filled up."""
    ids: list[int | None] = []
    for i in order:
        ids += [*documents[i], *([BOUNDARY] if boundary else [])]
        ids += [None] * (-len(ids) % align)
    return ids


@settings(max_examples=300, deadline=None)
@given(
    documents=corpora, boundary=st.booleans(), align=st.integers(1, 6), blocks=st.integers(1, 3), seed=st.integers(0, 9)
)
def test_aligned_rows_are_the_naive_layout_with_fillings_masked(
    documents: list[bytes], boundary: bool, align: int, blocks: int, seed: int
) -> None:
    """Every sample begins at a multiple of `align`; what fills up is masked, and targets count what is not."""
    seq_len = align * blocks
    stream = Stream(split_of(documents), boundary=boundary, seed=seed, align=align)
    naive: list[int | None] = []
    for epoch in range(3):
        naive += laid_out(documents, permutation(seed, epoch, len(documents)).tolist(), boundary, align)
    assert stream.ids_per_epoch * 3 == len(naive)
    rows = np.arange(len(naive) // seq_len // 3 * 2)
    ids, mask = stream.rows(rows, seq_len)
    counted = np.ones(ids.shape, bool) if mask is None else mask
    for at, row, count in zip(stream.positions(rows, seq_len).tolist(), ids.tolist(), counted.tolist(), strict=True):
        expected = naive[at : at + seq_len]
        assert [i if c else None for i, c in zip(row, count, strict=True)] == expected
        assert all(i == 0 for i, c in zip(row, count, strict=True) if not c)
    assert stream.targets(rows, seq_len) == int(counted.sum())
