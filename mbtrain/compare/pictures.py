"""Panels as one PNG by matplotlib's Agg, for papers and pages that take no HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from mbtrain.compare.curves import TITLES, Panel
from mbtrain.compare.groups import Group, Section
from mbtrain.compare.look import INK, LIGHT, MUTED, REST
from mbtrain.redact import one_line

MOST_NAMES = 14  # in the legend


def png(section: Section, panels: Sequence[Panel]) -> bytes:
    """The section's panels side by side, 480 x 480 pixels each, with a legend of the best groups below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = section.groups
    figure = Figure(figsize=(4.8 * len(panels), 4.8), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    handles: dict[int, Any] = {}
    for number, (axes, panel) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        for i in range(len(groups) - 1, -1, -1):
            curve, colour = panel.curves[i], _colour(i)
            order, wide = 10 + len(groups) - i, 1.6 if i < len(LIGHT) else 0.8
            train = curve.train
            if len(train.x) > 1:
                axes.fill_between(train.x, train.low, train.high, color=colour, alpha=0.15, linewidth=0, zorder=order)
            (handle,) = axes.plot(train.x, train.mean, color=colour, linewidth=wide, alpha=0.9, zorder=order)
            handles.setdefault(i, handle)
            for line, full in ((curve.val, True), (curve.partial, False)):
                if not len(line.x):
                    continue
                axes.plot(
                    line.x,
                    line.mean,
                    color=colour,
                    linewidth=0.7,
                    linestyle=":",
                    marker="o",
                    markersize=4,
                    markerfacecolor=colour if full else "white",
                    zorder=order,
                )
                axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.0, zorder=order)
        if panel.log:
            axes.set_xscale("log")
        axes.set(xlim=panel.x_limits, ylim=panel.y_limits, xlabel=panel.label)
        axes.set_xticks([place for place, _ in panel.x_ticks], [label for _, label in panel.x_ticks])
        axes.set_yticks([place for place, _ in panel.y_ticks], [label for _, label in panel.y_ticks])
        axes.minorticks_off()
        axes.set_title(TITLES[panel.axis], loc="left", color=MUTED, fontsize=10)
        if number == 0:
            axes.set_ylabel("bits per byte")
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#bbbbbb")
        axes.tick_params(colors=INK, length=0)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
    shown = list(range(len(groups)))[:MOST_NAMES]
    names = [_plain(f"{groups[i].name}: {_score(groups[i])}") for i in shown]
    if len(groups) > MOST_NAMES:
        names[-1] += f"   (and {len(groups) - MOST_NAMES} more)"
    figure.legend(
        [handles[i] for i in shown],
        names,
        loc="outside lower left",
        ncols=min(len(panels), len(shown)),
        frameon=False,
        labelcolor=INK,
        fontsize=9,
    )
    title = f"{section.title}: training smoothed, validation as points"
    figure.suptitle(_plain(title), x=0.01, ha="left", color=INK, fontsize=12)
    out = io.BytesIO()
    canvas.print_png(out)
    return out.getvalue()


def _score(group: Group) -> str:
    mean = group.score.mean
    return "no score" if mean != mean else f"{mean:.4f}{'' if group.scored_on == 'whole split' else ' *'}"


def _colour(index: int) -> str:
    return LIGHT[index] if index < len(LIGHT) else REST


def _plain(text: str) -> str:
    """Without matplotlib's mathematics, which a name with two $ would be read as."""
    return one_line(text, 120).replace("$", r"\$")
