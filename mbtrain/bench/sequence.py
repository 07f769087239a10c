"""`mbtrain bench sequence`: memory and time of one long row, shared by 1, 2, 4 ranks over gloo."""

from __future__ import annotations

import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbtrain import config as configuration
from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.config import Config
from mbtrain.errors import ConfigError

_MB = 1e6


def sequence(
    *,
    config: str = "configs/bench/sequence.yaml",
    seq: str = "65536",
    ranks: str = "1,2,4",
    steps: str = "2",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """Forward and backward of one row of --seq random bytes, in fp32, on so many ranks of this machine in turn.

    Of each rank: the most memory in the first step over what it held before (weights and gradients are made by then),
    by the kernel, and by torch the bytes of the tensors that forward keeps for backward. Of the row: loss, norm of the
    gradients summed over ranks, and the median seconds of the later --steps. Ranks above the number of cores share
    them, so seconds compare only up to there. No optimizer: see `mbtrain bench deepspeed`.
    Raises ConfigError for options and configurations that do not fit, MbtrainError when a rank ends early.
    """
    no_unknown(sequence, unknown)
    n_steps, n_threads = number("--steps", steps, int, 1), number("--threads", threads, int, 1)
    counts = [number("--ranks", count, int, 1) for count in ranks.split(",")]
    figures = measure.machine(n_threads)
    found: dict[str, dict[str, Any]] = {}
    for count in counts:
        settings = measure.settings_of(
            config, "", data__seq_len=seq, train__sequence_parallel=str(count), train__precision="fp32"
        )
        found[str(count)] = _on(count, settings, n_steps, n_threads)
        measure.say(_line(count, found[str(count)]))
    first = found[str(counts[0])]
    return figures | {
        "config": config,
        "seq": int(seq),
        "peak_bytes": {count: one["peak_bytes"] for count, one in found.items()},
        "peak_share": {count: one["peak_bytes"] / first["peak_bytes"] for count, one in found.items()},
        "kept_share": {count: one["kept_bytes"] / first["kept_bytes"] for count, one in found.items()},
        "loss_difference": max(abs(one["loss_nats"] / first["loss_nats"] - 1) for one in found.values()),
        "grad_norm_difference": max(abs(one["grad_norm"] / first["grad_norm"] - 1) for one in found.values()),
        "by_ranks": found,
    }


def _on(count: int, settings: Config, steps: int, threads: int) -> dict[str, Any]:
    """Measure so many ranks together."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "config.yaml"
        path.write_text(configuration.to_yaml(settings), encoding="utf-8")
        command = [sys.executable, "-m", "mbtrain.bench.sharing", str(path)]
        asks = [
            stack.enter_context(measure.worker(command, f"rank {place['RANK']}", threads, **place))
            for place in measure.places(count)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(count))

        def all_ranks(do: str) -> list[dict[str, Any]]:
            return list(pool.map(lambda ask: ask(do), asks))

        joined, first = all_ranks("join"), all_ranks("step")
        if any(a["most_bytes"] <= before["most_bytes"] for before, a in zip(joined, first, strict=True)):
            seq = settings.data.seq_len
            raise ConfigError(f"--seq={seq}: got a row that takes less memory than starting up, expected a longer one")
        later = [all_ranks("step") for _ in range(steps)]
        kept = all_ranks("kept")
    peaks = [answer["most_bytes"] - answer["base_bytes"] for answer in first]
    return {
        "peak_bytes": max(peaks),
        "peak_bytes_of_each": peaks,
        "kept_bytes": max(answer["kept_bytes"] for answer in kept),
        "base_bytes": max(answer["base_bytes"] for answer in first),
        "step_s": statistics.median(max(answer["step_s"] for answer in answers) for answers in later),
        "loss_nats": first[0]["loss_nats"],
        "grad_norm": first[0]["grad_norm"],
    }


def _line(count: int, one: dict[str, Any]) -> str:
    each = " ".join(f"{peak / _MB:,.0f}" for peak in one["peak_bytes_of_each"])
    return (
        f"{count} rank{'s' if count > 1 else ''} · {each} MB over {one['base_bytes'] / _MB:,.0f} MB before, "
        f"{one['kept_bytes'] / _MB:,.0f} MB kept for backward · "
        f"{one['step_s']:.2f} s a step · loss {one['loss_nats']:.7f} · gradient {one['grad_norm']:.7f}"
    )
