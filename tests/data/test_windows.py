"""Windows of evaluation: in every mode every id is scored once, where the naive definition of the mode says.

pytest tests/data/test_windows.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.data.rows import Stream
from mbtrain.data.windows import MODES, evaluation_batch, evaluation_windows
from mbtrain.vocab import BOUNDARY, FILLING
from tests.data.test_rows import concatenated, corpora, split_of


def naive_window(x: int, seq_len: int, patch: int, mode: str) -> int:
    """Where the window begins in which id x of a stretch is scored, by the modes' definitions; x at a time."""

    def one_pass(x: int) -> int:
        stride = seq_len // 2 // patch * patch or patch
        if mode in ("basic", "strided") or x < seq_len or stride == seq_len:
            return x // seq_len * seq_len
        begin = 0
        while not begin + seq_len - stride <= x < begin + seq_len:
            begin += stride
        return begin

    first = one_pass(x)
    if mode in ("basic", "sliding"):
        return first
    column = x - first
    without_context = first == 0 or one_pass(first) == first
    in_first_patch = column < patch and without_context
    if in_first_patch or column % patch < patch // 2:
        return first
    return patch // 2 + one_pass(x - patch // 2)


def scored_in(stream: Stream, seq_len: int, batch: int, **options: Any) -> list[tuple[int, int, int, int]]:
    """Of everything that is scored, in order: (place in the pass, begin of its window, id, sample)."""
    windows = evaluation_windows(stream, seq_len, **options)
    assert (np.diff(windows.at) >= 0).all()
    found = []
    for first in range(0, len(windows), batch):
        mine = range(first, min(first + batch, len(windows)))
        ids, scored, samples = evaluation_batch(stream, seq_len, windows, mine, batch)
        assert ids.shape == scored.shape == samples.shape == (batch, seq_len)
        assert not scored[len(mine) :].any(), "windows that are not there are not scored"
        for row, column in zip(*np.nonzero(scored), strict=True):
            at = int(windows.at[first + row])
            found.append((at + int(column), at, int(ids[row, column]), int(samples[row, column])))
    return sorted(found)


@settings(max_examples=400, deadline=None)
@given(
    documents=corpora,
    boundary=st.booleans(),
    patch=st.sampled_from([2, 4]),
    patches=st.integers(1, 5),
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 4),
    apart=st.booleans(),
)
def test_every_id_is_scored_once_where_the_definition_says(
    documents: list[bytes], boundary: bool, patch: int, patches: int, mode: str, batch: int, apart: bool
) -> None:
    """Packed, or with rows of its own for each sample, which no window leaves."""
    seq_len = patch * patches
    stream = Stream(split_of(documents), boundary=boundary, seed=None, align=seq_len if apart else 1)
    sizes = [len(document) + int(boundary) for document in documents]
    expected = []
    place = 0
    for size in sizes if apart else [sum(sizes)]:
        expected += [(place + x, place + naive_window(x, seq_len, patch, mode)) for x in range(size)]
        place += -(-size // seq_len) * seq_len if apart else size
    found = scored_in(stream, seq_len, batch, mode=mode, patch_size=patch)
    assert [(x, at) for x, at, _, _ in found] == expected
    assert [i for _, _, i, _ in found] == concatenated(documents, range(len(documents)), boundary)
    assert [sample for *_, sample in found] == [i for i, size in enumerate(sizes) for _ in range(size)]


@settings(max_examples=100, deadline=None)
@given(documents=corpora, seq_len=st.integers(1, 9), mode=st.sampled_from(["basic", "sliding"]))
def test_without_patches_any_row_will_do(documents: list[bytes], seq_len: int, mode: str) -> None:
    stream = Stream(split_of(documents), boundary=True, seed=None)
    found = scored_in(stream, seq_len, 3, mode=mode)
    assert [i for _, _, i, _ in found] == concatenated(documents, range(len(documents)), True)
    assert all(x - at >= seq_len - (seq_len // 2 or 1) for x, at, _, _ in found if at and mode == "sliding")


def test_of_eight_ids_in_patches_of_four() -> None:
    """The definitions, written out: T = 8, P = 4, twenty ids; where the window of each begins."""
    stream = Stream(split_of([bytes(range(20))]), boundary=False, seed=None)

    def begins(mode: str) -> list[int]:
        return [at for _, at, _, _ in scored_in(stream, 8, 1, mode=mode, patch_size=4)]

    assert begins("basic") == [0] * 8 + [8] * 8 + [16] * 4
    assert begins("sliding") == [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4
    assert begins("strided") == [0, 0, 0, 0, 0, 0, 2, 2, 8, 8, 8, 8, 8, 8, 10, 10, 16, 16, 16, 16]
    assert begins("both") == [0, 0, 0, 0, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize(("mode", "cost"), [("basic", 1), ("sliding", 2), ("strided", 2), ("both", 4)])
def test_what_a_mode_costs(mode: str, cost: int) -> None:
    stream = Stream(split_of([bytes(64 * 100)]), boundary=False, seed=None)
    windows = evaluation_windows(stream, 64, mode=mode, patch_size=8)
    assert 100 * cost - 4 <= len(windows) <= 100 * cost


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(("limit", "ids"), [(1, 8), (8, 8), (9, 16), (10**9, 56), (None, 56)])
def test_a_limit_is_the_same_whole_rows_in_all_modes(mode: str, align: int, limit: int | None, ids: int) -> None:
    stream = Stream(split_of([bytes(23), bytes(31)]), boundary=True, seed=None, align=align)
    found = scored_in(stream, 8, 2, mode=mode, patch_size=4, limit_bytes=limit)
    rows = [x for x, _, _, _ in scored_in(stream, 8, 2, patch_size=4) if x < (ids if limit else 10**9)]
    assert [x for x, *_ in found] == rows
    assert align == 8 or len(rows) == ids


def test_a_sample_that_fits_one_window_has_it_alone() -> None:
    """Sliding is then basic, and strided begins P / 2 later within the sample."""
    documents = [bytes(range(8)), bytes(range(6)), bytes(range(3))]
    stream = Stream(split_of(documents), boundary=False, seed=None, align=8)

    def begins(mode: str) -> Sequence[int]:
        return evaluation_windows(stream, 8, mode=mode, patch_size=4).at.tolist()

    assert begins("basic") == begins("sliding") == [0, 8, 16]
    assert begins("strided") == begins("both") == [0, 2, 8, 16]


def test_the_last_window_is_filled_up_and_the_filling_never_scored() -> None:
    stream = Stream(split_of([b"\0" * 5]), boundary=True, seed=None)
    windows = evaluation_windows(stream, 4)
    ids, scored, _ = evaluation_batch(stream, 4, windows, [0, 1], 3)
    assert scored.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]
    assert ids[1, 1] == BOUNDARY, "zero bytes are scored like any other, the filling is told by the mask alone"
    told = Stream(split_of([b"\0" * 5]), boundary=True, seed=None, filling=FILLING)
    ids, _, _ = evaluation_batch(told, 4, windows, [0, 1], 3)
    assert ids.tolist() == [[0] * 4, [0, BOUNDARY, FILLING, FILLING], [FILLING] * 4]


def test_no_windows_at_all_are_a_whole_batch_of_nothing() -> None:
    """A rank without windows in the last round still takes part in the forward pass."""
    stream = Stream(split_of([b"abc"]), boundary=True, seed=None)
    ids, scored, _ = evaluation_batch(stream, 4, evaluation_windows(stream, 4), [], 2)
    assert ids.shape == (2, 4)
    assert not scored.any()
