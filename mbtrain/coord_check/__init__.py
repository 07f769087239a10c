"""Coordinate check: does a model's every tensor stay as large when it is made wider? What muP promises, measured.

Models that differ in width alone train for ten steps on one small batch. The slope of each tensor's size, of its
change and of each weight's update against the width says at once, and by name, what a learning rate found on a small
model would meet in a large one (Yang et al. 2022, arXiv 2203.03466, appendix D.1). Where both stages grow together, a
rule that takes the width of the wrong one cannot show: so there are families in which one of them grows alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mbtrain.command import writing
from mbtrain.config import Config
from mbtrain.coord_check.batch import fixed_batch, shortened
from mbtrain.coord_check.measure import trained
from mbtrain.coord_check.picture import draw
from mbtrain.coord_check.places import of_last_layer, stage_names
from mbtrain.coord_check.slopes import Family, Slope, slopes
from mbtrain.coord_check.words import complaints, described, table
from mbtrain.errors import ConfigError
from mbtrain.shards import whole_file
from mbtrain.widths import WAYS, based, grown

STEPS = (1, 3)  # measured, beside the first and the last


@dataclass(frozen=True)
class Checked:
    """One family: what was measured, its slopes, the picture, and the seconds it took."""

    family: Family
    slopes: tuple[Slope, ...]
    picture: Path
    seconds: float

    @property
    def outside(self) -> list[Slope]:
        """Slopes outside their bands, the worst first."""
        return sorted((one for one in self.slopes if one.outside), key=lambda one: -one.outside)


@dataclass(frozen=True)
class Report:
    """All families of a check, how they were trained in words, and where the table is written."""

    settings: Config
    how: str
    checked: tuple[Checked, ...]
    path: Path

    @property
    def passed(self) -> bool:
        """Whether every slope of every family is within its band."""
        return not any(one.outside for one in self.checked)


def coord_check(
    settings: Config,
    out: Path,
    *,
    which: Sequence[str] = ("both",),
    factors: Sequence[float] = (1, 2, 4, 8),
    steps: int = 10,
    seeds: int = 2,
    lr: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Train the families of a configuration, fit their slopes, and write OUT/<family>.png and OUT/report.md.

    Args:
        which: of mbtrain/widths.py's WAYS.
        factors: on widths or depths, two or more; under mup a stage without a base is its own.
        lr: constant LR where the base is; None: the configuration's optim.lr.
        say: told where the check stands, a line for each model.

    Raises:
        ConfigError: a width that is not whole, a model that cannot be looked at, one stage where two are needed, or an
            OUT that cannot be written to.
        DataError: the data is there and cannot be read.
    """
    lr = settings.optim.lr if lr is None else lr
    ids, _, source = fixed_batch(settings)
    how = (
        f"{settings.name}: {settings.model.parametrization}, {seeds} seeds, {steps} steps of AdamW at {lr:.3g} on one "
        f"batch of {ids.shape[0]} x {ids.shape[1]} bytes of {source}"
    )
    checked = []
    with writing(f"--out={out}"):
        out.mkdir(parents=True, exist_ok=True)
    for one in which:
        began = time.monotonic()
        family, found = measured(settings, one, factors, steps=steps, seeds=seeds, lr=lr, say=say)
        picture = out / f"{one}.png"
        with writing(picture):
            draw(picture, f"{one}: {verdict(found)}  ({how})", family, found)
        checked.append(Checked(family, found, picture, time.monotonic() - began))
    report = Report(settings, how, tuple(checked), out / "report.md")
    with writing(report.path), whole_file(report.path) as file:
        file.write(("\n".join(lines_of(report)) + "\n").encode())
    return report


def measured(
    settings: Config,
    which: str,
    factors: Sequence[float],
    *,
    steps: int,
    seeds: int,
    lr: float,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Family, tuple[Slope, ...]]:
    """One family, trained, and its slopes; arguments and errors are those of `coord_check`."""
    ids, counts, _ = fixed_batch(settings)
    base, at = shortened(based(settings)), sorted({0, *(step for step in STEPS if step < steps), steps})
    models, runs = [grown(base, factor, which) for factor in factors], []
    for model in models:
        say(f"{which}: {'layers' if which == 'depth' else 'width'} {_in_words(model, which)}")
        made = [trained(model, ids, counts, seed=seed, lr=lr, at=at) for seed in range(seeds)]
        runs.append(tuple(of_last_layer(one, model.model) if which == "depth" else one for one in made))
    words = tuple(_in_words(model, which) for model in models)
    family = Family(which, tuple(stage_names(base.model)), tuple(factors), words, tuple(runs))
    return family, tuple(slopes(family, base))


def families(which: str, settings: Config) -> tuple[str, ...]:
    """The families that --which asks for; all: both stages together and each alone. Raises ConfigError."""
    one_stage = len(settings.model.stages) == 1
    if which == "all":
        return ("both",) if one_stage else ("both", "global", "local")
    if which not in WAYS:
        raise ConfigError(f"--which: expected all, {', '.join(WAYS)}, got {which!r}")
    if one_stage and which in ("global", "local"):
        raise ConfigError(f"--which={which}: expected both or depth: this model has one stage")
    return (which,)


def factors(given: str) -> list[float]:
    """What --widths says, as in 1/4,1/2,1,2. Raises ConfigError for what is no factor, or fewer than two."""
    try:
        found = sorted({float(Fraction(text)) for text in given.split(",")})
    except (ValueError, ZeroDivisionError, OverflowError):
        found = []
    if len(found) < 2 or found[0] <= 0:
        raise ConfigError(f"--widths: expected two or more factors above 0, as in 1/4,1/2,1,2, got {given!r}")
    return found


def verdict(found: Sequence[Slope]) -> str:
    """How many slopes are outside their bands."""
    bad = sum(bool(one.outside) for one in found)
    return f"passed, {len(found)} slopes in their bands" if not bad else f"FAILED, {bad} of {len(found)} slopes outside"


def lines_of(report: Report) -> list[str]:
    """The report in Markdown: a verdict, complaints and a table for each family."""
    lines = [f"# Coordinate check of {report.how}", ""]
    if report.settings.model.parametrization == "sp":
        lines += ["The parametrization is sp, which is expected to fail: model.parametrization=mup is what passes.", ""]
    for one in report.checked:
        family = one.family
        losses = [sum(run.losses[-1] for run in seeds) / len(seeds) for seeds in family.trained]
        lines += [f"## {family.which}: {verdict(one.slopes)}", ""]
        lines += [
            f"{'Layers' if family.which == 'depth' else 'Widths'} {'; '.join(family.widths)}. {one.seconds:.0f} s.",
            "",
        ]
        lines += [f"Nats of the batch after the last step: {', '.join(f'{loss:.2f}' for loss in losses)}.", ""]
        if one.outside:
            lines += [*(f"- {line}" for line in complaints(one.slopes, family.which)), ""]
        lines += [*table(one.slopes), ""]
    return lines


def figures(report: Report) -> dict[str, Any]:
    """What --json gives."""
    return {
        "passed": report.passed,
        "parametrization": report.settings.model.parametrization,
        "report": report.path,
        "families": {
            one.family.which: {
                "passed": not one.outside,
                "picture": str(one.picture),
                "slopes": len(one.slopes),
                "outside": len(one.outside),
                "worst": [described(slope) for slope in one.outside[:3]],
                "losses": [[run.losses for run in seeds] for seeds in one.family.trained],
                "seconds": round(one.seconds, 1),
            }
            for one in report.checked
        },
    }


def _in_words(settings: Config, family: str) -> str:
    sizes = [stage.n_layers if family == "depth" else stage.d_model for stage in settings.model.stages]
    return ", ".join(map(str, sizes))
