"""Intervals by bootstrap: they cover the truth as often as they say, and are the same each time.

pytest tests/test_intervals.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from mbtrain import intervals


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 corpora of 60 documents; each document has its own difficulty and length. Percentile intervals of so few
    documents are known to be somewhat narrow: 189 of 200 cover it here."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        bytes_ = rng.integers(100, 2000, 60).astype(float)
        nats = bytes_ * math.log(2) * rng.normal(2.0, 0.3, 60)
        low, high = intervals.of_bpb(nats, bytes_) or (math.nan, math.nan)
        assert low < nats.sum() / math.log(2) / bytes_.sum() < high
        covered += low < 2.0 < high
    assert 0.88 <= covered / 200 <= 0.99


def test_its_width_is_that_of_the_formula() -> None:
    """Equal lengths: 2 x 1.96 standard errors of the mean."""
    rng = np.random.default_rng(2)
    values = rng.normal(5.0, 1.0, 2000)
    low, high = intervals.ratio_of_sums(values, np.ones(2000)) or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(2000), rel=0.08)
    assert (low, high) == intervals.ratio_of_sums(values, np.ones(2000)), "by a fixed seed"


def test_documents_alike_leave_no_doubt() -> None:
    assert intervals.ratio_of_sums(np.full(5, 3.0), np.full(5, 2.0)) == (1.5, 1.5)


@pytest.mark.parametrize("n", [0, 1])
def test_one_document_has_no_interval(n: int) -> None:
    """Nor have many, of which one was scored."""
    assert intervals.of_bpb(np.ones(n), np.ones(n)) is None
    there = np.zeros(5)
    there[:n] = 1
    assert intervals.of_bpb(there, there) is None


def test_documents_without_bytes_count_by_their_nats() -> None:
    """An empty document costs its boundary. Draws of empty documents alone have no score."""
    low, high = intervals.ratio_of_sums(np.array([1.0, 1.0, 1.0]), np.array([4.0, 0.0, 0.0])) or (0.0, 0.0)
    assert (low, high) == (0.25, 0.75)
