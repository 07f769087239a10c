"""`mbtrain bench generate`: bytes per second of generation from nothing, ours against the peer's."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mbtrain.bench import measure
from mbtrain.bench.measure import Ask
from mbtrain.command import no_unknown, number


def generate(
    *,
    config: str = "configs/bench/small.yaml",
    peer: str = "",
    bytes: str = "",
    peer_bytes: str = "",
    batch: str = "32",
    prompt_bytes: str = "0",
    rounds: str = "3",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """Generation speed in fp32 from nothing, of one row of seq_len bytes and of --batch rows; fresh weights.

    Ours goes through sample.generate with a state per stage. The peer's generate() runs the whole model again for every
    byte and always fills a whole row: most of a minute for 1,024 bytes, once a round, in turn with ours. --peer-bytes=N
    cuts that short: the time of single forward passes at N lengths is integrated over the row instead, and the answer
    says so (peer_integrated). The peer's batch is always integrated, once: it would take half an hour.
    --prompt-bytes=N also measures the time to the first byte after such a prompt, in rows long enough to see all of it:
    the next power of two. Ratios are of medians, by the clock and (cpu_*) by CPU seconds of all threads.
    Raises ConfigError for options and configurations that do not fit.
    """
    no_unknown(generate, unknown)
    n_rounds, n_threads = number("--rounds", rounds, int, 1), number("--threads", threads, int, 1)
    n_rows, n_prompt = number("--batch", batch, int, 1), number("--prompt-bytes", prompt_bytes, int, 0)
    settings = measure.settings_of(config, "")
    seq_len = settings.data.seq_len
    n_bytes = number("--bytes", bytes or str(seq_len), int, 1)
    lengths = number("--peer-bytes", peer_bytes or "0", int, 0)
    python = measure.find_peer(peer)
    figures = measure.machine(n_threads)
    answers: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        own = stack.enter_context(measure.own_worker(settings, "generate", folder, n_threads))
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "one": lambda: own("generate", rows=1, n_bytes=n_bytes),
            "batch": lambda: own("generate", rows=n_rows, n_bytes=n_bytes),
        }
        own("generate", rows=1, n_bytes=64)
        if n_prompt:
            long = measure.settings_of(config, "", data__seq_len=str(1 << n_prompt.bit_length()))
            reading = stack.enter_context(measure.own_worker(long, "generate", folder, n_threads))
            parts["prompt"] = lambda: reading("first_byte", prompt_bytes=n_prompt)
            reading("first_byte", prompt_bytes=64)
        if python:
            theirs = stack.enter_context(measure.peer_process(python, settings, folder, n_threads))
            theirs("forward", rows=1, length=seq_len)
            parts["peer"] = lambda: _integrated(theirs, 1, seq_len, lengths) if lengths else theirs("generate", rows=1)
        for turn in range(n_rounds):
            for name, call in parts.items():
                answers.setdefault(name, []).append(call())
                measure.say(f"round {turn + 1}/{n_rounds} · {name}: {answers[name][-1]['cpu_s']:.2f} CPU seconds")
        if python:
            answers["peer_batch"] = [_integrated(theirs, n_rows, seq_len, max(lengths, 4))]
    made = {"one": n_bytes, "batch": n_rows * n_bytes, "peer": seq_len, "peer_batch": n_rows * seq_len}
    sides = {name: measure.rates(answers[name], count) for name, count in made.items() if name in answers}

    def speed(name: str, by: str = "bytes_per_s") -> float | None:
        return sides[name][by]["median"] if name in sides else None

    def ratio(name: str, other: str, by: str = "bytes_per_s") -> float | None:
        ours, others = speed(name, by), speed(other, by)
        return ours / others if ours and others else None

    first = {
        key: measure.spread([answer[key] for answer in answers.get("prompt", [])])
        for key in ("wall_s", "cpu_s")
        if n_prompt
    }
    return figures | {
        "config": config,
        "bytes": n_bytes,
        "compiled": answers["one"][0]["compiled"],
        "bytes_per_s": speed("one"),
        "peer_bytes_per_s": speed("peer"),
        "ratio": ratio("one", "peer"),
        "cpu_ratio": ratio("one", "peer", "bytes_per_cpu_s"),
        "peer_integrated": bool(lengths) if python else None,
        "batch": n_rows,
        "batch_bytes_per_s": speed("batch"),
        "batch_gain": ratio("batch", "one"),
        "peer_batch_bytes_per_s": speed("peer_batch"),
        "batch_ratio": ratio("batch", "peer_batch"),
        "prompt_bytes": n_prompt,
        "first_byte_s": first["wall_s"]["median"] if first else None,
        "first_byte_cpu_s": first["cpu_s"]["median"] if first else None,
        "sides": sides | ({"prompt": first} if first else {}),
    }


def sample_lengths(seq_len: int, count: int) -> list[int]:
    """`count` lengths at least two, from the shortest row to the whole one, evenly."""
    steps = max(count, 2) - 1
    return sorted({max(1, round(i * seq_len / steps)) for i in range(steps + 1)})


def integrate(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The sum of a piecewise linear function (seconds at lengths) over the lengths, by the trapezoid rule."""
    ends = list(zip(lengths, seconds, strict=True))
    return sum((b - a) * (s + t) / 2 for (a, s), (b, t) in itertools.pairwise(ends))


def _integrated(theirs: Ask, rows: int, seq_len: int, count: int) -> dict[str, float]:
    """Seconds, of the clock and of CPU time, that the peer would take for rows of seq_len bytes."""
    lengths = sample_lengths(seq_len, count)
    passes = [theirs("forward", rows=rows, length=length) for length in lengths]
    return {key: integrate(lengths, [each[key] for each in passes]) for key in ("wall_s", "cpu_s")}
