"""The figures of a sweep's report as a page of Markdown, and as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbtrain.redact import one_line
from mbtrain.sweep.drawing import power
from mbtrain.sweep.scores import TARGETS

MOST_ROWS = 20  # of the trials; report.json has all


def markdown(
    folder: Path, figures: Mapping[str, Any], what: str, sizes: Mapping[float, str], by_size: bool
) -> list[str]:
    """The page's lines. what: that of which there are several sizes, width or depth, where `by_size`."""
    variants = figures["variants"]
    lines = [f"# Sweep {folder.resolve().name}", "", f"{counted(figures['trials'])}. Losses are bits per byte.", ""]
    lines += [f"- {one_line(note, 400)}" for note in figures["notes"]] + ([""] if figures["notes"] else [])
    if variants and by_size:
        lines += [*_transfer_table(variants, what, sizes), *_targets_table(variants), *_size_table(variants, sizes)]
    elif variants:
        lines += _best_table(variants)
    lines += [line for name in figures["pictures"] for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    lines += [*_effects_table(figures["axes"]), *_groups_table(figures["groups"])]
    return [*lines, f"`mbtrain compare {folder}/runs/*` shows curves, costs and settings side by side."]


def summary(figures: Mapping[str, Any]) -> list[str]:
    """What a terminal shows."""
    lines = []
    for variant in figures["variants"]:
        told = variant["targets"]["val_last"]
        name = variant["name"] or "all trials"
        if "shift" in told and "verdict" in variant:
            at = ", ".join("-" if math.isnan(one["log2_lr"]) else f"{one['log2_lr']:.2f}" for one in told["sizes"])
            shift = _shift_cell(told["shift"])
            lines.append(f"{name}: {variant['verdict']}; log2 of the best LR {at}: shift {shift}")
        else:
            lines.append(f"{name}: best LR {_optimum_cell(told['sizes'][0])}")
    if not lines:
        best = [row for row in figures["groups"][:5] if not math.isnan(row["val/bpb"])]
        lines = [f"{row['name']}: {_loss(row['val/bpb'])} bits per byte" for row in best]
    return lines


def _transfer_table(variants: Sequence[Mapping[str, Any]], what: str, sizes: Mapping[float, str]) -> list[str]:
    head = [what, *(f"{size:g} ({shape})" if shape else f"{size:g}" for size, shape in sorted(sizes.items()))]
    lines = [
        f"## The best LR against {what}, by the last validation loss",
        "",
        "log2 of the best LR by the parabola through the grid's best and its neighbours (the grid's own best): the",
        f"loss there, on the grid. Shift: from the smallest {what} to the largest, in factors of 2. It transfers if",
        "both shifts are at most 1, by validation and by training loss, and no optimum is at the edge of its grid.",
        "Cost: how much worse the largest is at the LR that is best for the smallest than at its own best.",
        "",
        _row([*head, "shift (of the grid)", "per doubling", "cost", "verdict"]),
        _row(["---"] * (len(head) + 4)),
    ]
    for variant in variants:
        told = variant["targets"]["val_last"]
        cells = {one["size"]: _optimum_cell(one) for one in told["sizes"]}
        row = [_cell(variant["name"]) or "all trials", *(cells.get(size, "") for size in sorted(sizes))]
        shift = told.get("shift")
        moved = [_shift_cell(shift), _signed(shift["per_doubling"])] if shift else ["", ""]
        fixed = variant["fixed_lr"]
        lines.append(_row([*row, *moved, _percent(fixed["cost_percent"]), variant["verdict"] or ""]))
    return [*lines, ""]


def _targets_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## The shift by each target",
        "",
        "By the parabola (of the grid), +- the standard error over seeds where there are several; [the largest",
        "difference between any two]. `?`: the 95 % interval over seeds has both verdicts in it.",
        "",
        _row(["", *TARGETS.values()]),
        _row(["---"] * (1 + len(TARGETS))),
    ]
    for variant in variants:
        row = [_cell(variant["name"]) or "all trials"]
        for target in TARGETS:
            told = variant["targets"][target]
            if "shift" not in told:
                row.append("")
                continue
            doubt = " ?" if told["sure"] is False else ""
            apart = told["shift"]["largest"]
            largest = "" if math.isnan(apart) else f" [{apart:.2f}]"
            row.append(f"{_shift_cell(told['shift'])}{largest}: {told['verdict'].split(':')[0]}{doubt}")
        lines.append(_row(row))
    return [*lines, ""]


def _size_table(variants: Sequence[Mapping[str, Any]], sizes: Mapping[float, str]) -> list[str]:
    lines = [
        "## Loss at a fixed LR, the best of the smallest",
        "",
        _row(["", "LR", *(f"{size:g}" for size in sorted(sizes)), "each is better"]),
        _row(["---"] * (3 + len(sizes))),
    ]
    for variant in variants:
        fixed = variant["fixed_lr"]
        own = [one["size"] for one in variant["targets"]["val_last"]["sizes"]]
        at = dict(zip(own, fixed["losses"], strict=True))
        cells = [_loss(at.get(size, math.nan)) for size in sorted(sizes)]
        better = {True: "yes", False: "no", None: "unknown"}[fixed["wider_is_better"]]
        lines.append(_row([_cell(variant["name"]) or "all trials", power(fixed["log2_lr"]), *cells, better]))
    return [*lines, ""]


def _best_table(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["## The best LR", "", _row(["", *TARGETS.values()]), _row(["---"] * (1 + len(TARGETS)))]
    for variant in variants:
        cells = [_optimum_cell(variant["targets"][target]["sizes"][0]) for target in TARGETS]
        lines.append(_row([_cell(variant["name"]) or "all trials", *cells]))
    return [*lines, ""]


def _effects_table(effects: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    if not effects:
        return []
    lines = [
        "## What each axis does",
        "",
        "Last validation loss of all trials with a value, whatever their other values: the mean, and the best.",
        "",
        _row(["axis", "value", "mean", "best", "trials", "diverged"]),
        _row(["---"] * 6),
    ]
    for axis, rows in effects.items():
        for row in rows:
            counts = [str(row["trials"]), str(row["diverged"] or "")]
            lines.append(_row([_cell(axis), _cell(row["value"]), _loss(row["mean"]), _loss(row["best"]), *counts]))
    return [*lines, ""]


def _groups_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Trials, best first",
        "",
        "Means over seeds, with the lowest and the highest.",
        "",
        _row(["trial", "val/bpb", "seeds", "lowest to highest", "last training loss"]),
        _row(["---"] * 5),
    ]
    for row in groups[:MOST_ROWS]:
        apart = f"{row['low']:.4f} to {row['high']:.4f}" if row["seeds"] > 1 else ""
        cells = [_loss(row["val/bpb"]), str(row["seeds"]), apart, _loss(row["train/bpb"])]
        lines.append(_row([_cell(row["name"]), *cells]))
    more = len(groups) - MOST_ROWS
    return [*lines, *([f"\n{more} more are in report.json."] if more > 0 else []), ""]


def _optimum_cell(one: Mapping[str, Any]) -> str:
    if math.isnan(one["log2_lr"]):
        return "-"
    error = "" if math.isnan(one["standard_error"]) else f" +- {one['standard_error']:.2f}"
    edge = f", {one['edge']} edge" if one["edge"] in ("low", "high") else ", alone" if one["edge"] else ""
    return f"{one['log2_lr']:.2f}{error} ({power(one['log2_grid'])}{edge}): {one['loss']:.4f}"


def _shift_cell(shift: Mapping[str, Any]) -> str:
    if math.isnan(shift["log2"]):
        return "-"
    error = "" if math.isnan(shift["standard_error"]) else f" +- {shift['standard_error']:.2f}"
    return f"{_signed(shift['log2'])}{error} ({shift['log2_grid']:+.3g})"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:.2f} %"


def _loss(value: float) -> str:
    return "" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:.4f}"


def counted(counts: Mapping[str, int]) -> str:
    """How many there are of each, in words."""
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return one_line(text, 120).replace("|", "\\|")
