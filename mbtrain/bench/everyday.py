"""`mbtrain bench everyday`: what training waits for beside its steps, as shares at its configuration's own cadence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mbtrain import config as configuration
from mbtrain.bench import measure
from mbtrain.bench.launching import trained
from mbtrain.command import no_unknown, number
from mbtrain.config import Config
from mbtrain.shards import load_manifest


def everyday(
    *,
    config: str = "configs/quickstart.yaml",
    data: str = "shards/stdlib",
    steps: str = "100",
    ranks: str = "2",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """A real training of --steps steps; after two thirds it saves, validates and samples once, whatever it is told.

    step_s                             the median step, without all of these
    log_s, save_s, eval_s, sample_s    what training waits for one of them
    log_share, save_share, between_share   log: of the steps from one report to the next; save, and validation with
                         samples: of the time from one to the next, where the configuration has them in between; else 0
    end_share            validation of the whole split and a sample at the end: of the whole run, as long as configured
    Raises ConfigError for options that do not fit, MbtrainError when the training fails.
    """
    no_unknown(everyday, unknown)
    n_steps, n_ranks = number("--steps", steps, int, 3), number("--ranks", ranks, int, 1)
    n_threads = number("--threads", threads, int, 1)
    settings = measure.settings_of(config, data)
    figures = measure.machine(n_threads)
    once = 2 * n_steps // 3
    options = [f"--{key}={once}" for key in ("checkpoint.every_steps", "eval.every_steps", "sample.every_steps")]
    options += ["--checkpoint.every_minutes=null", f"--log.every_steps={min(settings.log.every_steps, n_steps // 3)}"]
    lines = trained(settings, options, until=n_steps, ranks=n_ranks, threads=n_threads).lines
    found = {
        "step_s": statistics.median(_values(lines, "perf/step_s")),
        "log_s": statistics.median(_values(lines, "perf/log_wait_s")),
        "save_s": sum(line.get("perf/save_wait_s", 0.0) for line in lines),  # begun and named in different reports
        "eval_s": max(_values(lines, "perf/eval_s")),
        "sample_s": max(_values(lines, "perf/sample_s")),
    }
    shares = _shares(settings, found, lines)
    measure.say(
        f"a step {found['step_s']:.3f} s · report {1000 * found['log_s']:.1f} ms, {shares['log_share']:.2%} · save "
        f"{1000 * found['save_s']:.0f} ms, {shares['save_share']:.3%} · validation {found['eval_s']:.2f} s and sample "
        f"{found['sample_s']:.2f} s, {shares['between_share']:.2%} in between, {shares['end_share']:.2%} at the end"
    )
    return figures | {"config": config, "ranks": n_ranks, **found, **shares}


def _values(lines: Sequence[dict[str, Any]], key: str) -> list[float]:
    """A key's values, less that of the first report, whose steps are a start's."""
    found = [float(line[key]) for line in lines if key in line]
    return found[1:] or found


def _shares(settings: Config, found: dict[str, float], lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """See `everyday`."""
    step_s = found["step_s"]
    last = next(line for line in reversed(lines) if "progress/flops" in line)
    row_bytes = settings.train.global_batch_size * settings.data.seq_len
    limit = configuration.step_limit(settings, last["progress/flops"] / (last["step"] * row_bytes))
    ends = [] if limit is None else [limit * step_s]
    ends += [] if settings.train.minutes is None else [60 * settings.train.minutes]
    keep, asked, sample = settings.checkpoint, settings.eval, settings.sample
    save_pauses = [] if keep.every_steps is None else [keep.every_steps * step_s]
    save_pauses += [] if keep.every_minutes is None else [60 * keep.every_minutes]
    between = found["eval_s"] / (asked.every_steps * step_s) if asked.every_steps else 0.0
    between += found["sample_s"] / (sample.every_steps * step_s) if sample.every_steps else 0.0
    at_end_s = found["eval_s"] * _whole(settings) + (found["sample_s"] if sample.at_end else 0.0)
    return {
        "log_share": found["log_s"] / (settings.log.every_steps * step_s),
        "save_share": found["save_s"] / min(save_pauses) if save_pauses else 0.0,
        "between_share": between,
        "end_share": at_end_s / (min(ends) + at_end_s),
    }


def _whole(settings: Config) -> float:
    """How many times what is validated in between the whole split is."""
    limit, split = settings.eval.limit_bytes, settings.data.val_split
    if limit is None:
        return 1.0
    whole = sum(load_manifest(path).splits[split].bytes for _, path in configuration.source_paths(settings))
    return max(1.0, whole / limit)
