"""`mbtrain bench start`: what a person waits for: the help, and the first step of a run after its launch."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from mbtrain.bench import measure
from mbtrain.bench.launching import LAUNCHERS, Trained, trained
from mbtrain.command import no_unknown, number
from mbtrain.errors import ConfigError

_HELP_ROUNDS = 5  # for each of --rounds: they take 0.05 s


def start(
    *,
    config: str = "configs/quickstart.yaml",
    data: str = "shards/stdlib",
    launcher: str = "deepspeed",
    ranks: str = "2",
    rounds: str = "3",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """`mbtrain --help`, and trainings of --ranks ranks by each --launcher in turn, stopped after their first step.

    help_s, help_cpu_s   of `python -m mbtrain --help`
    by_launcher          of each: first_step_s from the launch to the end of the first step, its parts (launcher, then
                         those of rank 0, startup.py) and rank 0's cpu_s until then; medians of --rounds, after one
                         round that does not count
    Raises ConfigError for options that do not fit, MbtrainError when a training fails.
    """
    no_unknown(start, unknown)
    n_ranks, n_rounds = number("--ranks", ranks, int, 1), number("--rounds", rounds, int, 1)
    n_threads, names = number("--threads", threads, int, 1), launcher.split(",")
    if any(name not in LAUNCHERS for name in names):
        raise ConfigError(f"--launcher: expected some of {', '.join(LAUNCHERS)}, got {launcher!r}")
    settings = measure.settings_of(config, data, log__every_steps="1")
    figures = measure.machine(n_threads)
    helps = [_help() for _ in range(1 + _HELP_ROUNDS * n_rounds)][1:]
    help_s, help_cpu_s = (statistics.median(column) for column in zip(*helps, strict=True))
    measure.say(f"mbtrain --help: {help_s:.3f} s, {help_cpu_s:.3f} CPU seconds")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number_ in range(n_rounds + 1):
        for name in names:
            one = _parts(trained(settings, [], until=1, ranks=n_ranks, threads=n_threads, launcher=name))
            if number_:
                found[name].append(one)
                parts = " · ".join(f"{part} {seconds:.2f}" for part, seconds in one.items() if part != "first_step_s")
                measure.say(f"round {number_}/{n_rounds} · {name}: {one['first_step_s']:.2f} s ({parts})")
    by_launcher = {
        name: {part: statistics.median(one[part] for one in all_) for part in all_[0]} for name, all_ in found.items()
    }
    first = by_launcher[names[0]]["first_step_s"]
    return figures | {
        "config": config,
        "ranks": n_ranks,
        "help_s": help_s,
        "help_cpu_s": help_cpu_s,
        "first_step_s": first,
        "by_launcher": by_launcher,
    }


def _help() -> tuple[float, float]:
    """Seconds and CPU seconds of a call."""
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "mbtrain", "--help"], stdout=subprocess.DEVNULL, check=True)
    took_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _parts(one: Trained) -> dict[str, float]:
    """Of a training's first line, written at its first step: seconds since the launch, and where they went."""
    line = next(line for line in one.lines if "start/in_all_s" in line)
    first_step_s = line["time_unix_s"] - one.launched_s
    parts = {key.removeprefix("start/"): value for key, value in line.items() if key.startswith("start/")}
    in_all_s = parts.pop("in_all_s")
    return {"first_step_s": first_step_s, "launcher_s": first_step_s - in_all_s, **parts}
