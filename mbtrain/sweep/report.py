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

from mbtrain.command import known, writing
from mbtrain.errors import ConfigError
from mbtrain.shards import whole_file
from mbtrain.sweep import drawing, optimum, page, scores
from mbtrain.sweep.optimum import FAILS, OPEN, TRANSFERS, UNKNOWN, Optimum
from mbtrain.sweep.scores import TARGETS, Axes, Family, Scored
from mbtrain.sweep.state import trials as trials_of
from mbtrain.tracking.labels import without_seed

DECIDING = ("val_last", "train_last")  # the targets that a variant's verdict is of


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
        raise ConfigError(f"{folder}: expected trials that are finished, got {page.counted(counts) or 'none'}")
    axes = scores.axes_of(trials)
    families = scores.families(found, axes)
    sizes = scores.shapes(found, axes) if families else {}
    sizes = {size: sizes.get(size, "") for family in families for size in family.sizes}
    what = _what_grows(axes, sizes)
    figures: dict[str, Any] = {
        "sweep": str(folder),
        "trials": counts,
        "variants": [_variant(family, axes, sizes) for family in families],
        "axes": _effects(found, axes),
        "groups": _groups(found),
        "notes": notes,
    }
    with writing(folder):
        pictures = _draw(folder, families, sizes, what, bool(axes.size))
        figures["pictures"] = [picture.name for picture in pictures]
        lines = page.markdown(folder, figures, what, sizes, bool(axes.size))
        texts = {"report.json": json.dumps(known(figures), indent=1), "report.md": "\n".join(lines)}
        for name, text in texts.items():
            with whole_file(folder / name) as file:
                file.write(f"{text}\n".encode())
    beside = f"; beside it {', '.join(figures['pictures'])}" if pictures else ""
    told = (*page.summary(figures), f"{folder / 'report.md'}: {page.counted(counts)}{beside}")
    return Report(folder / "report.md", tuple(pictures), known(figures), told)


def _variant(family: Family, axes: Axes, sizes: Mapping[float, str]) -> dict[str, Any]:
    targets = {target: _target(family, target, sizes) for target in TARGETS}
    figures: dict[str, Any] = {"name": family.name, "targets": targets}
    if axes.size:
        verdicts = [targets[target].get("verdict") for target in DECIDING]  # none, of one size
        figures["verdict"] = next((one for one in (UNKNOWN, OPEN, FAILS, TRANSFERS) if one in verdicts), None)
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
        "wider_is_better": None if len(losses) < 2 or any(map(math.isnan, losses)) else optimum.falls(losses),
        "largest_at_fixed": losses[-1],
        "largest_at_its_best": own,
        "cost_percent": 100 * (losses[-1] / own - 1) if own else math.nan,
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
                "val/bpb": optimum.mean(losses),
                "low": min(losses, default=math.nan),
                "high": max(losses, default=math.nan),
                "train/bpb": optimum.mean(train),
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
            finite = [loss for loss in losses if math.isfinite(loss)]
            row = {"value": value, "mean": optimum.mean(finite), "best": min(finite, default=math.nan)}
            rows.append({**row, "trials": len(finite), "diverged": sum(math.isinf(loss) for loss in losses)})
        effects[axis] = rows
    return effects


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
