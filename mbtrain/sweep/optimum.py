"""The best learning rate of a curve, how it moves with width, and whether it transfers. Pure functions of numbers.

A curve is {log2 of the LR: loss}. An infinite loss is a run that diverged: worse than any other. A loss that is nan is
not known, as if it were not there. Shifts are in log2 units: 1 is a factor of 2, which is one step of the usual grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

# A shift from the smallest to the largest width, by the grid's best and by the parabola's: at most one factor of 2, and
# the optimum transfers. One that does not, as in SP, moves by two factors of 2 or more over 8 times the width.
MOST_SHIFT = 1.0

TRANSFERS, FAILS = "transfers", "does not transfer"
OPEN, UNKNOWN = "open: optimum at the edge", "unknown: trials are missing"

# 97.5 % quantiles of Student's t at 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Optimum:
    """Where a curve is lowest.

    grid      log2 of the LR of its lowest point; nan where no loss is finite
    log2_lr   of the vertex of the parabola through that point and its neighbours; `grid` where there is none
    loss      of the lowest point; vertex_loss: of the parabola's vertex, never more
    edge      low, high or alone: no point beyond it on that side (on both), so that the optimum may lie outside; ""
    parabola  whether both neighbours have finite losses. False beside a diverged run, which bounds the optimum
    error     standard error of log2_lr over seeds; nan for one seed
    seeds     how many curves it comes of
    """

    grid: float
    log2_lr: float
    loss: float
    vertex_loss: float
    edge: str = ""
    parabola: bool = False
    error: float = math.nan
    seeds: int = 1


@dataclass(frozen=True)
class Shift:
    """How the optimum moves from the smallest width to the largest; in log2 units, negative: to lower rates.

    grid, log2_lr  by the lowest points and by the parabolas
    largest        between any two widths, by the parabolas; largest_grid: by the lowest points
    slope          least squares of log2_lr on log2 width: per doubling
    error          standard error of log2_lr over seeds; nan unless both ends have two seeds
    freedom        degrees of freedom of that
    open           the widths whose optimum lies on the grid's edge
    missing        the widths of which no loss is known
    """

    grid: float
    log2_lr: float
    largest: float
    largest_grid: float
    slope: float
    error: float
    freedom: int
    open: tuple[float, ...] = ()
    missing: tuple[float, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of log2_lr over seeds by Student's t; nan without an error."""
        reach = student(self.freedom) * self.error
        return self.log2_lr - reach, self.log2_lr + reach


def best(curve: Mapping[float, float]) -> Optimum:
    """The optimum of one curve; of equal losses the lower rate, which is the safer one.

    By three points the parabola's vertex is at most half-way to a neighbour: the lowest point is one of the three.
    """
    points = sorted((x, y) for x, y in curve.items() if not math.isnan(y))
    finite = [(y, x) for x, y in points if math.isfinite(y)]
    if not finite:
        return Optimum(math.nan, math.nan, math.nan, math.nan, "alone")
    loss, at = min(finite)
    place = [x for x, _ in points].index(at)
    first, last = place == 0, place == len(points) - 1
    found = Optimum(at, at, loss, loss, "alone" if first and last else "low" if first else "high" if last else "")
    if first or last or not (math.isfinite(points[place - 1][1]) and math.isfinite(points[place + 1][1])):
        return found
    x, vertex_loss = _vertex(points[place - 1], points[place], points[place + 1])
    return replace(found, log2_lr=x, vertex_loss=vertex_loss, parabola=True)


def of_seeds(curves: Sequence[Mapping[float, float]]) -> Optimum:
    """The optimum of the mean curve of several seeds, with the standard error of the seeds' own optima.

    A rate at which one seed diverged has an infinite mean. A rate that a seed lacks, or does not know, is left out
    where that leaves three rates that all have, for means of different seeds say as much of the seeds as of the rate.
    """
    known = [{x: y for x, y in curve.items() if not math.isnan(y)} for curve in curves]
    known = [curve for curve in known if curve]
    if not known:
        return best({})
    everywhere = set.intersection(*(set(curve) for curve in known))
    rates = everywhere if len(everywhere) >= 3 else set().union(*known)
    means = {x: mean([curve[x] for curve in known if x in curve]) for x in rates}
    own = [found for found in map(best, known) if not math.isnan(found.log2_lr)]
    found = replace(best(means), seeds=len(known))
    if len(own) < 2 or any(one.edge for one in own):  # a seed whose optimum is at the edge says too little of spread
        return found
    return replace(found, error=standard_error([one.log2_lr for one in own]))


def shift(optima: Mapping[float, Optimum]) -> Shift:
    """From the smallest width to the largest; widths are factors or features, above 0. Raises ValueError for none."""
    if not optima:
        raise ValueError("shift: no widths")
    widths = sorted(optima)
    known = [width for width in widths if not math.isnan(optima[width].log2_lr)]
    opened, missing = tuple(w for w in known if optima[w].edge), tuple(w for w in widths if w not in known)
    if len(known) < 2:
        return Shift(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0, opened, missing)
    low, high = optima[known[0]], optima[known[-1]]
    places, grid = [optima[w].log2_lr for w in known], [optima[w].grid for w in known]
    return Shift(
        grid=high.grid - low.grid,
        log2_lr=high.log2_lr - low.log2_lr,
        largest=max(places) - min(places),
        largest_grid=max(grid) - min(grid),
        slope=slope([math.log2(width) for width in known], places),
        error=math.hypot(low.error, high.error),
        freedom=low.seeds + high.seeds - 2,
        open=opened,
        missing=missing,
    )


def verdict(moved: Shift) -> str:
    """transfers: both shifts are at most one factor of 2; open where a width's optimum is at the edge of its grid."""
    if moved.missing or math.isnan(moved.log2_lr):
        return UNKNOWN
    if moved.open:
        return OPEN
    return TRANSFERS if max(abs(moved.grid), abs(moved.log2_lr)) <= MOST_SHIFT else FAILS


def is_sure(moved: Shift) -> bool | None:
    """Whether the whole interval over seeds is on the verdict's side of one factor of 2; None without an interval."""
    low, high = moved.interval
    if math.isnan(low):
        return None
    within = low >= -MOST_SHIFT and high <= MOST_SHIFT
    beyond = low > MOST_SHIFT or high < -MOST_SHIFT
    return within or beyond


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least squares of y on x; nan where all x are equal."""
    middle_x, middle_y = mean(xs), mean(ys)
    spread = sum((x - middle_x) ** 2 for x in xs)
    if not spread:
        return math.nan
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / spread


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; nan for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (n - 1) / n)


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t; above 15 degrees of freedom 2.13, which is a little too wide. nan for none."""
    return _T[min(freedom, len(_T)) - 1] if freedom > 0 else math.nan


def falls(losses: Sequence[float]) -> bool:
    """Whether each loss is below the one before; never with a loss that is not finite."""
    return all(math.isfinite(loss) for loss in losses) and all(after < before for before, after in pairwise(losses))


def _vertex(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> tuple[float, float]:
    """Of the parabola through three points, the middle one the lowest; the middle itself where all are equal."""
    # In x - middle and y - middle: y = a x^2 + b x through (-p, u) and (q, v), with u, v >= 0.
    p, q = middle[0] - left[0], right[0] - middle[0]
    u, v = left[1] - middle[1], right[1] - middle[1]
    a = (u / p + v / q) / (p + q)
    b = (v * p / q - u * q / p) / (p + q)
    if a <= 0:
        return middle
    return middle[0] - b / (2 * a), middle[1] - b * b / (4 * a)


def mean(values: Sequence[float]) -> float:
    """Arithmetic; nan of nothing."""
    return sum(values) / len(values) if values else math.nan
