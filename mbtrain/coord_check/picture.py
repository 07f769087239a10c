"""A family of a coordinate check as one PNG: sizes and changes against width, step by step, and all slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbtrain.coord_check.slopes import Family, Slope
from mbtrain.plots import INK, MUTED, plain, save

BAD, BAND = "#c1121f", "#e8f0f8"
SMALL = 8  # numbers at the axes, in points
STAGES = ("#1f6fb4", "#e0700a", "#1e8a46", "#7a4fc2")
STEPS = ("#b8c4cf", "#7fa8cc", "#3b78b0", "#123c66")
PARTS = {
    "input": "s",
    "attention": "^",
    "feed-forward": "v",
    "residual": "o",
    "slices": "D",
    "scores": "x",
    "logits": "*",
}


def draw(target: Path, title: str, family: Family, slopes: Sequence[Slope]) -> None:
    """Draw it, 1500 pixels wide: rows of sizes, of changes and of slopes; what leaves its band is red. Raises OSError.

    The file appears when it is whole.
    """
    from matplotlib.figure import Figure

    steps = sorted({slope.step for slope in slopes})
    stages = list(dict.fromkeys(slope.place.stage for slope in slopes))
    rows = max(len(_rows(slopes, updates)) for updates in (False, True))
    heights = (3.6, 3.6, 0.8 + 0.26 * rows)
    figure = Figure(figsize=(15, sum(heights) + 0.6), dpi=100, layout="constrained")
    upper, middle, lower = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    for panels, what, shown in ((upper, "size", steps), (middle, "change", [None, *steps[1:]])):
        axes = panels.subplots(1, len(steps), squeeze=False, sharey=True)[0]
        for here in axes:  # before one of them makes the shared axis a logarithm's
            plain(here, SMALL)
        for here, step in zip(axes, shown, strict=True):
            if step is None:
                _legend(here, stages, steps, slopes)
                continue
            _curves(here, family, [one for one in slopes if one.what == what and one.step == step], stages)
            name = "mean |x|" if what == "size" else "RMS of x less x before training"
            here.set_title(f"{name}, step {step}", loc="left", color=MUTED, fontsize=10)
            here.tick_params(labelleft=step == shown[0] or step == steps[1])
            scaled = "layers" if family.which == "depth" else "width"
            here.set_xlabel(f"{scaled}: {', '.join(family.stages)}", fontsize=8, color=MUTED)
    left, right = lower.subplots(1, 2)
    _dots(left, slopes, steps)
    left.set_title("slopes of sizes (open) and changes, a dot a layer", loc="left", color=MUTED, fontsize=10)
    _bars(right, slopes, stages)
    right.set_title(f"slopes of each weight's update, step {steps[-1]}", loc="left", color=MUTED, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    save(figure, target)


def _curves(axes: Any, family: Family, slopes: Sequence[Slope], stages: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for one in slopes:
        axes.plot(
            family.factors,
            [x if 0 < x < math.inf else math.nan for x in one.values],  # a model that diverged has the others
            color=BAD if one.outside else _colour(one.place.stage, stages),
            linewidth=1.1,
            alpha=0.85,
            marker=PARTS.get(one.place.part, "o"),
            markersize=4.5,
        )
    axes.set_xticks(family.factors, [width.replace(", ", "\n") for width in family.widths], fontsize=8)
    axes.minorticks_off()


def _legend(axes: Any, stages: Sequence[str], steps: Sequence[int], slopes: Sequence[Slope]) -> None:
    from matplotlib.lines import Line2D

    there = [part for part in PARTS if any(one.place.part == part for one in slopes)]
    lines = [Line2D([], [], color=_colour(stage, stages), linewidth=2, label=stage) for stage in stages]
    lines.append(Line2D([], [], color=BAD, linewidth=2, label="outside its band"))
    dots = [
        Line2D([], [], color=STEPS[min(number, len(STEPS) - 1)], linestyle="", marker="o", label=f"step {step}")
        for number, step in enumerate(steps)
    ]
    marks = [
        Line2D([], [], color=MUTED, linestyle="", marker=PARTS[part], label="q k" if part == "scores" else part)
        for part in there
    ]
    axes.axis("off")
    first = axes.legend(handles=lines, loc="upper left", frameon=False, labelcolor=INK, bbox_to_anchor=(0, 1))
    axes.add_artist(first)
    axes.add_artist(axes.legend(handles=dots, loc="upper left", frameon=False, labelcolor=INK, bbox_to_anchor=(0, 0.5)))
    axes.legend(handles=marks, loc="upper left", frameon=False, labelcolor=INK, bbox_to_anchor=(0.5, 1))


def _rows(slopes: Sequence[Slope], updates: bool) -> list[tuple[str, str]]:
    """(stage, part) in the order of the model."""
    return list(dict.fromkeys(one.place[:2] for one in slopes if (one.what == "update") == updates))


def _dots(axes: Any, slopes: Sequence[Slope], steps: Sequence[int]) -> None:
    rows = _rows(slopes, False)
    for i, row in enumerate(rows):
        these = [one for one in slopes if one.what != "update" and one.place[:2] == row]
        low, high = min(one.low for one in these), max(one.high for one in these)
        axes.barh(i, high - low, left=low, height=0.9, color=BAND, zorder=0)
    for one in slopes:
        if one.what == "update" or not math.isfinite(one.slope):
            continue
        number = steps.index(one.step)
        colour = BAD if one.outside else STEPS[min(number, len(STEPS) - 1)]
        height = rows.index(one.place[:2]) + 0.18 * (number - (len(steps) - 1) / 2)
        filled = colour if one.what == "change" else "white"
        axes.plot(one.slope, height, "o", markersize=4, color=colour, markerfacecolor=filled, markeredgewidth=0.9)
    _of_rows(axes, rows)


def _bars(axes: Any, slopes: Sequence[Slope], stages: Sequence[str]) -> None:
    rows = _rows(slopes, True)
    updates = [one for one in slopes if one.what == "update" and math.isfinite(one.slope)]
    for i, row in enumerate(rows):
        these = [one for one in updates if one.place[:2] == row]
        if these:
            axes.barh(i, these[0].high - these[0].low, left=these[0].low, height=0.8, color=BAND, zorder=0)
        for number, one in enumerate(these):
            colour = BAD if one.outside else _colour(one.place.stage, stages)
            height = 0.7 / len(these)
            axes.barh(i - 0.35 + height * (number + 0.5), one.slope, height=0.85 * height, color=colour, zorder=2)
    _of_rows(axes, rows)


def _of_rows(axes: Any, rows: Sequence[tuple[str, str]]) -> None:
    plain(axes, SMALL)
    axes.set_yticks(range(len(rows)), [f"{stage} {'q k' if part == 'scores' else part}" for stage, part in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.75), max(high, 0.75))
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_xlabel("slope: 1 is twice as large in a model of twice the size")


def _colour(stage: str, stages: Sequence[str]) -> str:
    return STAGES[stages.index(stage) % len(STAGES)]
