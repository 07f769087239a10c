"""What a sweep found on a small model, as the configuration of a large one: the same values under muP.

The values hold at the small model's widths, depths and widths per head; muP says what follows from them elsewhere
(model/mup.py). It says nothing of longer training, larger batches or other data: what differs there is listed.
"""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbtrain import config as configuration
from mbtrain.command import writing
from mbtrain.config import Config
from mbtrain.errors import ConfigError
from mbtrain.shards import whole_file
from mbtrain.sweep import scores
from mbtrain.sweep import spec as specs
from mbtrain.sweep.drawing import power
from mbtrain.sweep.optimum import Optimum, of_seeds
from mbtrain.sweep.scores import LR, Axes, Scored
from mbtrain.sweep.state import trials as trials_of

# Keys that are no part of what was tuned: they say where, how long and how it is watched.
_BESIDE = (
    "name",
    "data.path",
    "data.sources",
    "train.seed",
    "eval.",
    "checkpoint.",
    "sample.",
    "log.",
    "train.minutes",
)


@dataclass(frozen=True)
class Found:
    """The best values of a sweep.

    optimum   of the LR; `edge` is alone where the sweep had one LR
    lr        to be used
    changes   dotted key -> raw value of the other axes' best points
    scored    how many bits per byte are whose: val_last or train_last
    small     a configuration of the best point, whose stages are the base
    edges     other axes of numbers whose best value is the least or the largest tried
    """

    optimum: Optimum
    lr: float
    changes: dict[str, str]
    scored: str
    small: Config
    edges: tuple[str, ...]


@dataclass(frozen=True)
class Transferred:
    """What was written, and what a terminal shows of it."""

    path: Path
    figures: dict[str, Any]
    lines: tuple[str, ...]


def transfer(
    sweep: Path | str, large: Path | str, out: Path | str, overrides: Mapping[str, str] | None = None
) -> Transferred:
    """Write the configuration `large`, under muP with the best values of a sweep and its model as the base.

    overrides: dotted keys laid over `large`, as `mbtrain train` takes them; not over what the sweep found.
    Raises ConfigError where the sweep has no finished trial, or its model is not of the large one's kind, and where
    `out` cannot be written.
    """
    found = best(Path(sweep))
    given = configuration.load(large, {**(overrides or {}), **found.changes, LR: repr(found.lr)})
    made = _renamed(under_mup(given, found.small), Path(out))
    warnings = [*_warnings(found), *_unlike(found, made)]
    settings = [f"--{key}={value}" for key, value in (overrides or {}).items()]
    command = ["mbtrain", "transfer", str(sweep), str(large), f"--out={out}", *settings]
    header = _header(command, Path(large), Path(out), found, warnings)
    with writing(f"--out={out}"), whole_file(Path(out)) as file:
        file.write((header + configuration.to_yaml(made)).encode())
    figures = {
        "path": str(out),
        "lr": made.optim.lr,
        "log2_lr": found.optimum.log2_lr,
        "standard_error": found.optimum.error,
        "edge": found.optimum.edge,
        "seeds": found.optimum.seeds,
        "bpb": found.optimum.loss,
        "values": found.changes,
        "base": [list(made.model.base(i)) for i in range(len(made.model.stages))],
        "warnings": warnings,
    }
    lines = [f"{out}: optim.lr = {made.optim.lr:.4g}, {_in_words(found)}"]
    lines += [f"{key} = {value}" for key, value in found.changes.items()]
    lines += [f"warning: {warning}" for warning in warnings]
    return Transferred(Path(out), figures, tuple(lines))


def best(folder: Path) -> Found:
    """The best values of a sweep: of the LR by the parabola, of all other axes the best point, by the mean over seeds.

    Where the models have several widths, of the largest. Raises ConfigError where no trial is finished, or where a seed
    diverged at every LR.
    """
    found, _ = scores.scored(trials_of(folder))
    axes = scores.axes_of([one.trial for one in found])
    planned = {trial.name: trial for trial in specs.planned(specs.read(folder))}
    if axes.size:
        largest = max(axes.values[axes.size], key=lambda value: scores.size_of(value))
        found = [one for one in found if one.trial.values[axes.size] == largest]
    target = "val_last" if any(math.isfinite(one.losses["val_last"]) for one in found) else "train_last"
    finished = [one for one in found if math.isfinite(one.losses[target])]
    if not finished:
        raise ConfigError(f"{folder}: expected finished trials with a loss, found none; let `mbtrain sweep` end first")
    settings = {one.trial.name: configuration.load(one.trial.run / "config.yaml") for one in finished}
    points: dict[tuple[str, ...], list[Scored]] = {}
    for one in found:
        points.setdefault(tuple(one.trial.values[axis] for axis in axes.others), []).append(one)
    optima = {point: of_seeds(_curves(members, target, settings, axes)) for point, members in points.items()}
    point = min(optima, key=lambda at: (math.isnan(optima[at].loss), optima[at].loss))
    if math.isnan(optima[point].loss):
        raise ConfigError(f"{folder}: expected an LR at which no seed diverged, found none; let it have lower ones")
    chosen = next(one for one in points[point] if one.trial.name in settings)
    changes = {
        key: value
        for key, value in planned[chosen.trial.name].changes.items()
        if key != LR and not key.startswith("@") and not _of_shape(key)
    }
    rate = optima[point].log2_lr
    edges = tuple(axis for axis, value in zip(axes.others, point, strict=True) if _at_edge(value, axes.values[axis]))
    return Found(optima[point], float(f"{2**rate:.4g}"), changes, target, settings[chosen.trial.name], edges)


def under_mup(large: Config, small: Config) -> Config:
    """The large configuration under muP, with the small one's base: its own shape, or what that is measured by.

    Raises ConfigError where the small model is of another kind.
    """
    patches, expected = ([stage.patch_size for stage in one.model.stages] for one in (large, small))
    if patches != expected:
        raise ConfigError(
            f"model.stages: patches of {patches} bytes, expected the sweep's, {expected}; muP scales width and depth"
        )
    if small.model.kind != large.model.kind:
        raise ConfigError(f"model.kind: got {large.model.kind}, expected that of the sweep, {small.model.kind}")
    stages = []
    for i, stage in enumerate(large.model.stages):
        base = small.model.base(i)
        names = {"base_d_model": base.d_model, "base_n_layers": base.n_layers, "base_d_head": base.d_head}
        stages.append({**stage.model_dump(), **names})
    tree = large.model_dump()
    mup = (small if small.model.parametrization == "mup" else large).model.mup.model_dump()
    tree["model"] |= {"parametrization": "mup", "mup": mup, "stages": stages}
    return configuration.validate(tree)


def _curves(
    members: Sequence[Scored], target: str, settings: Mapping[str, Config], axes: Axes
) -> list[dict[float, float]]:
    """log2 LR -> loss of each seed; without an axis of LRs the one that all have."""
    curves: dict[int, dict[float, float]] = {}
    for one in members:
        if axes.lr:
            lr = float(one.trial.values[LR])
        elif one.trial.name in settings:
            lr = settings[one.trial.name].optim.lr
        else:
            continue
        curves.setdefault(one.trial.seed, {})[math.log2(lr)] = one.losses[target]
    return list(curves.values())


def _at_edge(value: str, values: Sequence[str]) -> bool:
    try:
        numbers = sorted(map(float, values))
        return len(numbers) > 2 and float(value) in (numbers[0], numbers[-1])
    except ValueError:
        return False


def _warnings(found: Found) -> Iterator[str]:
    edge, rate = found.optimum.edge, power(found.optimum.grid)
    if edge in ("low", "high"):
        beyond = "lower" if edge == "low" else "higher"
        yield f"the best LR, {rate}, is the {edge}est tried: the best may be {beyond}; widen the sweep"
    elif edge:
        yield f"one LR was tried, {rate}: whether another is better is not known"
    elif not found.optimum.parabola:
        yield f"beside the best LR, {rate}, runs diverged: it is the grid's best, with no parabola"
    for axis in found.edges:
        yield f"the best {axis} is at the edge of those tried: a better one may lie beyond"


def _unlike(found: Found, made: Config) -> Iterator[str]:
    """What differs between the sweep's runs and the large one's, of which muP says nothing."""
    small, large = (configuration.flat(one.model_dump(mode="json")) for one in (found.small, made))
    differ = [
        f"{key} {small.get(key)} -> {large.get(key)}"
        for key in {**small, **large}
        if small.get(key) != large.get(key) and key != LR and not key.startswith(_BESIDE) and not _of_shape(key)
    ]
    if differ:
        yield f"not as in the sweep, and muP says nothing of it: {', '.join(differ)}"


def _of_shape(key: str) -> bool:
    """What muP scales or scales by; a window is of a stage, and no part of that."""
    return key.startswith(("model.stages", "model.parametrization", "model.mup")) and not key.endswith(".window")


def _header(command: Sequence[str], large: Path, out: Path, found: Found, warnings: Sequence[str]) -> str:
    stages = found.small.model.stages
    bases = [found.small.model.base(i) for i in range(len(stages))]
    shape = " + ".join(f"{base.n_layers}x{base.d_model}" for base in bases)
    lines = [
        f"{large.stem} with what a sweep of a smaller model found, by muP.",
        "",
        f"  {shlex.join(command)}",
        f"  {shlex.join(['mbtrain', 'train', str(out)])}",
        "",
        f"Base: {shape} (layers x width). optim.lr = {found.lr:.4g}, {_in_words(found)}.",
    ]
    if found.changes:
        lines.append("Best of the other keys tried: " + ", ".join(f"{k} = {v}" for k, v in found.changes.items()) + ".")
    lines += [f"WARNING: {warning}" for warning in warnings]
    parts = []
    for line in lines:  # commands stay whole, but where a name has a line's end in it
        parts += line.splitlines() if line.startswith("  ") else textwrap.wrap(line, 118) or [""]
    return "".join(f"# {part}".rstrip() + "\n" for part in parts)


def _in_words(found: Found) -> str:
    best_lr = found.optimum
    how = "by the parabola" if best_lr.parabola else "the grid's best"
    loss = f"{best_lr.loss:.4f} bits per byte ({'validation' if found.scored == 'val_last' else 'training'})"
    if math.isnan(best_lr.error):
        spread = "one seed" if best_lr.seeds == 1 else f"{best_lr.seeds} seeds, whose spread is not known"
    else:
        spread = f"+- {best_lr.error:.2f} over {best_lr.seeds} seeds"
    return f"log2 {best_lr.log2_lr:.2f} {how} ({spread}); {loss} at {power(best_lr.grid)}, the best of the grid"


def _renamed(config: Config, out: Path) -> Config:
    """Named as its file, so that it does not train into the run directory of the one that it comes of."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.stem).lstrip("._-")
    return config.model_copy(update={"name": name or config.name})
