"""Mixtures: which source a row is from is a pure function of its number, and keeps the weights in every stretch.

pytest tests/data/test_mixture.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.config import DataConfig
from mbtrain.data.mixture import CYCLE, Mixture, mixture
from mbtrain.data.rows import Stream
from mbtrain.errors import DataError
from tests.data.test_rows import split_of

SEQ_LEN = 8


def mix(sources: list[dict[str, Any]], sizes: list[int], align: int = 1, **data: Any) -> Mixture:
    """A mixture over made documents: source i holds `sizes[i]` documents of 20 bytes, all of value i."""
    named = [{"path": f"made{i}", **source} for i, source in enumerate(sources)]
    settings_ = DataConfig(sources=named, seq_len=SEQ_LEN, **data)
    streams = [
        (source.label, Stream(split_of([bytes([i]) * 20] * size), boundary=False, seed=3, align=align))
        for i, (source, size) in enumerate(zip(settings_.mixture, sizes, strict=True))
    ]
    return mixture(settings_, streams)


weights = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(weights=weights, first=st.integers(0, 10**9), count=st.integers(1, 200))
def test_any_stretch_of_rows_holds_each_sources_share(weights: list[float], first: int, count: int) -> None:
    """Up to the quotas' rounding, to within a few rows; and counts agree with the rows.

    At time t of a cycle each of n sources is within half a row of its due, so the row number is within n / 2 of its
    time, and a stretch has two ends.
    """
    made = mix([{"weight": w} for w in weights], [5] * len(weights))
    of, _ = made.place(first, count)
    got = np.bincount(of, minlength=len(weights))
    assert np.array_equal(made.counts(first + count) - made.counts(first), got)
    quotas = made.phases[0].quotas
    assert quotas.sum() == CYCLE
    assert np.abs(quotas / CYCLE - np.array(weights) / sum(weights)).max() <= (len(weights) + 1) / CYCLE
    assert (np.abs(got - count * quotas / CYCLE) <= 1 + len(weights) * quotas / CYCLE).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), weights=weights)
def test_every_row_of_a_source_comes_once_and_in_order(data: Any, weights: list[float]) -> None:
    """Through caps and schedules too; and any cut of the rows gives the same ones."""
    sources: list[dict[str, Any]] = []
    for weight in weights:
        source: dict[str, Any] = {"weight": weight}
        if data.draw(st.booleans()):
            source = {"schedule": [(0, weight), (data.draw(st.integers(1, 9000)), data.draw(st.floats(0, 5)))]}
        if data.draw(st.booleans()):
            source["epochs"] = data.draw(st.floats(0.5, 20))
        sources.append(source)
    sources.append({"weight": 0.01})  # never ends, so that there is always a row
    sizes = data.draw(st.lists(st.integers(2, 40), min_size=len(sources), max_size=len(sources)))
    made = mix(sources, sizes)
    of, index = made.place(0, 3000)
    for i, source in enumerate(made.sources):
        assert index[of == i].tolist() == list(range(int((of == i).sum())))
        assert source.largest_rows is None or (of == i).sum() <= source.largest_rows
    cut = data.draw(st.integers(0, 2999))
    parts = [made.place(0, cut), made.place(cut, 3000 - cut)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), of)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), index)
    assert np.array_equal(made.counts(cut), np.bincount(of[:cut], minlength=len(sources)))


def test_the_pattern_is_pinned() -> None:
    """Another order is another experiment: these numbers must never change."""
    of, index = mix([{"weight": 3}, {"weight": 1}, {"weight": 2}], [5, 5, 5]).place(0, 12)
    assert of.tolist() == [0, 2, 1, 0, 2, 0, 0, 2, 1, 0, 2, 0]
    assert index.tolist() == [0, 0, 0, 1, 1, 2, 3, 2, 1, 4, 3, 5]


def test_rows_are_those_of_the_sources() -> None:
    made = mix([{"weight": 1}, {"weight": 2}], [7, 4])
    rows = made.rows(10, 50)
    of, index = made.place(10, 50)
    assert rows.sources.tolist() == of.tolist()
    for row, source, i in zip(rows.ids, of, index, strict=True):
        expected, _ = made.sources[source].stream.rows(np.array([i]), SEQ_LEN)
        assert row.tolist() == expected[0].tolist()
    assert rows.mask is None
    assert made.targets(10, 50) == 50 * SEQ_LEN


def test_masks_and_targets_of_rows_that_are_not_full() -> None:
    """Documents of 20 bytes in rows of 8: two full ones and one of 4."""
    made = mix([{"weight": 1}, {"weight": 1}], [7, 4], align=SEQ_LEN)
    rows = made.rows(0, 30)
    assert rows.mask is not None
    assert set(rows.mask.sum(axis=1).tolist()) == {8, 4}
    assert made.targets(0, 30) == int(rows.mask.sum())


def test_without_weights_sources_weigh_what_they_hold_and_temperature_flattens_it() -> None:
    plain = mix([{}, {}], [30, 10]).phases[0].quotas / CYCLE
    warm = mix([{}, {}], [30, 10], temperature=2.0).phases[0].quotas / CYCLE
    hot = mix([{}, {}], [30, 10], temperature=1e9).phases[0].quotas / CYCLE
    assert plain == pytest.approx([0.75, 0.25], abs=1e-4)
    assert warm == pytest.approx([3**0.5 / (3**0.5 + 1), 1 / (3**0.5 + 1)], abs=1e-4)
    assert hot == pytest.approx([0.5, 0.5], abs=1e-4)


def test_weights_are_shares_of_bytes_not_of_rows() -> None:
    """A source whose rows are half empty gets twice the rows."""
    settings_ = DataConfig(
        sources=[{"path": "full", "weight": 1}, {"path": "half", "weight": 1}],  # type: ignore[list-item]
        seq_len=SEQ_LEN,
    )
    full = Stream(split_of([b"x" * 8] * 9), boundary=False, seed=0, align=8)
    half = Stream(split_of([b"y" * 4] * 9), boundary=False, seed=0, align=8)
    made = mixture(settings_, [("full", full), ("half", half)])
    rows = made.rows(0, 3000)
    assert rows.mask is not None
    counted = [int(rows.mask[rows.sources == i].sum()) for i in (0, 1)]
    assert counted[0] == pytest.approx(counted[1], rel=0.01)


def test_a_schedule_holds_from_its_byte_on() -> None:
    made = mix([{"schedule": [(0, 1), (800, 0), (1600, 1)]}, {"weight": 1}], [9, 9])
    of, _ = made.place(0, 300)
    assert sorted(set(of[:100].tolist())) == [0, 1]
    assert set(of[100:200].tolist()) == {1}
    assert sorted(set(of[200:].tolist())) == [0, 1]


def test_a_source_is_read_at_most_so_often_and_the_others_go_on() -> None:
    made = mix([{"weight": 9, "epochs": 2}, {"weight": 1}], [4, 9])  # 80 bytes an epoch: 20 rows in all
    of, _ = made.place(0, 200)
    assert int((of == 0).sum()) == 20
    assert set(of[30:].tolist()) == {1}
    assert made.epochs(200)[0] == 2.0


def test_when_all_have_ended_it_says_so() -> None:
    made = mix([{"epochs": 1}, {"epochs": 1}], [4, 4])
    assert made.end == 20
    of, _ = made.place(0, 20)
    assert np.bincount(of).tolist() == [10, 10]
    with pytest.raises(DataError, match="made0, made1 have been read as often as epochs allows after row 20"):
        made.place(15, 6)


def test_caps_and_exponents_beyond_all_numbers() -> None:
    """A cap that nobody reaches is none; what would overflow is refused by the configuration."""
    assert mix([{"epochs": 1e300}], [4]).end is None
    assert mix([{"epochs": 1e9}], [40]).end == 10**11
    for broken in ({"temperature": 1e-3}, {"sources": [{"path": "x", "schedule": [(0, 1), (10**30, 2)]}]}):
        with pytest.raises(ValueError, match=r"less than or equal|greater than or equal"):
            DataConfig(**{"sources": [{"path": "x"}], **broken})


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no source has a weight above zero"):
        mix([{"weight": 0}, {"weight": 0}], [4, 4])
