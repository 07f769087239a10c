"""`mbtrain bench saving`: what checkpoints cost a training that goes on while they are written."""

from __future__ import annotations

import statistics
from typing import Any

from mbtrain.bench import measure
from mbtrain.bench.launching import trained
from mbtrain.command import no_unknown, number
from mbtrain.config import Config

_WARM_UP = 3  # steps at the start of each training that do not count


def saving(
    *,
    config: str = "configs/bench/overhead.yaml",
    data: str = "shards/stdlib",
    every: str = "5",
    saves: str = "5",
    rounds: str = "2",
    ranks: str = "2",
    threads: str = "1",
    **unknown: str,
) -> dict[str, Any]:
    """Real trainings of --ranks ranks on this machine, in turn without checkpoints and with one --every so many steps.

    wait_s      what a step waits for a checkpoint: the copy to memory before it is written, and its naming afterwards
    wait_share  that, for each checkpoint, as a share of the median step without checkpoints
    slower      how much longer all steps took, waits included: the writing threads share the cores with the training
    Raises ConfigError for options that do not fit, MbtrainError when a training fails.
    """
    no_unknown(saving, unknown)
    n_every, n_saves = number("--every", every, int, 1), number("--saves", saves, int, 1)
    n_rounds, n_ranks = number("--rounds", rounds, int, 1), number("--ranks", ranks, int, 1)
    n_threads = number("--threads", threads, int, 1)
    n_steps = _WARM_UP + n_every * n_saves
    settings = measure.settings_of(config, data, train__steps=str(n_steps + 1), train__minutes="null")
    figures = measure.machine(n_threads)
    bare: list[float] = []
    with_saves: list[float] = []
    waits: list[float] = []
    for _ in range(n_rounds):
        bare += _steps(settings, None, n_ranks, n_threads)[0]
        steps, waited = _steps(settings, n_every, n_ranks, n_threads)
        with_saves += steps
        waits.append(sum(waited) / n_saves)
    step_s, wait_s = statistics.median(bare), statistics.median(waits)
    slower = (statistics.mean(with_saves) + wait_s / n_every) / statistics.mean(bare) - 1
    found = {
        "step_s": step_s,
        "wait_s": wait_s,
        "wait_share": wait_s / step_s,
        "slower": slower,
        "slower_a_save_s": slower * statistics.mean(bare) * n_every,
    }
    measure.say(
        f"a step {step_s:.3f} s · waits {1000 * wait_s:.1f} ms a checkpoint, {wait_s / step_s:.1%} of a step · "
        f"all steps with one every {n_every}: {slower:+.1%}"
    )
    return figures | {"config": config, "every": n_every, "ranks": n_ranks, **found}


def _steps(settings: Config, every: int | None, ranks: int, threads: int) -> tuple[list[float], list[float]]:
    """Seconds of each step after the warm-up, without waits; and the waits for checkpoints."""
    options = ["--checkpoint.every_minutes=null", "--log.every_steps=1", "--log.mlflow=false"]
    options += [f"--checkpoint.every_steps={every or 'null'}"]
    wanted = settings.train.steps or 0
    lines = trained(settings, options, until=wanted, ranks=ranks, threads=threads).lines
    lines = [line for line in lines if "perf/step_s" in line]
    counted = [line for line in lines if _WARM_UP < line["step"] < wanted]
    return [line["perf/step_s"] for line in counted], [line.get("perf/save_wait_s", 0.0) for line in counted]
