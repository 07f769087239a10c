"""The gradient noise scale: at how many rows in a batch the gradient's noise is as large as the gradient. No torch.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: B_simple = S / |G|^2, with G the gradient of the whole data and
S the trace of the covariance of one row's gradient. A batch far smaller wastes few rows, one far larger wastes most.
Both are estimated without bias from the norms at two batch sizes: of the micro-batches, and of the whole batch. A ratio
of two noisy numbers is biased, so each is smoothed over steps before the division.
"""

from __future__ import annotations

from collections.abc import Sequence

KEPT = 0.99  # of what was known, at each step: an average over some hundred of them


def estimated(part_squares: float, batch_square: float, parts: int, rows: int) -> tuple[float, float]:
    """(|G|^2, S) of one step, each without bias; the first may be negative.

    part_squares  sum over the step's micro-batches, of all ranks, of the squared norm of each one's mean gradient
    batch_square  squared norm of the whole batch's mean gradient, before clipping
    parts, rows   micro-batches in the step, 2 or more; rows in the whole batch
    """
    small, large = rows / parts, rows
    small_square = part_squares / parts
    signal = (large * batch_square - small * small_square) / (large - small)
    noise = (small_square - batch_square) / (1 / small - 1 / large)
    return signal, noise


def smoothed(known: Sequence[float], now: tuple[float, float]) -> list[float]:
    """Both estimates averaged with what is known of earlier steps; [] knows nothing.

    Both begin at 0 and are equally far from their mean at first, so that their ratio is right from the first step on.
    """
    return [KEPT * before + (1 - KEPT) * new for before, new in zip(known or (0.0, 0.0), now, strict=True)]


def in_rows(known: Sequence[float]) -> float | None:
    """The noise scale, rows of data.seq_len ids (times seq_len: ids); None while there is too much noise to say."""
    return known[1] / known[0] if known and known[0] > 0 else None
