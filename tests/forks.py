"""Processes that begin where a fresh interpreter is after its imports, and that can be told at which call to die.

A start of `mbtrain train` spends seconds importing torch and DeepSpeed before its first line of work. Trials that
start it a hundred times fork it from a process that has imported them and done nothing else; from `main` on it is as
ever.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import types
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])

# Audit events of Python that change or open something by its path, and which argument is the path.
_EVENTS = {
    "open": 0,
    "os.rename": 1,
    "os.mkdir": 0,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.link": 1,
    "os.truncate": 0,
    "shutil.rmtree": 0,
}
_CHECKPOINT = re.compile(r"step_\d{10}$")

Program = Literal["mbtrain", "data_prep"]


@dataclass
class Death:
    """When a process kills itself, once it is armed: before its n-th file-system call under `folder`.

    kind   event: any of them; renaming: the rename that gives a checkpoint its name; renamed: the call after that
    peers  process ids that are killed with it, at the same instant
    """

    folder: Path
    kind: Literal["event", "renaming", "renamed"] = "event"
    nth: int = 1
    armed: Any = field(default_factory=lambda: _CONTEXT.RawValue(ctypes.c_int, 0))
    peers: Any = field(default_factory=lambda: _CONTEXT.RawArray(ctypes.c_int, 8))


def start(
    program: Program, argv: list[str], log: Path, environment: dict[str, str], death: Death | None = None
) -> ForkServerProcess:
    """Start `python -m PROGRAM ARGV` in a process group of its own; what it says is added to `log`."""
    process = _CONTEXT.Process(target=_main, args=(program, argv, log, environment, death))
    process.start()
    return process


def _main(program: Program, argv: list[str], log: Path, environment: dict[str, str], death: Death | None) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115  as a launcher gives it
    sys.argv = [program, *argv]
    faulthandler.register(signal.SIGUSR2)  # where it stands, into the log
    if death is not None:
        die_at(death)
    if program == "mbtrain":
        from mbtrain.cli import main
    else:
        from data_prep import build
        from data_prep.cli import main

        # What its workers, which are spawned, else import: the trial that started this.
        sys.modules["__main__"] = types.ModuleType("__main__")
        # Small groups, so that there are many: they have no influence on the bytes.
        build.build.__kwdefaults__["group_bytes"] = int(os.environ.get("GROUP_BYTES", "65536"))
    main(argv)


def die_at(death: Death) -> None:
    """Have this process die so, from now on."""
    folder, left, renamed = str(death.folder), death.nth, False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left, renamed
        at = _EVENTS.get(event)
        if at is None or not death.armed.value or not isinstance(args[at], str | os.PathLike):
            return
        path = os.fspath(args[at])
        if not isinstance(path, str) or not path.startswith(folder):
            return
        naming = event == "os.rename" and _CHECKPOINT.search(path) is not None
        due = {"event": True, "renaming": naming, "renamed": renamed}[death.kind]
        renamed = renamed or naming
        left -= due
        if due and left <= 0:
            for peer in death.peers:
                if peer:
                    _kill(peer)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
