"""What came of a sweep: report.md, report.json and pictures in its folder.

With several LRs: the best one of every variant by each target, how it moves over widths or depths, and whether it
transfers. Of any sweep: its trials by score, means over seeds, and what each axis does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbtrain.errors import ConfigError
from mbtrain.redact import one_line
from mbtrain.shards import whole_file
from mbtrain.sweep import drawing, optimum, scores
from mbtrain.sweep.drawing import power
from mbtrain.sweep.optimum import FAILS, OPEN, TRANSFERS, UNKNOWN, Optimum
from mbtrain.sweep.scores import TARGETS, Axes, Family, Scored
from mbtrain.sweep.state import trials as trials_of
from mbtrain.tracking.labels import without_seed

DECIDING = ("val_last", "train_last")  # the targets that a variant's verdict is of
MOST_ROWS = 20  # of the trials, in the Markdown page; report.json has all


@dataclass(frozen=True)
class Report:
    """What was written and what it says; `figures` are report.json's, `lines` what a terminal shows."""

    path: Path
    pictures: tuple[Path, ...]
    figures: dict[str, Any]
    lines: tuple[str, ...]


def report(folder: Path | str) -> Report:
    """Write FOLDER/report.md, report.json and PNGs of what the trials of a sweep came to so far.

    Raises ConfigError where the folder is none of a sweep, no trial of it is at its end, or it cannot be written to.
    """
    folder = Path(folder)
    trials = trials_of(folder)
    found, notes = scores.scored(trials)
    counts = {status: sum(trial.status == status for trial in trials) for status in sorted({t.status for t in trials})}
    if not counts.get("finished") and not counts.get("diverged"):
        raise ConfigError(f"{folder}: expected trials that are finished, got {_counted(counts) or 'none'}")
    axes = scores.axes_of(trials)
    families = scores.families(found, axes)
    sizes = scores.shapes(found, axes) if families else {}
    sizes = {size: sizes.get(size, "") for family in families for size in family.sizes}
    what = _what_grows(axes, sizes)
    groups = _groups(found)
    figures = {
        "sweep": str(folder),
        "trials": counts,
        "variants": [_variant(family, axes, sizes) for family in families],
        "axes": _effects(found, axes),
        "groups": groups,
        "notes": notes,
    }
    try:
        pictures = _draw(folder, families, sizes, what, bool(axes.size))
        made = [picture.name for picture in pictures]
        page = "\n".join(_page(folder, figures, what, sizes, axes, made)) + "\n"
        texts = {"report.json": json.dumps(_known({**figures, "pictures": made}), indent=1) + "\n", "report.md": page}
        for name, text in texts.items():
            with whole_file(folder / name) as file:
                file.write(text.encode())
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror}); the report is put there") from error
    beside = f"; beside it {', '.join(made)}" if made else ""
    lines = (*_summary(figures), f"{folder / 'report.md'}: {_counted(counts)}{beside}")
    return Report(folder / "report.md", tuple(pictures), _known({**figures, "pictures": made}), lines)


# --- Figures --------------------------------------------------------------------------------------------------------


def _variant(family: Family, axes: Axes, sizes: Mapping[float, str]) -> dict[str, Any]:
    targets = {target: _target(family, target, sizes) for target in TARGETS}
    figures: dict[str, Any] = {"name": family.name, "targets": targets}
    if axes.size:
        verdicts = [targets[target]["verdict"] for target in DECIDING]
        figures["verdict"] = next(one for one in (UNKNOWN, OPEN, FAILS, TRANSFERS) if one in verdicts)
        figures["fixed_lr"] = _at_fixed(family)
    return figures


def _target(family: Family, target: str, sizes: Mapping[float, str]) -> dict[str, Any]:
    optima = family.optima(target)
    figures: dict[str, Any] = {"sizes": [_optimum(size, sizes, optima[size]) for size in family.sizes]}
    for told, size in zip(figures["sizes"], family.sizes, strict=True):
        rates = sorted({lr for curve in family.curves(target, size) for lr in curve})
        told["curve"] = [[2**lr, family.at(target, size, lr)] for lr in rates]
    if len(optima) > 1:
        moved = optimum.shift(optima)
        low, high = moved.interval
        figures["shift"] = {
            "log2": moved.log2_lr,
            "log2_grid": moved.grid,
            "largest": moved.largest,
            "largest_grid": moved.largest_grid,
            "per_doubling": moved.slope,
            "standard_error": moved.error,
            "interval_95": [low, high],
            "open_at": list(moved.open),
            "missing_at": list(moved.missing),
        }
        figures["verdict"], figures["sure"] = optimum.verdict(moved), optimum.is_sure(moved)
    return figures


def _optimum(size: float, sizes: Mapping[float, str], found: Optimum) -> dict[str, Any]:
    return {
        "size": size,
        "shape": sizes.get(size, ""),
        "lr": 2**found.log2_lr,
        "log2_lr": found.log2_lr,
        "log2_grid": found.grid,
        "standard_error": found.error,
        "loss": found.loss,
        "vertex_loss": found.vertex_loss,
        "edge": found.edge,
        "parabola": found.parabola,
        "seeds": found.seeds,
    }


def fixed_lr(family: Family) -> float:
    """log2 of the LR that is best at the smallest size, by the last validation loss, or training loss without one."""
    return next(
        (found.grid for target in DECIDING if not math.isnan((found := family.optima(target)[family.sizes[0]]).grid)),
        math.nan,
    )


def _at_fixed(family: Family) -> dict[str, Any]:
    """Losses of all sizes at the smallest one's best LR, and what that costs the largest one."""
    lr = fixed_lr(family)
    losses = [family.at("val_last", size, lr) for size in family.sizes]
    own = family.optima("val_last")[family.sizes[-1]].loss
    return {
        "log2_lr": lr,
        "losses": losses,
        "wider_is_better": None if any(map(math.isnan, losses)) else optimum.falls(losses),
        "largest_at_fixed": losses[-1],
        "largest_at_its_best": own,
        "cost_percent": 100 * (losses[-1] / own - 1),
    }


def _groups(found: Sequence[Scored]) -> list[dict[str, Any]]:
    """Trials that differ by seed alone: means with the lowest and the highest; best first."""
    groups: dict[str, list[Scored]] = {}
    for one in found:
        groups.setdefault(json.dumps(one.trial.values), []).append(one)
    rows = []
    for members in groups.values():
        losses = [one.losses["val_last"] for one in members if not math.isnan(one.losses["val_last"])]
        train = [one.losses["train_last"] for one in members if not math.isnan(one.losses["train_last"])]
        rows.append(
            {
                "name": without_seed(members[0].trial.name) if len(members) > 1 else members[0].trial.name,
                "values": members[0].trial.values,
                "val/bpb": _mean(losses),
                "low": min(losses, default=math.nan),
                "high": max(losses, default=math.nan),
                "train/bpb": _mean(train),
                "seeds": len(losses),
                "trials": [{"name": one.trial.name, "status": one.trial.status, **one.losses} for one in members],
            }
        )
    return sorted(rows, key=lambda row: (math.isnan(row["val/bpb"]), row["val/bpb"], row["name"]))


def _effects(found: Sequence[Scored], axes: Axes) -> dict[str, list[dict[str, Any]]]:
    """Of each axis: the mean of the trials with a value, beside the best of them."""
    effects = {}
    for axis, values in axes.values.items():
        rows = []
        for value in values:
            losses = [one.losses["val_last"] for one in found if one.trial.values.get(axis) == value]
            known = [loss for loss in losses if math.isfinite(loss)]
            row = {"value": value, "mean": _mean(known), "best": min(known, default=math.nan), "trials": len(known)}
            rows.append({**row, "diverged": sum(math.isinf(loss) for loss in losses)})
        effects[axis] = rows
    return effects


# --- Pages ----------------------------------------------------------------------------------------------------------


def _page(
    folder: Path, figures: Mapping[str, Any], what: str, sizes: Mapping[float, str], axes: Axes, pictures: Sequence[str]
) -> list[str]:
    variants = figures["variants"]
    lines = [f"# Sweep {folder.resolve().name}", "", f"{_counted(figures['trials'])}. Losses are bits per byte.", ""]
    lines += [f"- {one_line(note, 400)}" for note in figures["notes"]] + ([""] if figures["notes"] else [])
    if variants and axes.size:
        lines += [*_transfer_table(variants, what, sizes), *_targets_table(variants), *_size_table(variants, sizes)]
    elif variants:
        lines += _best_table(variants)
    lines += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    lines += [*_effects_table(figures["axes"]), *_groups_table(figures["groups"])]
    return [*lines, f"`mbtrain compare {folder}/runs/*` shows curves, costs and settings side by side."]


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
        lines.append(_row([*row, *moved, _percent(fixed["cost_percent"]), variant["verdict"]]))
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


def _summary(figures: Mapping[str, Any]) -> list[str]:
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


def _draw(folder: Path, families: Sequence[Family], sizes: Mapping[float, str], what: str, by_size: bool) -> list[Path]:
    if not families:
        return []
    title = f"{folder.resolve().name}: loss against LR" + (f", a curve for each {what}" if by_size else "")
    pictures = drawing.lr_against_loss(families, sizes, title, folder / "lr_loss")
    if by_size and len(sizes) > 1:
        pictures.append(drawing.optimum_against_size(families, sizes, what, folder / "best_lr.png"))
        fixed = {family.name: fixed_lr(family) for family in families}
        pictures.append(drawing.loss_against_size(families, fixed, sizes, what, folder / "fixed_lr.png"))
    return pictures


def _what_grows(axes: Axes, sizes: Mapping[float, str]) -> str:
    """width or depth: by the models, for an axis may be called as one likes."""
    if sizes and all("deep" in shape and "wide" not in shape for shape in sizes.values()):
        return "depth"
    return "width" if sizes and any("wide" in shape for shape in sizes.values()) else axes.size or "width"


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


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    return one_line(text, 120).replace("|", "\\|")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _known(value: Any) -> Any:
    """For JSON, which knows no nan (null) and no inf (the string)."""
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
