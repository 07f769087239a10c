"""The ranks of `step`, started as a training's are: by deepspeed on the hosts of a hostfile, else here, one by one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from mbtrain import redact
from mbtrain.doctor.step_request import MARK, encoded

# As launch/multinode.sh has it: an assignment that DeepSpeed can write into a line for the hosts' shells as it is.
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[][A-Za-z0-9_@%+=:,./ ~-]*")
_TRAVELS = re.compile(r"OMP_NUM_THREADS|DS_ACCELERATOR|(GLOO|NCCL)_\w+")
_SECRET = re.compile(r"(PASSWORD|TOKEN|SECRET|KEY|CREDENTIALS?)$")
_AFTER_A_FAILURE_S = 15.0  # in which the other ranks may say what they know


def travelling() -> dict[str, str]:
    """The variables that ranks on other hosts get: some of this environment, and the lines of .deepspeed_env."""
    found = {key: value for key, value in os.environ.items() if _TRAVELS.fullmatch(key)}
    given = os.environ.get("DS_ENV_FILE")
    for path in [Path(given)] if given else [Path.home() / ".deepspeed_env", Path(".deepspeed_env")]:
        with suppress(OSError, UnicodeDecodeError):
            lines = path.read_text(encoding="utf-8").splitlines()
            found |= dict(line.strip().split("=", 1) for line in lines if _ASSIGNMENT.fullmatch(line.strip()))
    kept = (f"{key}={value}" for key, value in found.items() if not _SECRET.search(key))
    return dict(line.split("=", 1) for line in kept if _ASSIGNMENT.fullmatch(line) and "%" not in line)


def run(
    request: Mapping[str, Any],
    ranks: int,
    *,
    hostfile: str | None,
    master: str,
    port: int,
    ssh_port: int | None = None,
) -> dict[str, Any]:
    """Run the ranks to their end: {"sums", "ranks", "command"}, or {"said", "command"} of what went wrong.

    Nothing of them is left here when this returns; on other hosts they end by themselves after request["limit_s"].
    """
    argument = encoded(dict(request))
    shown = ["python", "-m", "mbtrain.doctor.step", argument]
    # MLFLOW*, which may hold a password, would travel on a command line; no step needs it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    with ExitStack() as stack:
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        if hostfile is None:
            starts = [(_here(environment, rank, ranks, port), [sys.executable, *shown[1:]]) for rank in range(ranks)]
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "env").write_text("".join(f"{k}={v}\n" for k, v in travelling().items()), encoding="utf-8")
            environment["DS_ENV_FILE"] = str(folder / "env")
            patience = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
            environment["PDSH_SSH_ARGS_APPEND"] = f"{patience} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
            options = [f"--hostfile={hostfile}", "--launcher=pdsh", "--force_multi", "--no_local_rank"]
            options += ["--log_level=critical", f"--master_addr={master}", f"--master_port={port}"]
            options += [] if ssh_port is None else [f"--ssh_port={ssh_port}"]
            shown = ["deepspeed", *options, "--module", "mbtrain.doctor.step", argument]
            starts = [(environment, [sys.executable, "-m", "deepspeed.launcher.runner", *shown[1:]])]
        said = _finished(starts, out, err, float(request["limit_s"]) + 30)
        figures = _figures(_content(out))
        if not said and len(figures.get("ranks", [])) == 0:
            said = "the ranks ended without a figure"
        if said:
            told = redact.one_line(_telling(_content(err)) or _telling(_content(out)), 500)
            return {"said": f"{said}{f': {told}' if told else ''}", "command": " ".join(shown)}
        return figures | {"command": " ".join(shown)}


def missing_launcher() -> str:
    """What stands in the way of starting ranks on other hosts from here, or nothing."""
    return "" if shutil.which("pdsh") else "pdsh is not there"


def _here(environment: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {**environment, **{key: str(value) for key, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}


def _finished(
    starts: Sequence[tuple[dict[str, str], list[str]]], out: IO[bytes], err: IO[bytes], limit_s: float
) -> str:
    """Wait for processes to end; what was wrong with them, or nothing. None is left."""
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + limit_s
    try:
        for environment, command in starts:
            quiet = subprocess.DEVNULL
            # A session of their own: with the launcher end its pdsh and ssh.
            processes.append(
                subprocess.Popen(command, env=environment, stdin=quiet, stdout=out, stderr=err, start_new_session=True)
            )
        first_failure: float | None = None
        while any(process.poll() is None for process in processes):
            now = time.monotonic()
            if first_failure is None and any(process.poll() for process in processes):
                first_failure = now
            if now > deadline or (first_failure is not None and now > first_failure + _AFTER_A_FAILURE_S):
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    if failed:
        who = f"rank {failed[0][0]}" if len(processes) > 1 else "they"
        code = failed[0][1]
        return f"{who} ended with {f'signal {-code}' if code < 0 else f'exit status {code}'}"
    return f"not done in {limit_s:.0f} s" if None in codes else ""


def _figures(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {"ranks": []}
    for line in text.splitlines():
        _, mark, content = line.partition(MARK)  # pdsh puts the host's name before it
        if mark:
            with suppress(ValueError):
                value = json.loads(content)
                if value.pop("kind") == "sums":
                    found["sums"] = value
                else:
                    found["ranks"].append(value)
    return found


def _telling(text: str) -> str:
    """The line that says most about what went wrong: an error's, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and MARK not in line]
    errors = [line for line in lines if re.search(r"[a-z]Error\b|\berror:|expected|refused|not found|No route", line)]
    return (errors or lines or [""])[-1]


def _content(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), 1 << 22, 0).decode("utf-8", "replace")
