"""Real launches of the command line: one process, or several ranks over gloo as a launcher would start them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


class Forked:
    """A process as subprocess.Popen has it, forked where the imports of `mbtrain train` are done: see tests.warm.

    A start then takes 0.2 s of a core in place of 3; everything from the command line on is the same.
    """

    def __init__(self, args: list[str], environment_: dict[str, str], cwd: Path | None):
        self._folder = tempfile.TemporaryDirectory()
        # Daemonic: a rank that a test left waiting for its killed peers does not keep the test run from ending.
        self._process = WARM.Process(target=_forked, args=(args, environment_, cwd, self._folder.name), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        """What it has written to stderr so far."""
        return Path(self._folder.name, "stderr").read_text(errors="replace")

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("mbtrain", timeout or 0.0)
        out, err = (Path(self._folder.name, name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return out, err


WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["tests.warm"])


def _forked(args: list[str], environment_: dict[str, str], cwd: Path | None, folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment_)
    if cwd is not None:
        os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.argv = ["mbtrain", *args]

    from mbtrain.cli import main

    main(args)


def begin(
    args: list[str], ranks: int = 1, cwd: Path | None = None, module: str = "mbtrain"
) -> list[Forked] | list[subprocess.Popen[str]]:
    """Start `python -m MODULE ARGS` on so many ranks."""
    port = str(free_port())
    processes: list[Any] = []
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
        if module == "mbtrain":
            processes.append(Forked(args, environment(**place), cwd))
            continue
        command = [sys.executable, "-m", module, *args]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment(**place), cwd=cwd, **pipes))
    return processes


def end(processes: Sequence[Any], timeout_s: float = 180) -> Ended:
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


def wait_for(happened: Callable[[], Any], processes: Sequence[Any], timeout_s: float = 120) -> None:
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
