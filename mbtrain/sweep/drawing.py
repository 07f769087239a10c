"""Pictures of a sweep, drawn by matplotlib's Agg: LR against loss, the best LR against size, loss against size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbtrain.compare.look import LIGHT, REST
from mbtrain.plots import INK, MUTED, plain, save
from mbtrain.redact import one_line
from mbtrain.sweep.optimum import mean
from mbtrain.sweep.scores import TARGETS, Family

COLUMNS = 6  # variants side by side; more go into further pictures
# How far above the worst of the minima the panels reach, as a share of how far the minima are apart; and at least bits.
ROOM, LEAST_ROOM = 1.0, 0.25


def lr_against_loss(families: Sequence[Family], sizes: Mapping[float, str], title: str, stem: Path) -> list[Path]:
    """STEM.png, and STEM_2.png and so on: a column for each variant, a row for each target.

    A curve for each size, of the mean over seeds, with the lowest and the highest of them; a star at its lowest point,
    open where that is on the grid's edge. A cross at the top is a rate at which a run diverged.
    """
    made = []
    limits = {target: _limits(families, target) for target in TARGETS}
    for part, start in enumerate(range(0, len(families), COLUMNS), start=1):
        shown = families[start : start + COLUMNS]
        path = stem.with_name(f"{stem.name}{'' if part == 1 else f'_{part}'}.png")
        figure = _figure(max(6.0, 3.1 * len(shown) + 0.6), 11.0)
        grid = figure.subplots(len(TARGETS), len(shown), squeeze=False, sharex="col", sharey="row")
        handles: dict[float, Any] = {}
        for row, target in zip(grid, TARGETS, strict=True):
            for axes, family in zip(row, shown, strict=True):
                _curves(axes, family, target, limits[target], handles, sorted(sizes))
            row[0].set_ylabel(f"{TARGETS[target]}\n(bits per byte)")
        for axes, family in zip(grid[0], shown, strict=True):
            axes.set_title(_text(family.name or "all trials"), loc="left", color=INK, fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("log2 of the LR")
        if len(handles) > 1:
            figure.legend(
                [handles[size] for size in sorted(handles)],
                [_size_label(size, sizes) for size in sorted(handles)],
                loc="outside lower left",
                ncols=min(4, len(handles)),
                frameon=False,
                labelcolor=INK,
            )
        figure.suptitle(_text(title), x=0.01, ha="left", color=INK, fontsize=12)
        save(figure, path)
        made.append(path)
    return made


def optimum_against_size(families: Sequence[Family], sizes: Mapping[float, str], axis: str, path: Path) -> Path:
    """Where the parabola's best LR is, at each size and for each variant, by validation and by training loss.

    Bars are standard errors over seeds. An open mark is on the grid's edge: the best may lie outside.
    """
    figure = _figure(12, 5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, target in zip(panels, ("val_last", "train_last"), strict=True):
        for i, family in enumerate(families):
            optima = {size: found for size, found in family.optima(target).items() if not math.isnan(found.log2_lr)}
            if not optima:
                continue
            moved = family.shift(target)
            xs, ys = list(optima), [found.log2_lr for found in optima.values()]
            slope = "" if math.isnan(moved.slope) else f": {moved.slope:+.2f} per doubling"
            label = _text(f"{family.name or 'all trials'}{slope}{', open' if moved.open else ''}")
            axes.plot(xs, ys, color=_colour(i), linewidth=1.6, label=label)
            errors = [0.0 if math.isnan(found.error) else found.error for found in optima.values()]
            axes.errorbar(xs, ys, errors, color=_colour(i), linestyle="none", capsize=3, elinewidth=1.0)
            for x, found in optima.items():
                face = "white" if found.edge else _colour(i)
                axes.plot([x], [found.log2_lr], marker="o", markersize=6, color=_colour(i), markerfacecolor=face)
        plain(axes)
        _size_axis(axes, sizes, axis)
        axes.set_title(f"by {TARGETS[target]}", loc="left", color=MUTED, fontsize=10)
        if axes.lines:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    panels[0].set_ylabel("log2 of the best LR")
    figure.suptitle(f"The best LR against {axis}", x=0.01, ha="left", color=INK, fontsize=12)
    save(figure, path)
    return path


def loss_against_size(
    families: Sequence[Family], fixed: Mapping[str, float], sizes: Mapping[float, str], axis: str, path: Path
) -> Path:
    """Last validation loss against size, at the LR that is best at the smallest size, and at each size's own best.

    fixed: by the families' names, log2 of that LR. A rate at which a run diverged, or that was not tried, is left out.
    """
    figure = _figure(7.5, 5)
    axes = figure.subplots()
    for i, family in enumerate(families):
        lr = fixed.get(family.name, math.nan)
        at_fixed = {size: family.at("val_last", size, lr) for size in family.sizes}
        known = {size: loss for size, loss in at_fixed.items() if math.isfinite(loss)}
        own = {size: found.loss for size, found in family.optima("val_last").items() if not math.isnan(found.loss)}
        label = _text(f"{family.name or 'all trials'} at {power(lr)}")
        axes.plot(list(known), list(known.values()), color=_colour(i), linewidth=1.6, marker="o", label=label)
        axes.plot(list(own), list(own.values()), color=_colour(i), linewidth=1.0, linestyle=":", marker=".")
    plain(axes)
    _size_axis(axes, sizes, axis)
    axes.set_ylabel("last validation loss (bits per byte)")
    axes.set_title("dotted: at each one's own best LR", loc="left", color=MUTED, fontsize=10)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    figure.suptitle(f"Loss against {axis} at a fixed LR", x=0.01, ha="left", color=INK, fontsize=12)
    save(figure, path)
    return path


def power(log2: float) -> str:
    """An LR by its log2: 2^-6, or 0.0121 where that is no whole power."""
    if math.isnan(log2):
        return "no LR"
    return f"2^{log2:.0f}" if abs(log2 - round(log2)) < 1e-6 else f"{2**log2:.3g}"


def _curves(
    axes: Any,
    family: Family,
    target: str,
    limits: tuple[float, float] | None,
    handles: dict[float, Any],
    sizes: Sequence[float],
) -> None:
    optima = family.optima(target)
    for size in family.sizes:
        colour = _shade(sizes.index(size) if size in sizes else 0, len(sizes))
        curves = family.curves(target, size)
        losses: dict[float, list[float]] = {}
        for curve in curves:
            for lr, loss in curve.items():
                if not math.isnan(loss):
                    losses.setdefault(lr, []).append(loss)
        finite = sorted(lr for lr, values in losses.items() if all(map(math.isfinite, values)))
        means = [mean(losses[lr]) for lr in finite]
        if len(curves) > 1:
            low, high = [min(losses[lr]) for lr in finite], [max(losses[lr]) for lr in finite]
            axes.fill_between(finite, low, high, color=colour, alpha=0.2, linewidth=0)
        (handle,) = axes.plot(finite, means, color=colour, linewidth=1.4, marker="o", markersize=3.5)
        if losses:
            handles.setdefault(size, handle)
        diverged = [lr for lr in losses if lr not in finite]
        if diverged and limits:
            top = [limits[1]] * len(diverged)
            axes.plot(diverged, top, color=colour, marker="x", linestyle="none", clip_on=False, in_layout=False)
        best = optima[size]
        if not math.isnan(best.grid):
            face = "white" if best.edge else colour
            axes.plot([best.grid], [best.loss], marker="*", markersize=13, color=colour, markerfacecolor=face, zorder=5)
    if limits:
        axes.set_ylim(*limits)
    plain(axes)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _limits(families: Sequence[Family], target: str) -> tuple[float, float] | None:
    """From below the lowest minimum to well above the highest: what is worse leaves the picture."""
    lowest = [found.loss for family in families for found in family.optima(target).values()]
    lowest = [loss for loss in lowest if math.isfinite(loss)]
    if not lowest:
        return None
    apart = max(lowest) - min(lowest)
    return min(lowest) - max(0.08 * apart, 0.03), max(lowest) + max(ROOM * apart, LEAST_ROOM)


def _size_axis(axes: Any, sizes: Mapping[float, str], axis: str) -> None:
    axes.set_xscale("log", base=2)
    places = sorted(sizes)
    axes.set_xticks(places, [f"{size:g}\n{sizes[size]}" if sizes[size] else f"{size:g}" for size in places])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_xlabel(axis)


def _size_label(size: float, sizes: Mapping[float, str]) -> str:
    return f"{size:g}: {sizes[size]}" if sizes.get(size) else f"{size:g}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _shade(i: int, n: int) -> Any:
    """From dark to light with the size."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.0 if n < 2 else 0.88 * i / (n - 1))


def _colour(i: int) -> str:
    return LIGHT[i] if i < len(LIGHT) else REST


def _text(text: str) -> str:
    """Without matplotlib's mathematics, which a name with two $ would be read as."""
    return one_line(text, 120).replace("$", r"\$")
