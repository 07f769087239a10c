"""The recipe search: bits per byte of many variants of a configuration at equal CPU time.

    mbtrain bench recipe --config=configs/quickstart.yaml --data=shards/stdlib --table=FILE --cpu-seconds=60

Each variant is trained by one process with one thread until it has used its CPU seconds (so that two may run side by
side, and other work on the machine hardly counts), then scored on the first bytes of the validation split. A variant is
a line `name: key=value key=value` of the table file; `base:` has no changes. Results go to FILE.tsv, line by line: a
search that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mbtrain.command import no_unknown, number
from mbtrain.errors import ConfigError


def recipe(
    *,
    config: str = "configs/quickstart.yaml",
    data: str = "shards/stdlib",
    table: str = "",
    cpu_seconds: str = "60",
    seeds: str = "1",
    val_bytes: str = "200000",
    jobs: str = "2",
    **unknown: str,
) -> dict[str, Any]:
    """Run every variant of a table that has no result yet; returns {"variants", "best", "bpb"}. See the module."""
    no_unknown(recipe, unknown)
    variants = _read_table(Path(table))
    results_path = Path(table).with_suffix(".tsv")
    done = {line.split("\t")[0] for line in _lines(results_path)}
    work = [
        (f"{name}#{seed}", [*changes, f"--train.seed={seed}"])
        for seed in range(number("--seeds", seeds, int, 1))
        for name, changes in variants.items()
        if f"{name}#{seed}" not in done
    ]

    def run(item: tuple[str, list[str]]) -> None:
        name, changes = item
        command = [sys.executable, "-m", "mbtrain.bench.recipe", config, data, cpu_seconds, val_bytes, *changes]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = ended.stdout.strip().splitlines()
        # "diverged" is a result too; anything else that failed is shown with its last line.
        outcome = lines[-1] if ended.returncode == 0 and lines else f"failed\t{ended.stderr.strip()[-200:]!r}"
        with results_path.open("a", encoding="utf-8") as file:
            file.write(f"{name}\t{outcome}\t{' '.join(changes)}\n")
        sys.stderr.write(f"{name}\t{outcome}\n")

    with ThreadPoolExecutor(number("--jobs", jobs, int, 1)) as pool:
        list(pool.map(run, work))
    scored = [(float(f[1]), f[0]) for f in (line.split("\t") for line in _lines(results_path)) if f[1] != "failed"]
    bpb, best = min(scored, default=(math.nan, ""))
    return {"variants": len(scored), "best": best, "bpb": bpb}


def _read_table(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        raise ConfigError(
            f"--table={path}: expected a file with a variant a line, as in 'wide: model.block.norm=rmsnorm'"
        )
    variants = {}
    for line in _lines(path):
        if line.strip() and not line.startswith("#"):
            name, _, changes = line.partition(":")
            variants[name.strip()] = [f"--{change}" for change in changes.split()]
    return variants


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _train_one(config_path: str, data: str, cpu_seconds: float, val_bytes: int, overrides: dict[str, str]) -> str:
    """Train and score one variant in this process: 'bpb, updates, megabytes, parameters, bytes per CPU second'."""
    import torch

    from mbtrain import config, engine, evaluate
    from mbtrain.bench.own import bare_step
    from mbtrain.data.loader import Shape, micro_batch
    from mbtrain.data.mixture import mixture
    from mbtrain.data.opening import open_sources
    from mbtrain.model import build
    from mbtrain.model.flops import count
    from mbtrain.schedule import lr_factor

    settings = config.load(config_path, {**overrides, "data.path": data})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    engine.keep_memory()
    torch.manual_seed(settings.train.seed)
    model = build(settings)
    step, finish = bare_step(settings, model)
    opened = open_sources(settings, "train", seed=settings.train.seed)
    rows = mixture(settings.data, [(source.name, source.stream) for source in opened])
    t = settings.data.seq_len
    shape = Shape(t, settings.train.global_batch_size, accumulation=1, rank=0, ranks=1)
    updates, began = 0, time.process_time()
    while (spent := time.process_time() - began) < cpu_seconds:
        ids = torch.from_numpy(micro_batch(rows, shape, updates * shape.step_ids, 0, shape.step_ids).ids).long()
        lost = step(ids, lr_factor(settings.optim, updates, spent / cpu_seconds))
        updates += 1
        if not math.isfinite(lost):
            return f"{math.inf}\tdiverged at update {updates}"
    finish()
    model.eval()
    score = evaluate.score(
        model,
        open_sources(settings, "val", seed=None),
        seq_len=t,
        batch=16,
        device=torch.device("cpu"),
        limit_bytes=val_bytes,
    )
    size, seen = count(settings).parameters, updates * shape.step_ids
    return f"{score.bpb:.4f}\t{updates}\t{seen / 1e6:.2f}\t{size / 1e6:.2f}\t{seen / cpu_seconds:.0f}"


if __name__ == "__main__":
    _, _config, _data, _seconds, _bytes, *_changes = sys.argv
    _overrides = dict(change.removeprefix("--").split("=", 1) for change in _changes)
    sys.stdout.write(_train_one(_config, _data, float(_seconds), int(_bytes), _overrides) + "\n")
