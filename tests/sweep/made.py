"""Sweeps as the runner leaves them, with losses that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mbtrain import config
from mbtrain.sweep import spec as specs
from tests import tiny

LINES = 40  # of training losses: the last 5 % are fewer than the least number, so the last 5 count
RATES = [2.0**power for power in range(-9, -2)]


def bowl(lr: float, best: float, floor: float) -> float:
    """A parabola in log2 of the LR: its vertex is what a report should find."""
    return floor + 0.05 * (math.log2(lr) - best) ** 2


def sweep(
    folder: Path,
    loss: Callable[[Mapping[str, str], int], float | None],
    tree: Mapping[str, Any] | None = None,
    **experiment: Any,
) -> Path:
    """A sweep's folder. loss(values, seed): the last validation loss; inf of a trial that diverged; None: not begun.

    The last training loss is 0.1 above it. The best ones are 0.05 below: half-way both were lower.
    """
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tiny.tree(**experiment)))
    given = tree or {"grid": {"optim.lr": RATES}, "widths": {"factors": [1, 2, 4, 8]}}
    (folder / "sweep.yaml").write_text(
        yaml.safe_dump({"name": "made", "config": "experiment.yaml", **given}, sort_keys=False)
    )
    spec = specs.read(folder)
    plan = specs.planned(spec)
    settings = specs.settings(spec, plan)
    for trial in plan:
        value = loss(trial.values, trial.seed)
        if value is not None:
            run(folder / "runs" / trial.name, value, config.to_yaml(settings[trial.name]))
    return folder


def run(folder: Path, loss: float, settings: str) -> None:
    """A run directory that ended with a loss."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(settings)
    diverged = math.isinf(loss)
    final = 3.0 if diverged else loss
    lines: list[dict[str, Any]] = []
    for step in range(1, LINES + 1):
        half = LINES / 2 - 5 <= step <= LINES / 2
        lines.append({"step": step, "train/bpb": final + (0.05 if half else 0.1 if step > LINES - 5 else 1.0)})
        if step == LINES // 2:
            lines.append({"step": step, "val/bpb": final - 0.05})
    if diverged:
        lines.append({"step": LINES + 1, "train/bpb": "nan"})
        (folder / "trial.json").write_text(json.dumps({"status": "diverged", "reason": "made so", "crashes": 0}))
    else:
        lines.append({"step": LINES, "val/bpb": final})
        (folder / "status.json").write_text('{"status": "FINISHED"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
