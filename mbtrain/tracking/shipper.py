"""The shipper: a process that follows a run directory and sends what is new to MLflow; and `sync`, one round of it.

One shipper a run, by a lock on RUN/.mlflow.lock. Where the run directory is shared and its file system does not carry
locks between hosts, two rules stand in: a shipper that RUN/tracking.json names no more ends before it sends anything
else, and one that finds another host's name in the lock file first waits GRACE_S.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import psutil

from mbtrain import plots
from mbtrain.errors import MbtrainError
from mbtrain.redact import one_line, redact, without_password
from mbtrain.tracking import sending
from mbtrain.tracking.files import (
    ENVIRONMENT,
    STATUSES,
    absolute,
    default_uri,
    known_run,
    read_json,
    signature,
    sqlite_path,
    trainer_of,
    with_password,
)

log = logging.getLogger("mbtrain.tracking")

PLOT_PAUSE_S = 30.0  # at least, between two drawings of the loss curve (0.3 s of CPU each)
LOOK_PAUSE_S = 0.25  # between two looks whether the trainer has ended
BACK_OFF_S = 60.0  # at most, between two tries while MLflow is out of reach, and at most the wait for an answer
SAY_AGAIN_S = 3600.0  # between two lines that say the same
GRACE_S = 90.0  # longer than a round of another host's shipper, and than a network file system shows an old file
_VALIDATED = b'"val/'
MOST_MEMORY_BYTES = 8 << 30  # of the shipper: an answer without end is not to take the machine's


def main() -> None:
    """`python -m mbtrain.tracking RUN`: send RUN while its trainer lives, then the rest, then end.

    Exit status 0: MLflow has everything. 1: it has not, and `mbtrain sync RUN` sends the rest.
    """
    # A launcher that is told to stop terminates all processes below it; this one ends soon after the trainer has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mbtrain.tracking RUN")
    sys.stderr = cast(TextIO, _Redacted(sys.stderr))  # mlflow, alembic and Python's warnings write there too
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # one line a try is enough, and it is ours
    stand_back()
    _set_environment()
    run_dir = Path(sys.argv[1]).resolve()
    request = read_json(run_dir / "tracking.json") or {}
    trainer = trainer_of(request)
    if trainer is None:
        sys.exit(f"{run_dir}/tracking.json: not there or not whole; the trainer writes it (`mbtrain sync` needs none)")
    process = _process(trainer)
    lock = _lock(run_dir, trainer, process)
    if lock is None:
        sys.exit(1)
    with lock:
        status = ship(run_dir, request, process)
        if status is None:  # begin anew: mlflow keeps connections to a file that is no more
            os.execv(sys.executable, [sys.executable, "-m", "mbtrain.tracking", str(run_dir)])
        lock.truncate(0)
    sys.exit(status)


def ship(run_dir: Path, request: Mapping[str, Any], process: psutil.Process | None) -> int | None:
    """Send what is new, every interval, until the trainer's process has ended and everything is sent.

    The exit status; None if this process has to begin anew, since the store's database was replaced under it.
    """
    target = {**_target(run_dir, request), "tracking_uri": with_password(str(request["tracking_uri"]))}
    interval_s, deadline_s = float(request["interval_s"]), float(request["deadline_s"])
    trainer = trainer_of(request)
    database = sqlite_path(target["tracking_uri"])
    curve = _Curve(run_dir)
    said = _Said()
    link: sending.Link | None = None
    database_was: tuple[int, int] | None = None
    failures = 0
    artifacts_after_s = -math.inf
    ended_s: float | None = None
    while True:
        # Before anything is read: what the trainer wrote before its end is then surely read below.
        end = _end(run_dir, process)
        now_s = time.monotonic()
        if end and ended_s is None:
            ended_s = now_s
        left_s = math.inf if ended_s is None else ended_s + deadline_s - now_s
        curve.draw_if_due(at_end=end is not None)
        try:
            _beat(run_dir)
            _must_be_ours(run_dir, trainer)
            if link and _inode(database) != database_was:
                log.warning("%s was replaced or removed; beginning anew", database)
                return None
            usual_s = sending.usual_patience_s()
            with sending.patience(round(max(usual_s, min(usual_s * 2**failures, BACK_OFF_S, left_s)))):
                if link:
                    sending.refresh(link)
                else:
                    link = sending.open_link(run_dir, target)
                    database_was = _inode(database)
                if not end:
                    sending.set_running(link)
                sending.describe(link)
                sending.send_metrics(link, lambda: _must_be_ours(run_dir, trainer))
                # The store of artifacts may be another machine than the server: its failures stop no metrics.
                whole = True
                if end or now_s > artifacts_after_s:
                    try:
                        sending.send_artifacts(link, final=end is not None)
                    except Exception as error:
                        whole = False
                        artifacts_after_s = now_s + BACK_OFF_S / 2
                        said.warn(f"artifacts: {_reason(error)}")
                if end and (whole or left_s < 0):
                    sending.drop_twins(link)
                    sending.set_ended(link, end)
                    rest = "all sent" if whole else "artifacts are missing"
                    log.info("run %s is %s; %s", link.run_id, end["status"], rest)
                    return 0 if whole else 1
            if failures:
                log.info("MLflow is there again, and has all up to now")
            failures = 0
            pause_s = 1.0 if end else interval_s
        except _FollowedError:
            log.warning("the run has another trainer now, whose shipper sends the rest; this one ends")
            return 1
        except Exception as error:  # whatever mlflow, its HTTP client or its database raise: try again, never give up
            if link and (isinstance(error, MbtrainError) or _names_no_run(error)):
                link.tail.close()
                link = None
            pause_s = min(2.0 ** min(failures, 10), BACK_OFF_S)
            failures = min(failures + 1, 10)
            if left_s < 0:
                log.error("%s; gave up: `mbtrain sync %s` sends the rest", _reason(error), run_dir)
                return 1
            said.warn(f"{_reason(error)}; trying again, every {BACK_OFF_S:.0f} s at last")
        if ended_s is not None:
            pause_s = min(pause_s, max(0.1, ended_s + deadline_s - time.monotonic()))
        _wait(pause_s, run_dir, process, until_end=end is None)


def sync(
    run_dir: Path | str, uri: str | None = None, experiment: str | None = None, run_name: str | None = None
) -> dict[str, Any]:
    """Send to MLflow, in this process, what it does not have of RUN yet; nothing is sent twice.

    What is not given is taken from what the run was started with, then from the defaults (`default_uri`, experiment
    `mbtrain`, the directory's name). A store other than the run's gets the whole run, and is the run's from then on.
    Returns `run_id tracking_uri status metrics artifacts`, the last two as numbers of values and files sent now.

    Raises MbtrainError if RUN is no run, if a shipper is at work on it, or if MLflow cannot be reached.
    """
    run_dir = Path(run_dir).resolve()
    if not (run_dir / "metrics.jsonl").is_file() and not (run_dir / "config.yaml").is_file():
        raise MbtrainError(f"{run_dir}: expected a run directory, found neither config.yaml nor metrics.jsonl in it")
    _set_environment()
    lock = _try_lock(run_dir)
    if lock is None:
        raise MbtrainError(f"{run_dir}: a shipper is sending this run to MLflow right now; see {run_dir}/mlflow.log")
    with lock:
        if (holder := _foreign_holder(run_dir)) and _beats(run_dir):
            host = holder["host"]
            raise MbtrainError(f"{run_dir}: {host} is sending this run to MLflow right now; see {run_dir}/mlflow.log")
        request = read_json(run_dir / "tracking.json") or {}
        target = _target(run_dir, request)
        known_uri = request.get("tracking_uri") or (known_run(run_dir) or {}).get("tracking_uri")
        target["tracking_uri"] = absolute(uri) if uri else with_password(str(known_uri or default_uri()))
        target["experiment"] = experiment or target["experiment"]
        target["run_name"] = run_name or target["run_name"]
        _Curve(run_dir).draw_if_due(at_end=True)
        where = without_password(target["tracking_uri"])
        try:
            link = sending.open_link(run_dir, target)
            with contextlib.closing(link.tail):
                sending.describe(link)
                sent = sending.send_metrics(link)
                files = sending.send_artifacts(link, final=True)
                status = _known_end(run_dir, request)
                if status:
                    sending.set_ended(link, status)
        except MbtrainError:
            raise
        except Exception as error:  # whatever mlflow, its HTTP client or its database raise
            raise MbtrainError(f"{run_dir}: could not send to MLflow at {where}: {_reason(error)}") from error
    return {
        "run_id": link.run_id,
        "tracking_uri": where,
        "status": status["status"] if status else "RUNNING",
        "metrics": sent,
        "artifacts": files,
    }


def _target(run_dir: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What is sent where, less the address, of a tracking.json."""
    return {
        "experiment": str(request.get("experiment") or "mbtrain"),
        "run_name": str(request.get("run_name") or run_dir.name),
        "run_id": request.get("run_id"),
        "parent": request.get("parent"),
    }


# --- The trainer ---------------------------------------------------------------------------------------------------


def _wait(seconds: float, run_dir: Path, process: psutil.Process | None, until_end: bool) -> None:
    wake_s = time.monotonic() + seconds
    while (left_s := wake_s - time.monotonic()) > 0 and not (until_end and _end(run_dir, process)):
        time.sleep(min(left_s, LOOK_PAUSE_S))


def _end(run_dir: Path, process: psutil.Process | None) -> dict[str, Any] | None:
    """How the run ended, {"status", "message"}; None while it goes on."""
    alive = _alive(process)  # first: a trainer writes its status, then dies
    with contextlib.suppress(OSError):
        status = read_json(run_dir / "status.json")
        if status and status.get("status") in STATUSES:
            return status
    if alive:
        return None
    return {"status": "KILLED", "message": "the trainer's process was gone and had written no status.json"}


def _known_end(run_dir: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """`_end` for a process that may be on another machine than the trainer: None also where nobody can tell."""
    trainer = trainer_of(request)
    here = trainer is not None and trainer["host"] == socket.gethostname()
    return _end(run_dir, _process(trainer) if trainer and here else psutil.Process())  # in doubt: as alive as we are


def _process(trainer: Mapping[str, Any]) -> psutil.Process | None:
    """The trainer's process; None if it is gone. Its start time tells it from a later one with the same pid."""
    try:
        process = psutil.Process(trainer["pid"])
        return process if abs(process.create_time() - trainer["started"]) < 2.0 else None
    except (psutil.Error, ValueError, OverflowError):
        return None


def _alive(process: psutil.Process | None) -> bool:
    try:
        # A zombie has ended: only its parent has not asked yet.
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# --- One shipper a run ---------------------------------------------------------------------------------------------


def _try_lock(run_dir: Path) -> TextIO | None:
    """The open, locked lock file (closing it gives the lock back), or None if another process holds it.

    On a file system without locks it is open only; then the file's content has to do.
    """
    file = open(run_dir / ".mlflow.lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            return None
    return file


def _lock(run_dir: Path, trainer: Mapping[str, Any], process: psutil.Process | None) -> TextIO | None:
    """The lock for this trainer's shipper; None, with a line in the log, if there is one already.

    After a resume the shipper of the trainer before may still be at work: then wait until it has seen that it is over.
    """
    while True:
        file = _try_lock(run_dir)
        if file and (holder := _foreign_holder(run_dir)):
            log.info("%s's shipper may still be at work; beginning in %.0f s", holder["host"], GRACE_S)
            time.sleep(GRACE_S)
        try:
            _must_be_ours(run_dir, trainer)
        except _FollowedError:
            log.warning("the run has another trainer now, whose shipper sends all; this one ends")
            return None
        if file:
            file.truncate(0)
            json.dump(dict(trainer), file)
            file.flush()
            return file
        if read_json(run_dir / ".mlflow.lock") == trainer:
            log.warning("another shipper is at work for this trainer (pid %d); this one ends", trainer["pid"])
            return None
        if not _alive(process):
            log.warning("another shipper is at work, and this one's trainer has ended: so does this one")
            return None
        time.sleep(LOOK_PAUSE_S)


class _FollowedError(Exception):
    """The run has another trainer, and so another shipper."""


def _must_be_ours(run_dir: Path, trainer: Mapping[str, Any] | None) -> None:
    """Raise _FollowedError if tracking.json names another trainer by now."""
    now = read_json(run_dir / "tracking.json")
    if trainer is not None and now is not None and trainer_of(now) != trainer:
        raise _FollowedError


def _beat(run_dir: Path) -> None:
    """Show other hosts, by the lock file's time, that a shipper is at work."""
    with contextlib.suppress(OSError):
        os.utime(run_dir / ".mlflow.lock")


def _foreign_holder(run_dir: Path) -> dict[str, Any] | None:
    """The trainer of another host whose shipper did not say in the lock file that it has ended."""
    holder = trainer_of({"trainer": read_json(run_dir / ".mlflow.lock")})
    return holder if holder and holder["host"] != socket.gethostname() else None


def _beats(run_dir: Path) -> bool:
    """Whether some shipper touches the lock file within GRACE_S. Waits so long if none does."""
    path = run_dir / ".mlflow.lock"
    log.warning("%s: looking for %.0f s whether another host's shipper is at work", run_dir, GRACE_S)
    before, until_s = signature(path), time.monotonic() + GRACE_S
    while time.monotonic() < until_s:
        time.sleep(min(1.0, GRACE_S / 10))
        if signature(path) != before:
            return True
    return False


# --- The picture ---------------------------------------------------------------------------------------------------


class _Curve:
    """plots/loss.png, drawn again after a validation and at the end; seldom, where drawing takes long."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._looked_at = 0  # bytes of metrics.jsonl
        self._due = False
        self._after_s = -math.inf

    def draw_if_due(self, at_end: bool) -> None:
        """Draw if something was validated and the last drawing is a while ago, or if the run ended and it is old."""
        began_s = time.monotonic()
        if not (self._at_end_and_old() if at_end else self._validated() and began_s > self._after_s):
            return
        try:
            plots.loss_curve(self.run_dir)
        except Exception as error:  # a picture is worth no metric
            log.warning("loss curve: %s", _reason(error))
        took_s = time.monotonic() - began_s
        self._due, self._after_s = False, began_s + max(PLOT_PAUSE_S, 50 * took_s)

    def _validated(self) -> bool:
        """Whether a line tells a validation that is not drawn yet. Looks at bytes: this is no place to be exact."""
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                if file.seek(0, os.SEEK_END) < self._looked_at:  # a resume dropped lines
                    self._looked_at = 0
                file.seek(max(0, self._looked_at - len(_VALIDATED)))
                while data := file.read(sending.MIB):
                    self._due = self._due or _VALIDATED in data
                self._looked_at = file.tell()
        except OSError:  # not there yet
            pass
        return self._due

    def _at_end_and_old(self) -> bool:
        lines, picture = signature(self.run_dir / "metrics.jsonl"), signature(self.run_dir / "plots" / "loss.png")
        return lines is not None and (picture is None or picture[1] < lines[1])


# --- This process --------------------------------------------------------------------------------------------------


class _Redacted:
    """A stream that lets no secret through."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _OneLine(logging.Formatter):
    """What names and servers say cannot write lines of its own, nor steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class _Said:
    """Warnings that come again and again while MLflow is away, each at most once an hour."""

    def __init__(self) -> None:
        self._at_s: dict[str, float] = {}

    def warn(self, text: str) -> None:
        now_s = time.monotonic()
        kind = "".join(c for c in text if not c.isdigit())  # ports, addresses and times differ from try to try
        if now_s - self._at_s.get(kind, -math.inf) < SAY_AGAIN_S:
            return
        if len(self._at_s) > 100:
            self._at_s.clear()
        self._at_s[kind] = now_s
        log.warning("%s", text)


def stand_back() -> None:
    """Yield to trainers in everything: processor time, and memory, of which little is needed."""
    with contextlib.suppress(OSError):
        os.nice(10)
    if os.getsid(0) == os.getpid():
        # Under autogroups (sched(7)) niceness counts among the processes of one session; sessions share evenly, so a
        # shipper would take half of a core from a trainer of its own session.
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("10", encoding="ascii")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MOST_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MOST_MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _set_environment() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def _inode(database: Path | None) -> tuple[int, int] | None:
    if database is None:
        return None
    try:
        stat = database.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _names_no_run(error: Exception) -> bool:
    """Whether MLflow says that it knows no such run, or no such experiment."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _reason(error: BaseException) -> str:
    """`RuntimeError: what it says first`."""
    lines = str(error).strip().splitlines()
    return one_line(f"{type(error).__name__}: {lines[0] if lines else ''}", 300)
