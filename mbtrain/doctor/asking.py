"""Every host of a run, asked at once: one process a host, over ssh or here, that answers questions until it is let go.

The processes run the same interpreter in the same folder as this one: that is how a training is started there, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mbtrain.hosts import ssh_command

Answers = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """A host that can be asked: its process, and where that one's stderr goes."""

    process: subprocess.Popen[str]
    errors: IO[str]


def command_on(host: str | None, *, ssh_port: int | None = None) -> list[str]:
    """What answers on a host; None: here, without ssh."""
    asked = [sys.executable, "-u", "-m", "mbtrain.doctor.facts"]
    if host is None:
        return asked
    # As DeepSpeed does: PYTHON* travels, and the folder is the same.
    travelling = [f"{key}={value}" for key, value in os.environ.items() if key.startswith("PYTHON")]
    return ssh_command(host, ["env", "-C", str(Path.cwd()), *travelling, *asked], port=ssh_port)


@contextmanager
def lines(commands: Mapping[str, list[str]]) -> Iterator[dict[str, Line]]:
    """Start a process for each host; at the end let all of them go."""
    opened: dict[str, Line] = {}
    try:
        for host, command in commands.items():
            errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, text=True, errors="replace", start_new_session=True
            )
            opened[host] = Line(process, errors)
        yield opened
    finally:
        for line in opened.values():
            with suppress(OSError):
                line.process.stdin.close()  # type: ignore[union-attr]
        for line in opened.values():
            with suppress(subprocess.TimeoutExpired):
                line.process.wait(5)
            line.process.kill()
            line.process.wait()
            line.process.stdout.close()  # type: ignore[union-attr]
            line.errors.close()


def ask(opened: Mapping[str, Line], questions: Mapping[str, Mapping[str, Any]], limit_s: float) -> Answers:
    """Each host's answer to its question, asked at the same time; {"unreachable": why} of one that gives none.

    A host that has given none in limit_s is let go, and gives none later on.
    """
    with ThreadPoolExecutor(max(1, len(questions))) as pool:
        answers = pool.map(lambda host: _ask(opened[host], questions[host], limit_s), questions)
        return dict(zip(questions, answers, strict=True))


def clock_offsets(opened: Mapping[str, Line], limit_s: float = 10.0, rounds: int = 3) -> Answers:
    """By how much each host's clock is ahead of this one's: {"offset_s", "within_s"}, by its quickest answer."""

    def offset(line: Line) -> dict[str, Any]:
        best: dict[str, Any] = {}
        for _ in range(rounds):
            before = time.time()
            began = time.perf_counter()
            said = _ask(line, {"ask": "clock"}, limit_s)
            took = time.perf_counter() - began
            if "unreachable" in said:
                return said
            if not best or took / 2 < best["within_s"]:
                best = {"offset_s": said["unix_s"] - (before + took / 2), "within_s": took / 2}
        return best

    with ThreadPoolExecutor(max(1, len(opened))) as pool:
        return dict(zip(opened, pool.map(offset, opened.values()), strict=True))


def _ask(line: Line, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
    late = threading.Event()

    def end() -> None:
        late.set()
        line.process.kill()

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        stdin, stdout = line.process.stdin, line.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        for said in stdout:  # a login shell may say something first
            with suppress(ValueError):
                value = json.loads(said)
                if isinstance(value, dict) and isinstance(value.get("answer"), dict):
                    return dict(value["answer"])
                if isinstance(value, dict) and "failed" in value:
                    return {"unreachable": f"could not answer: {value['failed']}"}
    except OSError:  # it has ended, and says below why
        pass
    finally:
        timer.cancel()
    if late.is_set():
        at = [text for text in _said(line) if text.startswith("at: ")]
        return {"unreachable": f"no answer in {limit_s:g} s" + (f" ({at[-1]})" if at else "")}
    with suppress(subprocess.TimeoutExpired):
        line.process.wait(5)
    said_last = [text for text in _said(line) if not text.startswith("at: ")]
    code = line.process.returncode
    return {"unreachable": f"{said_last[-1][:200] if said_last else 'ended'} (exit status {code})", "status": code}


def _said(line: Line) -> list[str]:
    # Not by seek and read: the process writes where this file's one position is.
    content = os.pread(line.errors.fileno(), 1 << 16, max(0, os.fstat(line.errors.fileno()).st_size - (1 << 16)))
    return [text.strip() for text in content.decode("utf-8", "replace").splitlines() if text.strip()]
