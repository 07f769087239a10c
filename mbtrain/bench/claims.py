"""The paper's claims at small scale: every row of a plan trained at equal FLOPs, then a table.

    mbtrain bench claims [--plan=configs/claims/plan.yaml] [--only=REGEX] [--seeds=1,2] [--jobs=2] [--runs=DIR]

A plan is a mapping of rows, `name: {config: FILE, set: {dotted.key: value}, seeds: [1, 2, 3]}`; FILE stands beside the
plan. Each row and seed is a run of its own, DIR/NAME_sSEED, trained by `mbtrain train` in one process with one thread:
so several run side by side, and what else the machine does changes the time but not the result, which is limited by
FLOPs. Runs that are finished are not made again: a plan that was stopped, or that grew, goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbtrain import config, metrics
from mbtrain.command import no_unknown, number, write
from mbtrain.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One line of a plan: its name, the configuration and what is changed in it, and the seeds it is run with."""

    name: str
    config: Path
    changes: dict[str, Any]
    seeds: tuple[int, ...]

    def run(self, runs: Path, seed: int) -> Path:
        """The run directory of one seed."""
        return runs / f"{self.name}_s{seed}"


def claims(
    *,
    plan: str = "configs/claims/plan.yaml",
    only: str = "",
    seeds: str = "",
    jobs: str = "2",
    runs: str = "runs/claims",
    mlflow: str = "false",
    **unknown: str,
) -> dict[str, Any]:
    """Train what has no result yet, print the table; returns {"rows", "runs", "failed"}. See the module.

    Raises ConfigError for a plan that cannot be read.
    """
    no_unknown(claims, unknown)
    rows = [row for row in read_plan(Path(plan)) if re.search(only, row.name)]
    wanted = {int(seed) for seed in seeds.split(",")} if seeds else None
    work = [
        (row, seed)
        for seed in sorted({seed for row in rows for seed in row.seeds})
        for row in rows
        if seed in row.seeds and (wanted is None or seed in wanted)
    ]
    left = [(row, seed) for row, seed in work if not is_finished(row.run(Path(runs), seed))]

    def train(item: tuple[Row, int]) -> bool:
        row, seed = item
        run = row.run(Path(runs), seed)
        ended = subprocess.run(_command(row, seed, run, mlflow), env=_one_thread(), capture_output=True, text=True)
        said = (ended.stdout if ended.returncode == 0 else ended.stderr).strip().splitlines()
        sys.stderr.write(f"{row.name} seed {seed}: {said[-1] if said else ended.returncode}\n")
        return ended.returncode == 0

    with ThreadPoolExecutor(number("--jobs", jobs, int, 1)) as pool:
        failed = list(pool.map(train, left)).count(False)
    for line in table(rows, Path(runs)):
        write(line)
    return {"rows": len(rows), "runs": len(work), "failed": failed}


def read_plan(path: Path) -> list[Row]:
    """The rows of a plan, in its order. Raises ConfigError naming the row that is wrong."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--plan={path}: cannot be read ({' '.join(str(error).split())})") from error
    rows = []
    for name, given in (tree or {}).items():
        if not isinstance(given, dict) or set(given) - {"config", "set", "seeds"} or "config" not in given:
            raise ConfigError(f"{path}: {name}: got {given}, expected config, and set and seeds where wanted")
        rows.append(Row(name, path.parent / given["config"], given.get("set", {}), tuple(given.get("seeds", (0,)))))
    return rows


def overrides(row: Row) -> dict[str, str]:
    """What a row changes, as config.load takes it."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.changes.items()}


def is_finished(run: Path) -> bool:
    """Whether a run directory holds a whole run."""
    try:
        return bool(json.loads((run / "status.json").read_text(encoding="utf-8"))["status"] == "FINISHED")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def table(rows: list[Row], runs: Path) -> Iterator[str]:
    """What came of the rows, as Markdown: bits per byte over the seeds that are finished, and what they cost."""
    from mbtrain.model.flops import count

    yield "| run | bits per byte | seeds | parameters | training FLOPs a byte | MB trained on |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        made = [run for seed in row.seeds if is_finished(run := row.run(runs, seed))]
        if not made:
            continue
        ends = [metrics.read(run / "metrics.jsonl") for run in made]
        scores, seen, flops = (
            [next(line[key] for line in reversed(lines) if key in line) for lines in ends]
            for key in ("val/bpb", "progress/bytes", "progress/flops")
        )
        mean = math.fsum(scores) / len(scores)
        spread = f" ({min(scores):.4f} to {max(scores):.4f})" if len(scores) > 1 else ""
        counted = count(config.load(made[0] / "config.yaml"))
        yield (
            f"| {row.name} | {mean:.4f}{spread} | {len(scores)} | {counted.parameters / 1e6:.2f}M | "
            f"{flops[0] / seen[0] / 1e6:.2f}M | {seen[0] / 1e6:.2f} |"
        )


def _command(row: Row, seed: int, run: Path, mlflow: str) -> list[str]:
    changes = {**overrides(row), "name": run.name, "train.seed": str(seed), "log.mlflow": mlflow}
    options = [f"--{key}={value}" for key, value in changes.items()]
    return [sys.executable, "-m", "mbtrain", "train", str(row.config), f"--run={run}", "--resume", *options]


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
