"""`mbtrain bench deepspeed`: what the engine adds to a step, against the same step in a bare torch loop."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number


def deepspeed(
    *,
    config: str = "configs/bench/overhead.yaml",
    rounds: str = "5",
    steps: str = "1",
    threads: str = "1",
    zero_stage: str = "1",
    precisions: str = "bf16,fp32",
    **unknown: str,
) -> dict[str, Any]:
    """Seconds of an optimizer step under DeepSpeed (ZeRO, checks, sums over ranks) and in a bare loop, interleaved.

    Both update alike: bf16 weights with fp32 masters (or fp32), fused AdamW, clipping, one rank. Random bytes. Medians
    by CPU time of the process over all rounds, so that other work on the machine hardly counts; by the clock as well.
    overhead_frac is the first precision's. Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(deepspeed, unknown)
    n_rounds, n_steps = number("--rounds", rounds, int, 1), number("--steps", steps, int, 1)
    n_threads = number("--threads", threads, int, 1)
    figures = measure.machine(n_threads)
    found: dict[str, dict[str, Any]] = {}
    for precision in precisions.split(","):
        settings = measure.settings_of(config, "", train__precision=precision, train__zero_stage=zero_stage)
        step_bytes = settings.train.global_batch_size * settings.data.seq_len
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            folder = Path(name)
            np.random.default_rng(0).integers(0, 256, 4 * step_bytes, np.uint8).tofile(folder / "train.bytes")
            asks = {
                mode: stack.enter_context(measure.own_worker(settings, mode, folder, n_threads))
                for mode in ("bare", "engine")
            }
            parts = {mode: (lambda ask=ask: ask("steps", n=n_steps)) for mode, ask in asks.items()}
            answers = measure.interleave(parts, n_rounds)
        cpu = {mode: measure.spread([a["cpu_s"] / n_steps for a in of]) for mode, of in answers.items()}
        wall = {mode: measure.spread([a["wall_s"] / n_steps for a in of]) for mode, of in answers.items()}
        found[precision] = {
            "bare_step_s": cpu["bare"]["median"],
            "engine_step_s": cpu["engine"]["median"],
            "overhead_frac": cpu["engine"]["median"] / cpu["bare"]["median"] - 1,
            "overhead_frac_by_wall": wall["engine"]["median"] / wall["bare"]["median"] - 1,
            "cpu_s": cpu,
            "wall_s": wall,
            "bytes_per_s": step_bytes / wall["engine"]["median"],
        }
    first = next(iter(found.values()))
    keys = ("bare_step_s", "engine_step_s", "overhead_frac", "bytes_per_s")
    return figures | {"config": config, **{key: first[key] for key in keys}, "by_precision": found}
