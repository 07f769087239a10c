"""The order in which an image's bytes stand in a row. Shards hold rasters; the order is the reader's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def block_sides(patch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Sides in pixels of the square blocks of p x p x 3 bytes that are one position of a stage, coarse to fine.

    Stages whose patch is no such block (or a single pixel) have none, nor those that do not tile the block around them.
    """
    sides: list[int] = []
    for size in patch_sizes:
        side = math.isqrt(size // 3)
        if 3 * side * side == size and side > 1 and (not sides or sides[-1] % side == 0):
            sides.append(side)
    return tuple(sides)


@lru_cache(maxsize=64)
def order(height: int, width: int, patch_sizes: tuple[int, ...]) -> np.ndarray:
    """Patch scan, int64 [height * width * 3]: row position -> byte of the raster; `row = raster[order]`.

    Blocks of p x p pixels stand in raster order of blocks, p = sqrt(P / 3) for the coarsest patch of P bytes (paper,
    section 2.2 on images); inside a block those of the next finer stage, and at last the pixels, three bytes each.

    Raises:
        ValueError: the picture is not a whole number of blocks high and wide.
    """
    sides = block_sides(patch_sizes)
    if sides and (height % sides[0] or width % sides[0]):
        raise ValueError(f"{height} x {width} pixels are no whole number of blocks of {sides[0]} x {sides[0]}")
    y, x = np.divmod(np.arange(height * width), width)
    keys: list[np.ndarray] = []  # from the most significant on
    for side in sides:
        keys += [y // side, x // side]
    pixels = np.lexsort((x, y, *reversed(keys)))
    return (pixels[:, None] * 3 + np.arange(3)).reshape(-1)
