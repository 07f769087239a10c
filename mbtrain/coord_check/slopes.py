"""From measured families to slopes, the bands they must stay in, and a verdict. No torch.

A slope is that of log2 of a mean over seeds against log2 of the width (or depth), by least squares: 1 means twice as
large in a model twice as wide. muP (model/mup.py) keeps everything at 0, but for what its init makes smaller on
purpose: logits, and eq. 4's product where the coarser stage alone grows. docs/coord_check.md has what was measured,
and so where the bands come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mbtrain.config import Config
from mbtrain.coord_check.places import Place, Trained, stage_names

What = Literal["size", "change", "update"]

# Lowest and highest slope of sizes and changes; of attention scores; of logits before training; of updates by role.
# Below 0 there is more room: where a narrow model overshoots at the LR, its tensors grow and a wide one's do not; and
# what is scaled too far down shows in the updates.
BAND, SCORES, LOGITS_AT_INIT = (-0.4, 0.3), (-0.45, 0.45), (-0.1, 0.1)
MATRICES, VECTORS, OTHERS = (-0.5, 0.5), (-0.75, 0.75), (-0.3, 0.3)
UPDATES = {"hidden": MATRICES, "project": MATRICES, "gain": VECTORS, "bias": VECTORS}
IN_DEPTH = ("input", "residual", "slices", "logits")  # what is looked at where the number of branches differs


@dataclass(frozen=True)
class Slope:
    """The slope of one tensor or weight at one step, and the band [low, high] that it must stay in.

    what     size (mean |x|), change (RMS of x less x before training), update (RMS of (W - W before training) x)
    role     of the weight, in an update
    values   the means over seeds, in the order of the widths
    """

    place: Place
    what: What
    step: int
    slope: float
    low: float
    high: float
    values: tuple[float, ...]
    role: str = ""

    @property
    def outside(self) -> float:
        """How far outside its band, 0 within; infinite where a value was not finite."""
        if not math.isfinite(self.slope):
            return math.inf
        return max(self.low - self.slope, self.slope - self.high, 0.0)


@dataclass(frozen=True)
class Family:
    """What was measured of models of one kind that differ in width (or depth) alone.

    stages    their names, coarse to fine        widths   of each model: those of its stages (or layers), in words
    factors   on the configuration's widths      trained  [model][seed]
    """

    which: str
    stages: tuple[str, ...]
    factors: tuple[float, ...]
    widths: tuple[str, ...]
    trained: tuple[tuple[Trained, ...], ...]


def slopes(family: Family, settings: Config) -> list[Slope]:
    """All slopes of a family, in the order of the model; updates at the last step alone.

    Only there: after the first steps of Adam, when no gradient has yet passed the readout, slopes of -1/2 are sound.
    """
    found, runs = [], family.trained
    steps = sorted(runs[0][0].sizes)

    def add(what: What, step: int, place: Place, role: str = "") -> None:
        of = {"size": "sizes", "change": "changes", "update": "updates"}[what]
        values = tuple(sum(getattr(one, of)[step][place] for one in seeds) / len(seeds) for seeds in runs)
        if any(values):  # else it never moves: a pad that no row of the batch has
            low, high = band(place, what, step, family, settings, role)
            found.append(Slope(place, what, step, fit(family.factors, values), low, high, values, role))

    for step in steps:
        for place in runs[0][0].sizes[step]:
            if family.which != "depth" or place.part in IN_DEPTH:
                add("size", step, place)
                add("change", step, place)
    for place in runs[0][0].updates[steps[-1]] if family.which != "depth" else ():
        add("update", steps[-1], place, runs[0][0].roles[place])
    return found


def fit(factors: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log2 values against log2 factors, by least squares; nan where a value is not finite or is 0."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    return float(np.polyfit(np.log2(factors), np.log2(values), 1)[0])


def band(place: Place, what: What, step: int, family: Family, settings: Config, role: str = "") -> tuple[float, float]:
    """The lowest and the highest slope that is allowed."""
    if what == "update":
        low, high = UPDATES.get(role, OTHERS)
        falls = settings.model.mup.embedding_lr_power if role in ("embedding", "position", "pad") else 0.0
        expected = -falls * grows(place.stage, family.which, settings)
        return expected + low, expected + high
    low, high = SCORES if place.part == "scores" else BAND
    expected = at_init(place, family, settings)
    if step == 0 and place.part in ("logits", "slices"):
        low, high = LOGITS_AT_INIT if place.part == "logits" else (low, high)
        return expected + low, expected + high
    # What begins small in a wide model is small until training has made up for it: later, the smaller the LR is. And of
    # a sum with what does not shrink only the limits are known.
    return min(expected, 0.0) + low, max(expected, 0.0) + high


def at_init(place: Place, family: Family, settings: Config) -> float:
    """The slope of a tensor's size before training as muP has it: 0, but for logits, eq. 4's product and sums."""
    model, names = settings.model, stage_names(settings.model)
    if place.part == "logits" and model.parametrization == "mup":
        a, b, _ = model.mup.readout
        return (-0.5 if model.tied else 0.5 - a - b) * grows(place.stage, family.which, settings)
    if family.which == "depth" and place.part == "residual":  # many branches add up at random, each so much smaller
        return min(0.0, 0.5 - model.mup.depth_power)
    if place.part in ("slices", "input", "residual") and place.stage != names[0]:
        here = names.index(place.stage)
        return fit(family.factors, [_slices_at_init(here, factor, family.which, settings) for factor in family.factors])
    return 0.0


def _slices_at_init(stage: int, factor: float, which: str, settings: Config) -> float:
    """The root mean square of eq. 4's product but for a constant: min(1, out / in)^(1/2) by mup.rule."""
    model, names = settings.model, stage_names(settings.model)
    if model.parametrization == "sp":
        return 1.0
    coarser, finer = model.stages[stage - 1], model.stages[stage]
    out = factor ** grows(names[stage], which, settings) * finer.d_model
    into = factor ** grows(names[stage - 1], which, settings) * coarser.d_model
    return min(1.0, out / (into / (coarser.patch_size // finer.patch_size))) ** 0.5


def grows(stage: str, which: str, settings: Config) -> int:
    """1 where a family's models differ in this stage's width, else 0 (widths.widened)."""
    names = stage_names(settings.model)
    last = stage == names[-1]
    return {"both": 1, "global": int(not last or len(names) == 1), "local": int(last), "depth": 0}[which]
