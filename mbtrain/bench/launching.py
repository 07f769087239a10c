"""Real trainings that measurements start: ranks of this machine, by a launcher or without, told to stop at a step."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbtrain import config as configuration
from mbtrain import metrics
from mbtrain.bench import measure
from mbtrain.config import Config
from mbtrain.errors import MbtrainError

LAUNCHERS = ("deepspeed", "torchrun", "none")


@dataclass(frozen=True)
class Trained:
    """When a training was launched, by time.time, and the lines of its metrics.jsonl."""

    launched_s: float
    lines: list[dict[str, Any]]


def trained(
    settings: Config, options: Sequence[str], *, until: int, ranks: int, threads: int, launcher: str = "none"
) -> Trained:
    """Train by these settings and further --section.key=value until metrics.jsonl has step `until`, then stop it.

    The run, and MLflow's store where it is tracked, are in a temporary folder. Raises MbtrainError where the training
    ends before.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run, path = Path(folder) / "run", Path(folder) / "config.yaml"
        path.write_text(configuration.to_yaml(settings), encoding="utf-8")
        given = [str(path), f"--run={run}", f"--log.mlflow_uri=sqlite:///{folder}/mlflow.db", *options]
        given += ["--train.minutes=null", "--train.steps=1000000"]  # it is told to stop, which spares the whole split
        launched_s = time.time()
        with (Path(folder) / "stderr").open("ab") as errors:
            processes = [
                subprocess.Popen(command, env=env, stdout=errors, stderr=errors)
                for command, env in _commands(launcher, given, ranks, threads)
            ]
        try:
            while ((metrics.last(run / "metrics.jsonl") or {}).get("step", 0)) < until:
                if any(process.poll() is not None for process in processes):
                    said = (Path(folder) / "stderr").read_text(encoding="utf-8", errors="replace").strip()
                    last = said.splitlines()[-1] if said else "nothing on stderr"
                    raise MbtrainError(f"bench: the training ended early: {last}")
                time.sleep(0.1)
        finally:
            with suppress(OSError):  # where there is no run yet, none of them is left either
                (run / "stop").touch()
            for process in processes:
                process.wait()
        return Trained(launched_s, metrics.read(run / "metrics.jsonl"))


def _commands(launcher: str, given: list[str], ranks: int, threads: int) -> list[tuple[list[str], dict[str, str]]]:
    """What to start, with which environment: one launcher, or each rank itself."""
    train = ["mbtrain", "train", *given]
    port = measure.free_port()
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = {**kept, "OMP_NUM_THREADS": str(threads)}
    if launcher == "deepspeed":
        options = [f"--num_gpus={ranks}", f"--master_port={port}", "--log_level=error", "--module"]
        return [
            ([sys.executable, "-m", "deepspeed.launcher.runner", *options, *train], {"DS_ACCELERATOR": "cpu", **env})
        ]
    if launcher == "torchrun":
        options = [f"--nproc-per-node={ranks}", f"--master-port={port}", "-m", "mbtrain", "--"]
        return [([sys.executable, "-m", "torch.distributed.run", *options, *train[1:]], env)]
    command = [sys.executable, "-m", *train]
    if ranks == 1:
        return [(command, env)]
    return [(command, {**env, **place}) for place in measure.places(ranks)]
