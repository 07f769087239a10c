"""A sweep as a file, or as axes on the command line, turned into trials with names that stay.

    name: widths                     of the folder sweeps/<name> and of the parent run in MLflow
    config: ../text/enwik8.yaml      the experiment; relative to this file, else to the working directory
    set: {train.steps: 400}          dotted keys for all trials
    grid:                            every combination is tried; the last axis changes fastest
      optim.lr: [1e-3, 2e-3]         an axis is a dotted key and its values
      variant:                       or a name and labels, each of which sets any number of keys
        sp: {model.parametrization: sp}
        mup: {model.parametrization: mup}
    skip:                            points of the axes that are left out: those that match all of an entry
      - {variant: sp, width: [2], optim.lr: 2e-3}
    widths: {factors: [1, 2], which: both}      an axis `width`; which: both, global, local or depth, or a list of them,
                                                which is then an axis too (mbtrain/widths.py)
    shrink: 8                        the experiment at 1/8 of its width, as `mbtrain transfer` needs it (proxy.py)
    random: {optim.lr: {from: 1e-4, to: 1e-2, log: true}, train.global_batch_size: [8, 16]}
                                     (between whole numbers whole ones are drawn: write 0.0 where that is not meant)
    draws: 20                        each point of the grid is tried with so many draws, the same at each
    draw_seed: 0
    seeds: [0, 1]                    train.seed; all of the first seed come before those of the second
    stop: {ratio: 1.5, bits: 8}      or off; see below
    jobs: 2                          trials at a time, and threads of each; left out: see run.py
    threads: 1

A draw depends on its axis, its number and draw_seed alone, and a trial's name on its own values alone. So a sweep may
grow, by values, draws or seeds, and what is done stays done.

stop: a trial has diverged whose loss is, in two reports in a row after the warm-up, above `ratio` times its first one;
or above `bits` bits per byte (a model that knows nothing needs 8) and a tenth above its first one. So has one whose
validation at the end is so high, or whose loss is not finite. It is stopped, and its loss counts as infinite.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbtrain import config as configuration
from mbtrain.command import closest, number
from mbtrain.config import Config
from mbtrain.errors import ConfigError
from mbtrain.sweep.proxy import proxy
from mbtrain.widths import WAYS, based, grown

KEYS = (
    "name",
    "config",
    "set",
    "grid",
    "skip",
    "shrink",
    "widths",
    "random",
    "draws",
    "draw_seed",
    "seeds",
    "stop",
    "jobs",
    "threads",
)
MOST_TRIALS = 10_000
MOST_NAME_CHARS = 120
ROSE = 1.1  # more than the losses of a trial that learns nothing differ
# What a sweep has no use for, unless the experiment or the sweep says otherwise.
DEFAULTS = {"sample.at_end": "false"}
# Points of the axes that no key of the configuration stands for.
_WIDTH, _WHICH = "@width", "@which"


@dataclass(frozen=True)
class Axis:
    """What varies: the name of the axis, and for each value, as written, the dotted keys that it sets."""

    name: str
    points: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Stop:
    """When a trial has diverged; see the module."""

    ratio: float = 1.5
    bits: float = 8.0

    def too_high(self, bpb: float, first_bpb: float) -> bool:
        """Whether a loss is what a diverged trial has; in bits per byte, with the first one reported."""
        return bpb > self.ratio * first_bpb or (bpb > self.bits and bpb > ROSE * first_bpb)


@dataclass(frozen=True)
class Planned:
    """A trial as the sweep has it: its name, axis -> value as written, its seed, and the dotted keys that it sets."""

    name: str
    values: dict[str, str]
    seed: int
    changes: dict[str, str]


@dataclass(frozen=True)
class Spec:
    """A sweep that was read. `tree` is what stands in its file, all values as they are written there."""

    name: str
    config: Path
    tree: dict[str, Any]
    axes: tuple[Axis, ...]
    draws: tuple[dict[str, str], ...]
    seeds: tuple[int, ...]
    stop: Stop | None
    jobs: int | None
    threads: int | None
    skip: tuple[Mapping[str, frozenset[str]], ...] = ()
    shrink: int = 1

    @property
    def sets(self) -> dict[str, str]:
        """Dotted keys that all trials have."""
        return _dotted(self.tree.get("set", {}), f"{self.name}: set")


def read(path: Path | str, options: Mapping[str, str] | None = None) -> Spec:
    """Read a sweep file, an experiment's file, or the folder of a sweep, and lay the command line's options over it.

    options: section.key (set), grid.section.key (values, separated by commas), random.section.key (FROM:TO or
    FROM:TO:log, or values), widths, which, draws, seeds, name, jobs, threads, as raw text.
    Raises ConfigError naming the key.
    """
    path = Path(path)
    path = path / "sweep.yaml" if path.is_dir() else path
    tree = _tree(path)
    if "config" not in tree and "model" in tree:
        tree = {"name": str(tree.get("name", path.stem)), "config": path.name}
    if unknown := [key for key in tree if key not in KEYS]:
        raise ConfigError(f"{path}: {unknown[0]}: unknown key{closest(unknown[0], KEYS)}; known: {', '.join(KEYS)}")
    for key, value in (options or {}).items():
        _lay(tree, key, value)
    try:
        return _spec(path, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def planned(spec: Spec) -> list[Planned]:
    """All trials of a sweep, in the order in which they are run. Raises ConfigError where there are too many."""
    count = math.prod([len(axis.points) for axis in spec.axes]) * len(spec.draws or (1,)) * len(spec.seeds)
    if count > MOST_TRIALS:
        raise ConfigError(f"{spec.name}: {count} trials, expected {MOST_TRIALS} at most; try fewer values or draws")
    short = _short_names([axis.name for axis in spec.axes])
    trials = list(_planned(spec, short))
    names = Counter(trial.name for trial in trials)
    if twice := [name for name, count in names.items() if count > 1]:  # two would share a run directory
        raise ConfigError(f"{spec.name}: two trials have the name {twice[0]}; write one of the values in another way")
    return trials


def settings(spec: Spec, trials: Sequence[Planned]) -> dict[str, Config]:
    """The whole configuration of each trial, by its name. Raises ConfigError that names the trial and its values."""
    tree = configuration.read(spec.config)
    named = configuration.flat(tree)
    common = {key: value for key, value in DEFAULTS.items() if key not in named} | spec.sets
    return {trial.name: _settings(spec, trial, tree, common) for trial in trials}


def _settings(spec: Spec, trial: Planned, tree: Mapping[str, Any], common: Mapping[str, str]) -> Config:
    changes = {key: value for key, value in trial.changes.items() if not key.startswith("@")}
    given = {**common, **changes, "train.seed": str(trial.seed), "name": trial.name}
    given.setdefault("log.parent", spec.name)
    try:
        made = configuration.resolved(tree, given, spec.config.parent)
        if spec.shrink > 1:
            made = proxy(made, spec.shrink)
        if _WIDTH in trial.changes:
            made = grown(based(made), float(trial.changes[_WIDTH]), trial.changes[_WHICH])
        configuration.batch_shape(made, 1)
    except ConfigError as error:
        at = ", ".join(f"{axis}={value}" for axis, value in trial.values.items()) or "no axis"
        raise ConfigError(f"trial {trial.name} ({at}): {error}") from error
    return made


def share(text: str) -> tuple[int, int] | None:
    """`I/N` -> (I, N), the I-th of N shares, counted from 0; nothing -> None. Raises ConfigError."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ConfigError(f"--share: got {text!r}, expected I/N with I from 0 to N - 1")
    return int(found[1]), int(found[2])


def to_yaml(tree: Mapping[str, Any]) -> str:
    """A sweep's file, of which `read` makes the same sweep."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


# --- Reading --------------------------------------------------------------------------------------------------------


def _tree(path: Path) -> dict[str, Any]:
    """A file's mapping, with all values as text: so 1e-3 and 1.0e-3 stay what the user wrote."""
    try:
        tree = yaml.BaseLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a sweep (name, config, grid, ...) or an experiment (model, data, ...)")
    return tree


def _lay(tree: dict[str, Any], key: str, value: str) -> None:
    """One option of the command line, laid over a sweep's file."""
    section, _, rest = key.partition(".")
    if section in ("grid", "random") and rest:
        axes = _mapping(tree.setdefault(section, {}), section)
        axes[rest] = _listed(key, value) if section == "grid" else _drawn_from(key, value)
    elif key in ("widths", "which"):
        widths = _mapping(tree.setdefault("widths", {}), "widths")
        widths["factors" if key == "widths" else "which"] = _listed(key, value)
    elif key == "seeds":
        tree["seeds"] = _listed(key, value)
    elif key in ("name", "shrink", "draws", "draw_seed", "jobs", "threads"):
        tree[key] = value
    elif rest:
        _mapping(tree.setdefault("set", {}), "set")[key] = value
    else:
        raise ConfigError(f"--{key}: no such option{closest(key, KEYS)}; settings are --section.key=value")


def _listed(key: str, text: str) -> list[Any]:
    """`a,b,[c,d]` -> its items, as text."""
    try:
        items = yaml.BaseLoader(f"[{text}]").get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"--{key}: got {text!r}, expected values separated by commas") from error
    return list(items)


def _drawn_from(key: str, text: str) -> Any:
    """`1e-4:1e-2:log` -> a range, `a,b` -> a list."""
    parts = text.split(":")
    if len(parts) == 1:
        return _listed(key, text)
    if len(parts) > 3 or (len(parts) == 3 and parts[2] != "log"):
        raise ConfigError(f"--{key}: got {text!r}, expected FROM:TO, FROM:TO:log, or values separated by commas")
    return {"from": parts[0], "to": parts[1], "log": str(len(parts) == 3).lower()}


def _spec(path: Path, tree: dict[str, Any]) -> Spec:
    if not isinstance(tree.get("config"), str):
        raise ConfigError("config: missing; it is the experiment's file")
    beside = path.parent / tree["config"]
    experiment = beside if beside.is_file() else Path(tree["config"])
    if not experiment.is_file():
        raise ConfigError(f"config: there is no {beside}, and no {experiment} in the working directory")
    name = str(tree.get("name") or path.stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"name: got {name!r}, expected letters, digits, dot, dash and underscore")
    sets = _dotted(tree.get("set", {}), "set")
    axes = [*_width_axes(tree.get("widths")), *_grid_axes(_mapping(tree.get("grid", {}), "grid"))]
    draws = _draws(tree)
    drawn = list(draws[0]) if draws else []
    _no_key_twice(axes, drawn, sets)
    seeds = tuple(number("seeds", str(seed), int, 0) for seed in _items(tree.get("seeds", ["0"]), "seeds"))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: got {list(seeds)}, expected each once")
    jobs, threads = (number(key, tree[key], int, 1) if key in tree else None for key in ("jobs", "threads"))
    shrink = number("shrink", tree.get("shrink", "1"), int, 1)
    tree, skip = {**tree, "name": name}, _skip(tree, axes)
    stop = _stop(tree.get("stop"))
    return Spec(name, experiment, tree, tuple(axes), draws, seeds, stop, jobs, threads, skip, shrink)


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: got {value}, expected a mapping")
    return value


def _items(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key}: got {value}, expected a list of one or more values")
    return value


def _dotted(value: Any, key: str) -> dict[str, str]:
    """A mapping of dotted keys to raw values, as configuration.load takes them."""
    return {dotted: _raw(item) for dotted, item in _mapping(value, key).items()}


def _raw(value: Any) -> str:
    """A value as the command line has it: text as it is, lists and mappings as YAML in brackets."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "[" + ", ".join(map(_raw, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_raw(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _grid_axes(grid: dict[str, Any]) -> Iterator[Axis]:
    for axis, given in grid.items():
        where = f"grid.{axis}"
        if axis in ("seed", "train.seed", "width", "which", "name"):
            raise ConfigError(f"{where}: is no axis of the grid; see seeds and widths")
        if isinstance(given, dict):
            if not given:
                raise ConfigError(f"{where}: expected labels, each with the keys that it sets")
            points = {label: _dotted(changes, f"{where}.{label}") for label, changes in given.items()}
        else:
            if "." not in axis:
                raise ConfigError(f"{where}: got a list, expected labels with keys (or a dotted key, as optim.lr)")
            values = [_raw(value) for value in _items(given, where)]
            if len(set(values)) < len(values):
                raise ConfigError(f"{where}: got {', '.join(values)}, expected each once")
            points = {value: {axis: value} for value in values}
        yield Axis(axis, points)


def _width_axes(widths: Any) -> Iterator[Axis]:
    """The axes `which`, where there are several ways to grow, and `width`."""
    if widths is None:
        return
    given = _mapping(widths, "widths")
    if unknown := set(given) - {"factors", "which"}:
        raise ConfigError(f"widths.{min(unknown)}: unknown key; known: factors, which")
    factors = _items(given.get("factors"), "widths.factors")
    for factor in factors:
        if math.isinf(number("widths.factors", factor, float, 1e-4)):
            raise ConfigError(f"widths.factors: got {factor}, expected a finite number")
    which = given.get("which", "both")
    ways = [which] if isinstance(which, str) else _items(which, "widths.which")
    for way in ways:
        if way not in WAYS:
            raise ConfigError(f"widths.which: got {way}, expected one of {', '.join(WAYS)}, or a list of them")
    if len(set(factors)) < len(factors) or len(set(ways)) < len(ways):
        raise ConfigError("widths: expected each value once")
    if len(ways) > 1:
        yield Axis("which", {way: {_WHICH: way} for way in ways})
        yield Axis("width", {factor: {_WIDTH: factor} for factor in factors})
    else:
        yield Axis("width", {factor: {_WIDTH: factor, _WHICH: ways[0]} for factor in factors})


def _no_key_twice(axes: list[Axis], drawn: list[str], sets: Mapping[str, str]) -> None:
    """Each key may be set in one place alone: in two, the name of a trial would lie."""
    owner: dict[str, str] = {}
    setting = [(axis.name, list(dict.fromkeys(key for keys in axis.points.values() for key in keys))) for axis in axes]
    for name, keys in [*setting, ("random", drawn)]:
        for key in keys:
            if key in owner:
                raise ConfigError(f"{key}: set by two axes, {owner[key]} and {name}; expected one")
            if key in ("name", "train.seed"):
                raise ConfigError(f"{name}: sets {key}, which a sweep sets itself; see seeds")
            owner[key] = name
    for key in sets:
        if key in owner or key in ("name", "train.seed"):
            raise ConfigError(f"set.{key}: is set by {owner.get(key, 'the sweep itself')} too; expected one of them")


def _skip(tree: Mapping[str, Any], axes: list[Axis]) -> tuple[Mapping[str, frozenset[str]], ...]:
    """Entries of axis -> values: what matches all of an entry is not tried."""
    known = {axis.name: axis.points for axis in axes}
    entries = []
    for i, entry in enumerate(_items(tree["skip"], "skip") if "skip" in tree else []):
        values = {}
        for axis, given in _mapping(entry, f"skip.{i}").items():
            if axis not in known:
                raise ConfigError(f"skip.{i}.{axis}: no such axis; expected one of {', '.join(known) or 'none'}")
            values[axis] = frozenset(_raw(value) for value in (given if isinstance(given, list) else [given]))
            if unknown := values[axis] - set(known[axis]):
                raise ConfigError(f"skip.{i}.{axis}: got {min(unknown)}, expected one of {', '.join(known[axis])}")
        if not values:
            raise ConfigError(f"skip.{i}: got nothing, expected axes and their values")
        entries.append(values)
    return tuple(entries)


def _stop(given: Any) -> Stop | None:
    if given is None:
        return Stop()
    if given in ("off", "false", "null", "none"):
        return None
    known = _mapping(given, "stop")
    if unknown := set(known) - {"ratio", "bits"}:
        raise ConfigError(f"stop.{min(unknown)}: unknown key; known: ratio, bits; or stop: off")
    return Stop(**{key: number(f"stop.{key}", str(value), float, 0) for key, value in known.items()})


# --- Draws ----------------------------------------------------------------------------------------------------------


def _draws(tree: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
    random = _mapping(tree.get("random", {}), "random")
    if bool(random) != ("draws" in tree):
        raise ConfigError("random, draws: expected both (what is drawn, and how often) or neither")
    if not random:
        return ()
    seed = number("draw_seed", str(tree.get("draw_seed", "0")), int, 0)
    count = number("draws", str(tree["draws"]), int, 1)
    return tuple({axis: _drawn(axis, given, seed, i) for axis, given in random.items()} for i in range(count))


def _drawn(axis: str, given: Any, seed: int, i: int) -> str:
    """The i-th value of an axis, by its own number in [0, 1)."""
    digest = hashlib.sha256(f"{seed} {axis} {i}".encode()).digest()
    share = int.from_bytes(digest[:7], "big") / 256**7
    where = f"random.{axis}"
    if "." not in axis:
        raise ConfigError(f"{where}: expected a dotted key, as optim.lr")
    if isinstance(given, list):
        values = _items(given, where)
        return _raw(values[int(share * len(values))])
    range_ = _mapping(given, where)
    if set(range_) - {"from", "to", "log"} or not {"from", "to"} <= set(range_):
        raise ConfigError(f"{where}: got {_raw(given)}, expected {{from: A, to: B, log: true}}, or a list of values")
    low, high = (number(f"{where}.{key}", range_[key], float, -math.inf) for key in ("from", "to"))
    log = range_.get("log", "false")
    if log not in ("true", "false") or not low < high or not math.isfinite(high - low) or (log == "true" and low <= 0):
        raise ConfigError(f"{where}: got {_raw(given)}, expected from < to, and with log: true both above 0")
    whole = all(re.fullmatch(r"[+-]?\d+", range_[key]) for key in ("from", "to"))
    if whole:  # both ends are drawn as often as what is between them
        low, high = (low - 0.5, high + 0.5) if log == "false" else (low, high + 1)
    value = low * (high / low) ** share if log == "true" else low + (high - low) * share
    if whole:
        return str(math.floor(value) if log == "true" else round(value))
    return f"{value:.4g}"


# --- Trials ---------------------------------------------------------------------------------------------------------


def _planned(spec: Spec, short: Mapping[str, str]) -> Iterator[Planned]:
    several = bool(spec.draws)
    for seed in spec.seeds:
        for i, draw in enumerate(spec.draws or ({},)):
            for labels in itertools.product(*(axis.points for axis in spec.axes)):
                chosen = list(zip(spec.axes, labels, strict=True))
                values = {axis.name: label for axis, label in chosen}
                if any(all(values[axis] in left_out for axis, left_out in entry.items()) for entry in spec.skip):
                    continue
                parts = [f"{short[axis.name]}{label}" for axis, label in chosen]
                changes = {key: value for axis, label in chosen for key, value in axis.points[label].items()}
                if several:
                    parts.append(f"draw{i}")
                name = _name([*parts, f"s{seed}"], values | ({"draw": str(i)} if several else {}))
                yield Planned(name, values | draw, seed, changes | draw)


def _short_names(axes: list[str]) -> dict[str, str]:
    """The end of each axis's key, as long as it must be to differ from the others'; nothing for named axes."""
    out = {}
    for axis in axes:
        if "." not in axis:
            out[axis] = axis if axis == "width" else ""
            continue
        parts = axis.split(".")
        others = [other for other in axes if other != axis]
        for n in range(1, len(parts) + 1):
            end = ".".join(parts[-n:])
            if not any(other == end or other.endswith(f".{end}") for other in others):
                break
        out[axis] = end.replace(".", "-")
    return out


def _name(parts: list[str], values: Mapping[str, str]) -> str:
    """A trial's name: what is legible of its values, and a hash where that is not all."""
    plain = "_".join(re.sub(r"[^A-Za-z0-9._+-]+", "-", part).strip("-") for part in parts)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", plain).lstrip("._-")
    # Without underscores in values, those between them say where each ends: no two names are the same.
    if all(re.fullmatch(r"[A-Za-z0-9.-]+", value) for value in values.values()) and len(name) <= MOST_NAME_CHARS:
        return name
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    *_, seed = parts
    return f"{name[: MOST_NAME_CHARS - 20].removesuffix(f'_{seed}').rstrip('_.-') or 'trial'}_{digest}_{seed}"
