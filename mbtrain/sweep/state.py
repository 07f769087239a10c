"""How the trials of a sweep's folder stand, and the locks by which several runners share the folder.

    RUN/.trial.lock    held by the process that trains the trial, so that it is at work in no other
    RUN/trial.json     {"status": "diverged" | "failed" | "crashed", "reason", "crashes"}; not there where all is well
    RUN/status.json    FINISHED once the run is whole (session.py)

A trial is finished, diverged or failed (then nothing is done with it any more), running (its lock is held), stopped
(begun and not at its end: it goes on from its last checkpoint) or waiting.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mbtrain import metrics
from mbtrain.errors import ConfigError, DataError
from mbtrain.redact import redact
from mbtrain.shards import whole_file
from mbtrain.sweep import spec as specs
from mbtrain.sweep.trial import Trial

OVER = ("finished", "diverged", "failed")
MOST_CRASHES = 2  # a trial that was killed from outside, or ran out of memory, is tried once more
TRIES, TRY_PAUSE_S = 20, 0.05  # to get a lock that only those hold who look at a trial
LOCK = ".trial.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def trials(folder: Path | str) -> list[Trial]:
    """The trials of a sweep's folder, in the order in which they are run.

    Raises ConfigError if the folder is none of a sweep.
    """
    folder = Path(folder)
    if not (folder / "sweep.yaml").is_file():
        raise ConfigError(f"{folder}: expected the folder of a sweep, found no sweep.yaml in it")
    found = []
    for planned in specs.planned(specs.read(folder)):
        run = run_of(folder, planned.name)
        found.append(Trial(planned.name, planned.values, planned.seed, run, status(run)))
    return found


def run_of(folder: Path, name: str) -> Path:
    """The run directory of a trial."""
    return folder / "runs" / name


def status(run: Path) -> str:
    """waiting, running, stopped, finished, diverged or failed; see the module."""
    return "running" if is_held(run) else status_unlocked(run)


def status_unlocked(run: Path) -> str:
    """The same for a trial that nobody else works on."""
    noted = note_of(run).get("status")
    if noted in ("diverged", "failed"):
        return str(noted)
    if _json(run / "status.json").get("status") == "FINISHED":
        return "finished"
    begun = (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()
    return "stopped" if begun else "waiting"


def score(run: Path) -> float | None:
    """val/bpb at the end of a run; None if it has none, or none that is finite."""
    try:
        last = metrics.last(run / "metrics.jsonl") or {}
    except (DataError, OSError):
        return None
    value = last.get("val/bpb")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def first(run: Path) -> float:
    """The first train/bpb that a run reported; nan if it has none."""
    try:
        return next(float(line["train/bpb"]) for line in metrics.stream(run / "metrics.jsonl") if "train/bpb" in line)
    except (DataError, OSError, StopIteration):
        return math.nan


def note_of(run: Path) -> dict[str, Any]:
    """What trial.json says; {} if it is not there."""
    return _json(run / "trial.json")


def note(run: Path, status_: str, reason: str, crashes: int = 0) -> None:
    """Say what became of a trial that did not finish, whole or not at all."""
    with whole_file(run / "trial.json") as out:
        out.write(json.dumps({"status": status_, "reason": reason, "crashes": crashes}, indent=1).encode() + b"\n")


def note_bad_end(run: Path, status_: str, reason: str, crashes: int = 0) -> None:
    """The same for a trial that could not write RUN/status.json itself, unless another runner has taken it up."""
    for _ in range(TRIES):  # for who looks at a trial holds its lock too, for a moment
        with held(run / LOCK) as ours:
            if ours:
                note(run, status_, reason, crashes)
                with whole_file(run / "status.json") as out:
                    out.write(json.dumps({"status": "FAILED", "message": redact(reason)}).encode())
                return
        time.sleep(TRY_PAUSE_S)


def forget(run: Path) -> None:
    """Let a trial that failed be tried again."""
    (run / "trial.json").unlink(missing_ok=True)


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, between processes and machines; False if another holds it. It ends with this process.

    Where the file system has no locks it is held by everybody, and --share keeps runners apart.
    """
    # written to, for a network file system lends a lock against others to writers alone
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield _locked(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def is_held(run: Path) -> bool:
    """Whether some process trains this trial now."""
    try:
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # never begun, or not ours to write: then only read
        return False
    try:
        return not _locked(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    return {}
