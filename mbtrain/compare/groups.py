"""Runs -> sections of one data set each, groups of seeds, their order, what they scored at equal cost, how they differ.

Scores of different data cannot be compared, so each data set has a section of its own. Runs whose names differ by the
ending `_s0`, `_s1` or `_seed2` alone are one group: its score is their mean, with the lowest and the highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbtrain.compare.reading import AXES, Points, Run
from mbtrain.plots import smooth
from mbtrain.tracking.labels import without_seed

SMOOTH_PART = 40  # each value is the mean of a fortieth of the run before and after it

# What does not make another experiment of a run.
_BESIDE = ("name", "train.seed", "log.", "sample.", "checkpoint.")


@dataclass(frozen=True)
class Spread:
    """A mean over the runs of a group, and the lowest and the highest of them; nan where no run tells it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds. scored_on: whole split, first part, training or nothing."""

    name: str
    runs: tuple[Run, ...]

    @property
    def scored_on(self) -> str:
        return min((_score(run)[0] for run in self.runs), key=_WORTH.index)

    @property
    def score(self) -> Spread:
        """Of the runs that were scored by the best that one of them was scored on."""
        scores = [_score(run) for run in self.runs]
        return spread([value for on, value in scores if on == self.scored_on])

    @property
    def best(self) -> Run:
        """The run whose score is nearest the mean of the group: the one to show samples of."""
        mean = self.score.mean
        return min(self.runs, key=lambda run: (not run.samples, abs(_score(run)[1] - mean), run.name))


@dataclass(frozen=True)
class Section:
    """Groups of one data set, the best first."""

    title: str
    modality: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class EqualCost:
    """Smoothed training bits per byte of each group where it had spent `budget` of an axis; nan: it never did."""

    axis: str
    budget: float
    bpb: tuple[float, ...]


_WORTH = ("whole split", "first part", "training", "nothing")


def sections(runs: Sequence[Run]) -> list[Section]:
    """The runs by data set, largest section first; groups by score, best first, those without one last."""
    by_data: dict[tuple[tuple[str, ...], str], list[Run]] = {}
    for run in runs:
        by_data.setdefault(_data_key(run, runs), []).append(run)
    names = [data for data, _ in by_data]
    out = []
    for (data, digest), of_data in by_data.items():
        title = " + ".join(data) or "data that is not told"
        if names.count(data) > 1:
            title += f" (prepared as {digest[:8]})" if digest else " (preparation not told)"
        groups: dict[str, list[Run]] = {}
        for run in of_data:
            groups.setdefault(without_seed(run.name), []).append(run)
        made = [Group(name if len(of) > 1 else of[0].name, tuple(of)) for name, of in groups.items()]
        made.sort(key=lambda group: (_WORTH.index(group.scored_on), _last(group.score.mean), group.name))
        modalities = dict.fromkeys(run.origin.modality for run in of_data if run.origin.modality != "unknown")
        out.append(Section(title, " and ".join(modalities) or "unknown", tuple(made)))
    return sorted(out, key=lambda section: (-sum(len(group.runs) for group in section.groups), section.title))


def spread(values: Sequence[float]) -> Spread:
    """Of the values that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(float(np.mean(known)), min(known), max(known))


def smoothed(points: Points, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Costs and smoothed bits per byte of the points that are finite, by rising cost."""
    x, y = points.costs[axis], points.bpb
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    order = np.argsort(x, kind="stable")
    return x[order], np.array(smooth(y[order].tolist(), SMOOTH_PART))


def equal_costs(groups: Sequence[Group]) -> list[EqualCost]:
    """For each axis the most that three quarters of the groups have spent, and where each of them stood then."""
    out = []
    for axis in AXES:
        spent = [spread([run.spent(axis) for run in group.runs]).low for group in groups]
        known = [amount for amount in spent if amount > 0]
        if not known:
            continue
        budget = float(np.quantile(known, 0.25, method="lower"))
        bpb = tuple(spread([_bpb_at(run, axis, budget) for run in group.runs]).mean for group in groups)
        if any(not math.isnan(value) for value in bpb):
            out.append(EqualCost(axis, budget, bpb))
    return out


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in each group) of the settings that differ; several values of a group by commas."""
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in run.settings)
    out = []
    for key in keys:
        values = [tuple(dict.fromkeys(run.settings.get(key, "—") for run in group.runs)) for group in groups]
        if key != "name" and len({value for of_group in values for value in of_group}) > 1:
            out.append((key, [", ".join(of_group) for of_group in values]))
    return out


def unlike(group: Group) -> list[str]:
    """Settings in which runs of one group differ although they are told to differ by seed alone."""
    return [key for key, _ in differences([Group(run.name, (run,)) for run in group.runs]) if not _is_beside(key)]


def _is_beside(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in _BESIDE)


def _data_key(run: Run, runs: Sequence[Run]) -> tuple[tuple[str, ...], str]:
    """Names and hash of its data; a run without a hash (an older one) belongs to the others of the same names."""
    data, digest = run.origin.data, run.origin.dataset_hash
    if not digest:
        known = {other.origin.dataset_hash for other in runs if other.origin.data == data} - {""}
        digest = known.pop() if len(known) == 1 else ""
    return data, digest


def _score(run: Run) -> tuple[str, float]:
    """What it was scored on, and the last score; of training the last smoothed value."""
    if len(run.val.bpb):
        return "whole split", run.score
    if len(run.partial.bpb):
        return "first part", float(run.partial.bpb[-1])
    _, bpb = smoothed(run.train, "bytes")
    if not len(bpb):
        return ("training", math.nan) if len(run.train.bpb) else ("nothing", math.nan)
    return "training", float(bpb[-1])


def _bpb_at(run: Run, axis: str, budget: float) -> float:
    x, y = smoothed(run.train, axis)
    # The clock of a run limited by minutes stops some seconds before or after: within 2 % it is there.
    if not len(x) or x[-1] < 0.98 * budget or x[0] > budget:
        return math.nan
    return float(np.interp(budget, x, y))


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value
