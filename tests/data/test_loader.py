"""Batches: ranks' parts are disjoint and cover the global batch; the position is the whole state; nothing is left over.

pytest tests/data/test_loader.py
"""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.config import DataConfig
from mbtrain.data.loader import Shape, batches, micro_batch
from mbtrain.data.mixture import Mixture, Rows, mixture
from mbtrain.data.rows import Stream
from mbtrain.errors import DataError
from mbtrain.shards import Split
from tests.data.test_rows import split_of


class Counting:
    """A mixture whose id at position p is p."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def rows(self, first: int, count: int) -> Rows:
        ids = np.arange(first * self.seq_len, (first + count) * self.seq_len).reshape(count, self.seq_len)
        return Rows(ids, None, np.zeros(count, np.int64))

    def targets(self, first: int, count: int) -> int:
        return count * self.seq_len


def counting(seq_len: int) -> Mixture:
    return cast(Mixture, Counting(seq_len))


def single(split: Split, seed: int, seq_len: int) -> Mixture:
    """A mixture of one source."""
    data = DataConfig(path="made", seq_len=seq_len)
    return mixture(data, [("made", Stream(split, boundary=True, seed=seed))])


@settings(deadline=None)
@given(
    ranks=st.integers(1, 6),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    seq_len=st.integers(1, 7),
    position=st.integers(0, 1000),
)
def test_ranks_parts_are_disjoint_and_cover_the_step(
    ranks: int, micro: int, accumulation: int, seq_len: int, position: int
) -> None:
    position *= seq_len
    parts = []
    for rank in range(ranks):
        shape = Shape(seq_len, micro, accumulation, rank, ranks)
        parts += [micro_batch(counting(seq_len), shape, position, m, 0).ids for m in range(accumulation)]
        assert all(part.shape == (micro, seq_len) for part in parts)
    ids = np.concatenate(parts).ravel()
    assert shape.step_ids == len(ids)
    assert np.array_equal(np.sort(ids), np.arange(position, position + shape.step_ids))


@settings(deadline=None)
@given(cuts=st.sampled_from([((1, 12, 1), (3, 2, 2)), ((2, 3, 2), (12, 1, 1)), ((4, 1, 3), (1, 4, 3))]))
def test_the_rows_of_a_step_do_not_depend_on_the_cut(cuts: Any) -> None:
    """(ranks, micro, accumulation): the same 12 rows, whoever reads them."""
    steps = []
    for ranks, micro, accumulation in cuts:
        rows = [
            micro_batch(counting(5), Shape(5, micro, accumulation, rank, ranks), 60, m, 0).ids
            for rank in range(ranks)
            for m in range(accumulation)
        ]
        steps.append({tuple(row) for part in rows for row in part.tolist()})
    assert steps[0] == steps[1]
    assert len(steps[0]) == 12


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 5), rank=st.integers(0, 1), ahead=st.integers(1, 6), seed=st.integers(0, 9))
def test_batches_from_a_position_are_the_tail_of_batches_from_0(step: int, rank: int, ahead: int, seed: int) -> None:
    """Over several epochs of a real stream (94 ids an epoch, 48 a step)."""
    split = split_of([bytes(range(i, i + 20 + i)) for i in range(4)])
    shape = Shape(4, 3, 2, rank, 2)
    with batches(single(split, seed, 4), shape, 0) as feed:
        whole = [batch.ids for batch in islice(feed, 16)]
    with batches(single(split, seed, 4), shape, step * shape.step_ids, ahead) as feed:
        tail = [batch.ids for batch in islice(feed, 16 - 2 * step)]
    assert np.array_equal(np.stack(whole[2 * step :]), np.stack(tail))


def test_the_layout_is_the_documented_one() -> None:
    """Micro-step m of rank r reads rows m (ranks micro) + r micro + [0, micro): pinned."""
    first = micro_batch(counting(10), Shape(10, 2, 3, 1, 2), 1000, 2, 0).ids[:, 0]
    assert first.tolist() == [1000 + 10 * (2 * 4 + 2), 1000 + 10 * (2 * 4 + 3)]


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    """After the batches that were read before it, and as itself."""

    class Failing(Counting):
        def rows(self, first: int, count: int) -> Rows:
            if first >= 2:
                raise DataError("the tar was cut off")
            return super().rows(first, count)

    with batches(cast(Mixture, Failing(4)), Shape(4, 1, 1, 0, 1), 0) as feed:
        assert next(feed).ids.tolist() == [[0, 1, 2, 3]]
        assert next(feed).ids.tolist() == [[4, 5, 6, 7]]
        with pytest.raises(DataError, match="the tar was cut off"):
            next(feed)
    assert not loader_threads()


@pytest.mark.parametrize("taken", [0, 1, 50])
def test_the_thread_ends_with_the_context(taken: int) -> None:
    """Also while it waits for room, and when the consumer fails."""

    def consume() -> None:
        with batches(counting(4), Shape(4, 1, 1, 0, 1), 0, ahead=2) as feed:
            for _ in range(taken):
                next(feed)
            assert len(loader_threads()) == 1
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()
    assert not loader_threads()


def test_it_reads_no_further_ahead_than_asked() -> None:
    reads: list[int] = []

    class Noting(Counting):
        def rows(self, first: int, count: int) -> Rows:
            reads.append(first)
            return super().rows(first, count)

    with batches(cast(Mixture, Noting(4)), Shape(4, 1, 1, 0, 1), 0, ahead=3) as feed:
        next(feed)
        deadline = time.monotonic() + 5
        while len(reads) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
    assert len(reads) == 5, "one taken, three in the queue, one in the hand"
