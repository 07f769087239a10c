"""Panels as inline SVG: colours are those of the page's style, light or dark; each curve says its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mbtrain.compare.curves import TITLES, Line, Panel
from mbtrain.compare.groups import Group, Spread
from mbtrain.compare.markup import Markup, element

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 8, 42
COLOURS = 10  # groups with a colour of their own; the others are grey
_BAR = 104  # width of the picture of a score

Place = Callable[[float], float]


def colour(index: int) -> str:
    """The class of a group's colour, by its rank."""
    return f"c{index}" if index < COLOURS else "cx"


def chart(panel: Panel, groups: Sequence[Group], place: str) -> Markup:
    """A panel of curves, the best on top. `place` tells it from the other charts of the page."""
    across, up = _places(panel)
    curves = []
    for i in range(len(groups) - 1, -1, -1):
        curve, name = panel.curves[i], groups[i].name
        drawn = [element("title", name)]
        if len(curve.train.x) > 1 and (curve.train.high > curve.train.low).any():
            drawn.append(element("path", _class="band", d=_band(curve.train, across, up)))
        if len(curve.train.x):
            drawn.append(element("path", _class="train", d=_path(curve.train.x, curve.train.mean, across, up)))
        for line, kind in ((curve.partial, "partial"), (curve.val, "val")):
            if len(line.x) > 1:
                drawn.append(element("path", _class=kind, d=_path(line.x, line.mean, across, up)))
            for x, mean, low, high in zip(line.x, line.mean, line.low, line.high, strict=True):
                if high > low:
                    at = _round(across(x))
                    drawn.append(element("line", _class="reach", x1=at, x2=at, y1=_round(up(low)), y2=_round(up(high))))
                drawn.append(element("circle", _class=kind, cx=_round(across(x)), cy=_round(up(mean)), r=2.6))
        curves.append(element("g", drawn, _class=f"curve {colour(i)}", data_g=i))
    clip = f"clip-{place}-{panel.axis}"
    return element(
        "svg",
        element("title", f"Bits per byte {TITLES[panel.axis]}"),
        element("clipPath", element("rect", **_box()), id=clip),
        _frame(panel, across, up),
        element("g", curves, clip_path=f"url(#{clip})"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
    )


def bar(score: Spread, limits: tuple[float, float]) -> Markup:
    """A mean with its lowest and highest on a scale that all rows of a table share."""
    span = max(limits[1] - limits[0], 1e-9)

    def place(value: float) -> float:
        return _round(6 + (_BAR - 12) * (min(max(value, limits[0]), limits[1]) - limits[0]) / span)

    parts = [element("line", _class="rule", x1=2, x2=_BAR - 2, y1=8, y2=8)]
    if score.high > score.low:
        parts.append(element("line", _class="whisker", x1=place(score.low), x2=place(score.high), y1=8, y2=8))
    parts.append(element("circle", _class="dot", cx=place(score.mean), cy=8, r=4))
    return element("svg", parts, viewBox=f"0 0 {_BAR} 16", _class="bar", aria_hidden="true")


def _box() -> dict[str, object]:
    return {"x": LEFT, "y": TOP, "width": WIDTH - LEFT - RIGHT, "height": HEIGHT - TOP - BOTTOM}


def _places(panel: Panel) -> tuple[Place, Place]:
    """Cost -> x and bits per byte -> y, in the picture's units."""
    (x_low, x_high), (y_low, y_high) = panel.x_limits, panel.y_limits
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        if panel.log:
            share = math.log(max(x, x_low / 10) / x_low) / math.log(x_high / x_low)
        else:
            share = (x - x_low) / max(x_high - x_low, 1e-12)
        return LEFT + share * wide

    def up(y: float) -> float:
        return TOP + (y_high - min(max(y, y_low - 50), y_high + 50)) / max(y_high - y_low, 1e-12) * tall

    return across, up


def _frame(panel: Panel, across: Place, up: Place) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value, label in panel.y_ticks:
        y = _round(up(value))
        parts.append(element("line", _class="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", label, x=LEFT - 6, y=y + 3.5, text_anchor="end"))
    for value, label in panel.x_ticks:
        x = _round(across(value))
        parts.append(element("line", _class="grid", x1=x, x2=x, y1=TOP, y2=bottom))
        parts.append(element("text", label, x=x, y=bottom + 15, text_anchor="middle"))
    parts.append(element("line", _class="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = panel.label + (", log scale" if panel.log else "")
    parts.append(element("text", label, _class="label", x=middle, y=HEIGHT - 6, text_anchor="middle"))
    return parts


def _path(xs: np.ndarray, ys: np.ndarray, across: Place, up: Place) -> str:
    places = [f"{_round(across(x))} {_round(up(y))}" for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    return "M" + "L".join(places)


def _band(line: Line, across: Place, up: Place) -> str:
    back = _path(line.x[::-1], line.low[::-1], across, up)
    return f"{_path(line.x, line.high, across, up)}L{back[1:]}Z"


def _round(value: float) -> float:
    return round(float(value), 1)
