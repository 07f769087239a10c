"""What a picture of bits per byte shows, without saying how it is drawn: curves, limits, ticks and units.

The page (vectors.py) and the PNGs (pictures.py) draw the same panels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbtrain.compare.groups import Group, smoothed
from mbtrain.compare.reading import AXES, Points, Run
from mbtrain.plots import UNITS

POINTS = 200  # of a curve: a panel is some 400 pixels wide
FAR = 20.0  # an axis is logarithmic where the longest run spent so many times what the shortest did
WORST = 3.0  # bits per byte above the median of the last values: what diverged may leave the picture

FLOP_UNITS = (
    (1e21, "ZFLOP"),
    (1e18, "EFLOP"),
    (1e15, "PFLOP"),
    (1e12, "TFLOP"),
    (1e9, "GFLOP"),
    (1e6, "MFLOP"),
    (1e3, "kFLOP"),
    (1.0, "FLOP"),
)
MINUTE_UNITS = ((1440.0, "d"), (60.0, "h"), (1.0, "min"))
_OF_AXIS = {"bytes": UNITS, "flops": FLOP_UNITS, "minutes": MINUTE_UNITS}
TITLES = {"bytes": "against data", "flops": "against compute", "minutes": "against time"}
_LABELS = {"bytes": "bytes trained on", "flops": "training compute", "minutes": "training time"}


@dataclass(frozen=True)
class Line:
    """A mean with its lowest and highest over seeds, along x in the panel's unit; float64 [n] each."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A group: its smoothed training, its validations of the whole split and of the first part."""

    train: Line
    val: Line
    partial: Line


@dataclass(frozen=True)
class Panel:
    """One axis of costs against bits per byte. Ticks are (place, label); curves stand in the order of the groups."""

    axis: str
    label: str
    log: bool
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def panels(groups: Sequence[Group]) -> list[Panel]:
    """A panel for each axis along which some run tells a point, all with the same limits of bits per byte."""
    raw = {axis: [_curve(group, axis) for group in groups] for axis in AXES}
    there = {axis: curves for axis, curves in raw.items() if any(len(line.x) for c in curves for line in _lines(c))}
    if not there:
        return []
    limits = _y_limits([c for curves in there.values() for c in curves])
    return [_panel(axis, curves, limits) for axis, curves in there.items()]


def amount(axis: str, value: float) -> str:
    """A cost with its unit, three digits: `12.3 MB`, `4.56 TFLOP`, `10 min`."""
    scale, unit = _unit(axis, 2 * value)
    return f"{value / scale:.3g} {unit}"


def _unit(axis: str, largest: float) -> tuple[float, str]:
    units = _OF_AXIS[axis]
    return next(((scale, name) for scale, name in units if largest >= 2 * scale), units[-1])


def _lines(curve: Curve) -> tuple[Line, Line, Line]:
    return curve.train, curve.val, curve.partial


def _curve(group: Group, axis: str) -> Curve:
    return Curve(
        _train(group.runs, axis),
        _validated([run.val for run in group.runs], axis),
        _validated([run.partial for run in group.runs], axis),
    )


def _train(runs: Sequence[Run], axis: str) -> Line:
    """Mean, lowest and highest of the smoothed curves, where all that have one are."""
    curves = [(x, y) for x, y in (smoothed(run.train, axis) for run in runs) if len(x)]
    if not curves:
        return _nothing()
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > end:  # one stopped before the other's first line
        curves = [max(curves, key=lambda curve: curve[0][-1])]
        start, end = curves[0][0][0], curves[0][0][-1]
    # Half of the points evenly, half towards the start, where the fall is.
    even = np.linspace(0, 1, POINTS // 2)
    x = np.unique(np.concatenate([even, even**3])) * (end - start) + start
    if len(curves) == 1 and len(curves[0][0]) <= POINTS:
        x = curves[0][0]
    ys = np.stack([np.interp(x, *curve) for curve in curves])
    return Line(x, ys.mean(0), ys.min(0), ys.max(0))


def _validated(of_runs: Sequence[Points], axis: str) -> Line:
    """The first validation of each seed, the second and so on, where they were made at about the same cost."""
    points = []
    for one in of_runs:
        x, y = one.costs[axis], one.bpb
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            points.append((x[finite], y[finite]))
    if not points:
        return _nothing()
    if len({len(x) for x, _ in points}) == 1:
        xs, ys = np.stack([x for x, _ in points]), np.stack([y for _, y in points])
        if (np.ptp(xs, axis=0) <= 0.1 * xs.max(0)).all():
            return Line(xs.mean(0), ys.mean(0), ys.min(0), ys.max(0))
    x, y = (np.concatenate(parts) for parts in zip(*points, strict=True))
    order = np.argsort(x, kind="stable")
    return Line(x[order], y[order], y[order], y[order])


def _nothing() -> Line:
    none = np.zeros(0)
    return Line(none, none, none, none)


def _panel(axis: str, curves: Sequence[Curve], y_limits: tuple[float, float]) -> Panel:
    ends = [max(line.x[-1] for line in _lines(c) if len(line.x)) for c in curves if any(len(li.x) for li in _lines(c))]
    positive = [end for end in ends if end > 0] or [1.0]
    longest, shortest = max(positive), min(positive)
    scale, unit = _unit(axis, longest)
    log = longest > FAR * shortest
    scaled = tuple(Curve(*(Line(li.x / scale, li.mean, li.low, li.high) for li in _lines(c))) for c in curves)
    high = longest / scale
    limits: tuple[float, float] = (shortest / scale / 10, high * 1.15) if log else (0.0, high * 1.02)
    return Panel(
        axis=axis,
        label=f"{_LABELS[axis]} ({unit})",
        log=log,
        x_limits=limits,
        y_limits=y_limits,
        x_ticks=_decades(*limits) if log else _ticks(limits, most=6),
        y_ticks=_ticks(y_limits, most=7),
        curves=scaled,
    )


def _y_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Where the runs are going: the fall from 8 bits in the first fifth of a curve may leave the picture."""
    shown: list[float] = []
    lasts: list[float] = []
    for curve in curves:
        x = curve.train.x
        late = x >= x[0] + (x[-1] - x[0]) / 5 if len(x) else np.zeros(0, bool)
        for values in (
            curve.train.low[late],
            curve.train.high[late],
            curve.val.low,
            curve.val.high,
            curve.partial.mean,
        ):
            shown.extend(values.tolist())
        lasts.extend(float(line.mean[-1]) for line in _lines(curve) if len(line.x))
    low = min(shown)
    high = min(max(shown), float(np.median(lasts)) + WORST)
    room = max(0.06 * (high - low), 0.01)
    return max(0.0, low - room), high + room


def _ticks(limits: tuple[float, float], most: int) -> tuple[tuple[float, str], ...]:
    """At most so many places at multiples of 1, 2 or 5 times a power of ten."""
    low, high = limits
    least = (high - low) / most
    if not least > 0:
        return ((low, f"{low:g}"),)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * times for times in (1, 2, 5, 10, 20) if power * times >= least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1))


def _decades(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Powers of ten, and where there are few of them twice and five times these."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    times = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    places = [m * 10.0**power for power in powers for m in times]
    return tuple((place, f"{place:g}") for place in places if low <= place <= high)
