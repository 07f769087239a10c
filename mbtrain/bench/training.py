"""`mbtrain bench train`: bytes per second of a training step, ours against the peer's, in the same shape."""

from __future__ import annotations

import functools
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbtrain.bench import measure
from mbtrain.command import no_unknown, number
from mbtrain.errors import ConfigError


def train(
    *,
    config: str = "configs/bench/small.yaml",
    peer: str = "",
    rounds: str = "5",
    steps: str = "4",
    threads: str = "1",
    ranks: str = "1",
    data: str = "",
    **unknown: str,
) -> dict[str, Any]:
    """Training speed with the same widths, depths, patches, rows, bytes and threads, in interleaved rounds of steps.

    engine  our model under DeepSpeed, as `mbtrain train` runs it (precision and ZeRO stage of the configuration)
    ranks   the same, as so many ranks that share the threads, where --ranks asks for more than one
    bare    our model in a plain loop: what the engine costs is the difference
    peer    MEGABYTE-pytorch as shipped: fp32, flash_attn=True, Adam, clipping at 0.5; no accumulation in a step

    Each stands in a process of its own and idles while another works. The models correspond but are not the same: the
    peer's attention is equally wide in all stages (as our coarsest, 512 at most) and it runs n + 1 positions a patch;
    ours is d_model wide and runs n. So parameters and operations per byte are given for both; each MFU is by a
    side's own useful operations and the peak of its own precision. bytes_per_s is by the clock, bytes_per_cpu_s by
    CPU time of the process; medians. The peaks are the best of products that are timed once a round, too.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(train, unknown)
    n_rounds, n_steps = number("--rounds", rounds, int, 1), number("--steps", steps, int, 1)
    n_threads = number("--threads", threads, int, 1)
    n_ranks = number("--ranks", ranks, int, 1)
    if n_threads % n_ranks:
        raise ConfigError(f"--ranks={ranks}: expected a divisor of --threads={threads}, which the ranks share")
    settings = measure.settings_of(config, data)
    python = measure.find_peer(peer)
    peer_counted = measure.peer_count(settings) if python else None

    from mbtrain.model.flops import count

    counted = count(settings)
    step_bytes = settings.train.global_batch_size * settings.data.seq_len
    figures = measure.machine(n_threads)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        measure.write_rows(settings, folder, step_bytes * n_steps * (n_rounds + 1))
        asks = {
            mode: stack.enter_context(measure.own_worker(settings, mode, folder, n_threads))
            for mode in ("engine", "bare")
        }
        if python:
            asks["peer"] = stack.enter_context(measure.peer_process(python, settings, folder, n_threads))
            figures["peer_shape"] = measure.peer_shape(settings)
            figures["peer_parameters"] = asks["peer"]("describe")["parameters"]
        if n_ranks > 1:
            asks["ranks"] = stack.enter_context(measure.own_ranks(settings, n_ranks, folder, n_threads // n_ranks))
        parts = {mode: functools.partial(ask, "steps", n=n_steps) for mode, ask in asks.items()}
        parts["peak"] = functools.partial(asks["bare"], "peaks")
        answers = measure.interleave(parts, n_rounds)
    peaks = {precision: max(a[precision] for a in answers["peak"]) for precision in ("bf16", "fp32")}
    del answers["peak"]
    sides = {mode: measure.rates(of, step_bytes * n_steps) for mode, of in answers.items()}

    speed = {mode: side["bytes_per_s"]["median"] for mode, side in sides.items()}
    cpu_speed = {mode: side["bytes_per_cpu_s"]["median"] for mode, side in sides.items()}
    own_peak = peaks["fp32" if settings.train.precision == "fp32" else "bf16"]
    figures |= {
        "config": config,
        "rounds": n_rounds,
        "steps_per_round": n_steps,
        "precision": settings.train.precision,
        "bytes_per_s": speed["engine"],
        "peer_bytes_per_s": speed.get("peer"),
        "ratio": speed["engine"] / speed["peer"] if python else None,
        "ratio_by_cpu_time": cpu_speed["engine"] / cpu_speed["peer"] if python else None,
        "bare_bytes_per_s": speed["bare"],
        "sides": sides,
        "parameters": counted.parameters,
        "training_flops_per_byte": counted.training_per_byte,
        "peak_flops": peaks,
        "mfu": speed["engine"] * counted.training_per_byte / own_peak,
        "ranks": n_ranks,
        "ranks_bytes_per_s": speed.get("ranks"),
        "ranks_mfu": speed["ranks"] * counted.training_per_byte / own_peak if n_ranks > 1 else None,
        "bare_mfu": speed["bare"] * counted.training_per_byte / own_peak,
    }
    if peer_counted:
        figures |= {
            "peer_training_flops_per_byte": peer_counted.training_per_byte,
            "peer_executed_flops_per_byte": peer_counted.executed_per_byte,
            "peer_mfu": speed["peer"] * peer_counted.training_per_byte / peaks["fp32"],
            # What is left of the ratio when each side's speed is in useful operations, not in bytes.
            "ratio_by_flops": speed["engine"]
            * counted.training_per_byte
            / speed["peer"]
            / peer_counted.training_per_byte,
        }
    return figures
