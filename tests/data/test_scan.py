"""Patch scan: a permutation of the raster whose blocks are the model's patches.

pytest tests/data/test_scan.py
"""

from __future__ import annotations

import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from mbtrain.data.scan import block_sides, order


@pytest.mark.parametrize(
    ("patches", "sides"),
    [
        ((12, 1), (2,)),
        ((48, 1), (4,)),
        ((192, 1), (8,)),
        ((192, 12, 1), (8, 2)),
        ((768, 48, 3, 1), (16, 4)),
        ((3, 1), ()),  # a pixel
        ((8, 1), ()),  # no square of pixels
        ((1,), ()),
        ((108, 12, 1), (6, 2)),
        ((300, 12, 1), (10, 2)),
        ((108, 48, 1), (6,)),  # 4 does not tile 6
    ],
)
def test_sides_of_the_blocks(patches: tuple[int, ...], sides: tuple[int, ...]) -> None:
    assert block_sides(patches) == sides


@settings(deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), side=st.sampled_from([2, 3, 4]))
def test_two_stages_are_the_papers_patch_scan(rows: int, columns: int, side: int) -> None:
    """Blocks in raster order, each with its pixels in raster order: the paper's rearrangement, by einops."""
    picture = np.arange(rows * side * columns * side * 3).reshape(rows * side, columns * side, 3)
    expected = rearrange(picture, "(r p) (c q) rgb -> (r c p q rgb)", p=side, q=side)
    assert np.array_equal(picture.ravel()[order(rows * side, columns * side, (3 * side * side, 1))], expected)


def test_three_stages_are_blocks_in_blocks() -> None:
    picture = np.arange(16 * 24 * 3).reshape(16, 24, 3)
    expected = rearrange(picture, "(r a p) (c b q) rgb -> (r c a b p q rgb)", a=4, p=2, b=4, q=2)
    assert np.array_equal(picture.ravel()[order(16, 24, (192, 12, 1))], expected)


@settings(deadline=None)
@given(patches=st.sampled_from([(12, 1), (192, 12, 1), (8, 1), (3, 1)]), blocks=st.integers(1, 3))
def test_it_is_a_permutation_and_so_can_be_undone(patches: tuple[int, ...], blocks: int) -> None:
    raster = np.random.default_rng(0).integers(0, 256, 8 * blocks * 16 * 3).astype(np.uint8)
    scanned = order(8 * blocks, 16, patches)
    assert np.array_equal(np.sort(scanned), np.arange(raster.size))
    back = np.empty_like(raster)
    back[scanned] = raster[scanned]
    assert np.array_equal(back, raster)
    if not block_sides(patches):
        assert np.array_equal(scanned, np.arange(raster.size))


def test_a_picture_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"30 x 64 pixels .* 8 x 8"):
        order(30, 64, (192, 1))
