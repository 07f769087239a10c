"""Real launches of the command line: one process, or several ranks over gloo as a launcher would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mbtrain import metrics

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a launch ended, rank by rank."""

    codes: list[int]
    stdout: str
    stderr: str


def environment(**extra: str) -> dict[str, str]:
    """This environment without a launcher's variables, one thread a process, the repository importable."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def begin(args: list[str], ranks: int = 1, cwd: Path | None = None) -> list[subprocess.Popen[str]]:
    """Start `python -m mbtrain ARGS` on so many ranks."""
    command = [sys.executable, "-m", "mbtrain", *args]
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = (
            {}
            if ranks == 1
            else {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment(**place), cwd=cwd, **pipes))  # type: ignore[call-overload]
    return processes


def end(processes: list[subprocess.Popen[str]], timeout_s: float = 180) -> Ended:
    """Wait for all ranks."""
    outputs = [process.communicate(timeout=timeout_s) for process in processes]
    codes = [process.returncode for process in processes]
    return Ended(codes, "".join(o for o, _ in outputs), "".join(e for _, e in outputs))


def mbtrain(args: list[str], ranks: int = 1, cwd: Path | None = None, expect: int | None = 0) -> Ended:
    """Run `python -m mbtrain ARGS` to its end; fails the test on another exit status than expected."""
    ended = end(begin(args, ranks, cwd))
    if expect is not None:
        assert all(code == expect for code in ended.codes), f"{ended.codes}\n{ended.stdout}\n{ended.stderr}"
    return ended


def config_file(folder: Path, tree: dict[str, Any]) -> Path:
    """Write a configuration tree as YAML."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> list[float]:
    """train/loss_nats of every step, in order."""
    return [line["train/loss_nats"] for line in metrics.read(run / "metrics.jsonl") if "train/loss_nats" in line]


def wait_for(happened: Callable[[], Any], processes: list[subprocess.Popen[str]], timeout_s: float = 120) -> None:
    """Wait until something has happened; fails when a rank ends before."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        ended = [process.poll() for process in processes]
        assert all(code is None for code in ended), f"ended too early: {ended}\n{end(processes).stderr}"
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def last_json(text: str) -> dict[str, Any]:
    """The JSON object on the last line of stdout."""
    return dict(json.loads(text.strip().splitlines()[-1]))
