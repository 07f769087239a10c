"""What the trials of a sweep came to, and how its axes are read: LR, width or depth, and all others as variants.

Four targets of each trial, in bits per byte: last and best, training and validation loss. A diverged trial has infinite
last losses; one that is not at its end, or has failed, has none (nan).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from mbtrain import metrics
from mbtrain.errors import DataError
from mbtrain.sweep import optimum
from mbtrain.sweep.optimum import Optimum, Shift
from mbtrain.sweep.trial import Trial

LR = "optim.lr"
TARGETS = {
    "val_last": "last validation loss",
    "val_best": "best validation loss",
    "train_last": "last training loss",
    "train_best": "best training loss",
}
LAST_SHARE = 0.05  # of the logged lines, whose mean is the last training loss
LEAST_LINES = 5
MOST_FAMILIES = 24  # more are no variants but draws


@dataclass(frozen=True)
class Scored:
    """A trial and its losses by target."""

    trial: Trial
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Axes:
    """How a sweep's axes are read.

    lr      optim.lr, where it is one of several values; else ""
    size    an axis of numbers that say how wide or deep the model is; else ""
    others  all others, with two values or more: together they name a variant
    values  axis -> its values in the order of the sweep
    """

    lr: str
    size: str
    others: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """A variant's losses: (size, seed, log2 LR) -> target -> loss. Sizes are 1.0 where the sweep has one."""

    name: str
    losses: Mapping[tuple[float, int, float], Mapping[str, float]] = field(default_factory=dict)

    @property
    def sizes(self) -> list[float]:
        """Smallest first."""
        return sorted({size for size, _, _ in self.losses})

    def curves(self, target: str, size: float) -> list[dict[float, float]]:
        """log2 LR -> loss, of each seed."""
        seeds = sorted({seed for at, seed, _ in self.losses if at == size})
        return [
            {lr: losses[target] for (at, of, lr), losses in self.losses.items() if (at, of) == (size, seed)}
            for seed in seeds
        ]

    def optima(self, target: str) -> dict[float, Optimum]:
        """The best LR at each size."""
        return {size: optimum.of_seeds(self.curves(target, size)) for size in self.sizes}

    def shift(self, target: str) -> Shift:
        """How the best LR moves from the smallest size to the largest."""
        return optimum.shift(self.optima(target))

    def at(self, target: str, size: float, lr: float) -> float:
        """Mean loss over seeds at a rate (log2); nan where no seed has it."""
        return optimum.mean([x for curve in self.curves(target, size) if not math.isnan(x := curve.get(lr, math.nan))])


def scored(trials: Sequence[Trial]) -> tuple[list[Scored], list[str]]:
    """All trials with their losses, and a note for each run that could not be read."""
    out, notes = [], []
    for trial in trials:
        try:
            out.append(Scored(trial, losses(trial)))
        except DataError as error:
            notes.append(str(error))
            out.append(Scored(trial, dict.fromkeys(TARGETS, math.nan)))
    return out, notes


def losses(trial: Trial) -> dict[str, float]:
    """A trial's four targets.

    train_last  mean of the last 5 % of the logged losses, 5 at least; train_best: the lowest mean of so many in a row
    val_last    the last val/bpb; val_best: the lowest val/bpb or val/partial_bpb

    Raises DataError where the metrics of a trial at its end are missing or damaged.
    """
    unknown = dict.fromkeys(TARGETS, math.nan)
    if trial.status not in ("finished", "diverged"):
        return unknown
    path = trial.run / "metrics.jsonl"
    if trial.status == "diverged" and not path.exists():  # at its first step
        return dict.fromkeys(TARGETS, math.inf)
    logged: dict[str, list[float]] = {"train/bpb": [], "val/bpb": [], "val/partial_bpb": []}
    for line in metrics.stream(path):
        for key in logged.keys() & line.keys():
            logged[key].append(_loss(line[key]))
    train, whole, partial = logged.values()
    n = max(LEAST_LINES, math.ceil(LAST_SHARE * len(train)))
    means = [sum(train[i : i + n]) / n for i in range(len(train) - n + 1)] or [optimum.mean(train)]
    found = {
        "val_last": whole[-1] if whole else partial[-1] if partial else math.nan,
        "val_best": min([*whole, *partial], default=math.nan),
        "train_last": means[-1],
        "train_best": min(means, default=math.nan),
    }
    if trial.status == "diverged":
        best = {key: math.inf if math.isnan(found[key]) else found[key] for key in ("val_best", "train_best")}
        return {**found, **best, "val_last": math.inf, "train_last": math.inf}
    return found


def axes_of(trials: Sequence[Trial]) -> Axes:
    """How the axes of these trials are read."""
    values: dict[str, dict[str, None]] = {}
    for trial in trials:
        for axis, value in trial.values.items():
            values.setdefault(axis, {})[value] = None
    varied = {axis: tuple(seen) for axis, seen in values.items() if len(seen) > 1}
    lr = LR if LR in varied and all(_number(value) for value in varied[LR]) else ""
    size = next((axis for axis in varied if _is_size(axis) and _are_sizes(varied[axis])), "")
    return Axes(lr, size, tuple(axis for axis in varied if axis not in (lr, size)), varied)


def families(found: Sequence[Scored], axes: Axes) -> list[Family]:
    """A family for each variant, in the order of the sweep; none without an LR axis, or where variants are draws."""
    if not axes.lr:
        return []
    losses_of: dict[str, dict[tuple[float, int, float], Mapping[str, float]]] = {}
    for one in found:
        values = one.trial.values
        size = size_of(values[axes.size]) if axes.size else 1.0
        at = (size, one.trial.seed, math.log2(float(values[axes.lr])))
        losses_of.setdefault(variant(values, axes), {})[at] = one.losses
    if len(losses_of) > MOST_FAMILIES:
        return []
    made = [Family(name, losses) for name, losses in losses_of.items()]
    return [one for one in made if max(len(curve) for s in one.sizes for curve in one.curves("val_last", s)) > 1]


def variant(values: Mapping[str, str], axes: Axes) -> str:
    """The name of a trial's variant: the values of all axes but LR and size. A named axis says enough by its value."""
    parts = [values[axis] if "." not in axis else f"{axis}={values[axis]}" for axis in axes.others if axis in values]
    return ", ".join(parts)


def shapes(found: Sequence[Scored], axes: Axes) -> dict[float, str]:
    """What each size is, by the configurations of its runs: `256 + 128` features or layers, stage by stage."""
    stages: dict[float, list[dict[str, int]]] = {}
    for one in found:
        size = size_of(one.trial.values[axes.size]) if axes.size else 1.0
        if size not in stages and (known := _stages(one.trial.run)):
            stages[size] = known
    if not stages:
        return {}
    keys = [
        key for key in ("d_model", "n_layers") if len({tuple(s.get(key) for s in of) for of in stages.values()}) > 1
    ]
    unit = {"d_model": "wide", "n_layers": "deep"}
    return {
        size: ", ".join(f"{' + '.join(str(stage.get(key)) for stage in of)} {unit[key]}" for key in keys or ["d_model"])
        for size, of in sorted(stages.items())
    }


def _stages(run: Path) -> list[dict[str, int]]:
    try:
        tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        return [dict(stage) for stage in tree["model"]["stages"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []


def _is_size(axis: str) -> bool:
    return axis in ("width", "depth") or axis.endswith((".d_model", ".n_layers"))


def _are_sizes(values: Sequence[str]) -> bool:
    sizes = [size_of(value) for value in values]
    return min(sizes) > 0 and len(set(sizes)) == len(sizes)


def size_of(value: str) -> float:
    """The number in a label, as in 8, .5 or w8; 0 for none."""
    found = re.search(r"(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", value)
    return float(found.group()) if found else 0.0


def _number(value: str) -> bool:
    try:
        return float(value) > 0
    except ValueError:
        return False


def _loss(value: object) -> float:
    """A loss that is not a finite number is worse than any."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf
