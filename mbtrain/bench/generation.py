"""`mbtrain bench generate`: bytes per second of generation from nothing, ours against the peer's."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbtrain.bench import measure
from mbtrain.bench.measure import Ask
from mbtrain.command import no_unknown, number

BATCH = 32


def generate(
    *,
    config: str = "configs/bench/small.yaml",
    peer: str = "",
    bytes: str = "",
    peer_bytes: str = "",
    rounds: str = "3",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """Generation speed in fp32 from nothing, of one row of seq_len bytes and of 32 rows; fresh weights.

    Ours goes through sample.generate with a state per stage. The peer's generate() runs the whole model again for every
    byte and always fills a whole row; it is run once, whole (most of a minute for 1,024 bytes). --peer-bytes=N
    cuts that short: the time of single forward passes at N lengths is integrated over the row instead, and the answer
    says so (peer_integrated). The peer's 32 rows are always integrated: they would take half an hour.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(generate, unknown)
    n_rounds, n_threads = number("--rounds", rounds, int, 1), number("--threads", threads, int, 1)
    settings = measure.settings_of(config, "")
    seq_len = settings.data.seq_len
    n_bytes = number("--bytes", bytes or str(seq_len), int, 1)
    lengths = number("--peer-bytes", peer_bytes or "0", int, 0)
    python = measure.find_peer(peer)
    figures = measure.machine(n_threads)
    peer_speed = peer_batch_speed = None
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        own = stack.enter_context(measure.own_worker(settings, "generate", folder, n_threads))
        own("generate", rows=1, n_bytes=64)
        one = [own("generate", rows=1, n_bytes=n_bytes) for _ in range(n_rounds)]
        many = [own("generate", rows=BATCH, n_bytes=n_bytes) for _ in range(n_rounds)]
        if python:
            theirs = stack.enter_context(measure.peer_process(python, settings, folder, n_threads))
            theirs("forward", rows=1, length=seq_len)
            if lengths:
                peer_speed = seq_len / _integrated(theirs, 1, seq_len, lengths)
            else:
                whole = theirs("generate", rows=1)
                peer_speed = whole["bytes"] / whole["wall_s"]
                figures["peer_bytes_per_cpu_s"] = whole["bytes"] / whole["cpu_s"]
            peer_batch_speed = BATCH * seq_len / _integrated(theirs, BATCH, seq_len, max(lengths, 4))
    single, batch = measure.rates(one, n_bytes), measure.rates(many, BATCH * n_bytes)
    speed, batch_speed = single["bytes_per_s"]["median"], batch["bytes_per_s"]["median"]
    return figures | {
        "config": config,
        "bytes": n_bytes,
        "bytes_per_s": speed,
        "peer_bytes_per_s": peer_speed,
        "ratio": speed / peer_speed if peer_speed else None,
        "peer_integrated": bool(lengths) if python else None,
        "batch": BATCH,
        "batch_bytes_per_s": batch_speed,
        "peer_batch_bytes_per_s": peer_batch_speed,
        "batch_ratio": batch_speed / peer_batch_speed if peer_batch_speed else None,
        "sides": {"one": single, "batch": batch},
    }


def sample_lengths(seq_len: int, count: int) -> list[int]:
    """`count` lengths at least two, from the shortest row to the whole one, evenly."""
    steps = max(count, 2) - 1
    return sorted({max(1, round(i * seq_len / steps)) for i in range(steps + 1)})


def integrate(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The sum of a piecewise linear function (seconds at lengths) over the lengths, by the trapezoid rule."""
    ends = list(zip(lengths, seconds, strict=True))
    return sum((b - a) * (s + t) / 2 for (a, s), (b, t) in itertools.pairwise(ends))


def _integrated(theirs: Ask, rows: int, seq_len: int, count: int) -> float:
    """Seconds of the clock that the peer would take for rows of seq_len bytes."""
    lengths = sample_lengths(seq_len, count)
    return integrate(lengths, [theirs("forward", rows=rows, length=length)["wall_s"] for length in lengths])
