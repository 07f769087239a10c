"""The trainer's side: start the shipper, and tell it how the run ended. No call here can wait for MLflow, or fail."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from mbtrain.redact import redact, without_password
from mbtrain.tracking.files import ENVIRONMENT, STATUSES, absolute, write_json

log = logging.getLogger("mbtrain.tracking")


def start_shipper(
    run_dir: Path | str,
    uri: str,
    experiment: str,
    run_name: str,
    *,
    run_id: str | None = None,
    parent: str | None = None,
    interval_s: float = 5.0,
    deadline_s: float = 60.0,
) -> subprocess.Popen[bytes] | None:
    """Start the process that sends RUN to MLflow while the calling process lives; return at once.

    It has a session of its own (Ctrl-C at the trainer does not reach it), no stdin, and writes to RUN/mlflow.log.
    A status.json of an earlier part of the run is removed: the run is alive again. `run_id`, from a checkpoint, is the
    MLflow run to go on in if the run directory itself knows none; `parent` names the run below which it is shown.
    `interval_s` is the pause between two sendings,
    `deadline_s` the time that the shipper goes on trying after the trainer's end while MLflow is out of reach.
    None, and a warning, where the system starts no process: training goes on, and `mbtrain sync` sends it later.
    """
    run_dir = Path(run_dir).resolve()
    trainer = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": os.urandom(8).hex(),  # a shipper whose trainer this file names no more has been followed by another
    }
    request = _request(uri, experiment, run_name, run_id, parent)
    request |= {"interval_s": interval_s, "deadline_s": deadline_s, "trainer": trainer}
    try:
        (run_dir / "status.json").unlink(missing_ok=True)
        write_json(run_dir / "tracking.json", request)
        return _spawn(run_dir, uri)
    except OSError as error:
        log.warning("MLflow gets nothing for now (%s); `mbtrain sync %s` sends it later", error, run_dir)
        return None


def leave_to_sync(
    run_dir: Path | str, uri: str, experiment: str, run_name: str, *, run_id: str | None, parent: str | None
) -> None:
    """Write down where RUN is to be sent to, and start nothing: who started the training sends it by `sync`.

    The arguments are those of `start_shipper`.
    """
    try:
        write_json(Path(run_dir) / "tracking.json", _request(uri, experiment, run_name, run_id, parent))
    except OSError as error:
        log.warning("MLflow gets nothing of %s for now (%s)", run_dir, error)


def _request(uri: str, experiment: str, run_name: str, run_id: str | None, parent: str | None) -> dict[str, Any]:
    """What tracking.json says of where a run is sent to; a password stays in the environment."""
    where = {"tracking_uri": without_password(absolute(uri)), "experiment": experiment, "run_name": run_name}
    return where | {"run_id": run_id, "parent": parent}


def finish(
    shipper: subprocess.Popen[bytes], run_dir: Path | str, status: str, timeout_s: float, message: str = ""
) -> bool:
    """Tell the shipper how the run ended, and wait for it at most `timeout_s`; True if MLflow has everything.

    Writes RUN/status.json. A shipper that died meanwhile is started once more. If the time is over, the shipper goes
    on by itself until its own deadline; the log line says how to send the rest later. Never raises for MLflow's sake.

    Raises ValueError unless `status` is FINISHED, FAILED or KILLED.
    """
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    run_dir = Path(run_dir).resolve()
    try:
        write_json(run_dir / "status.json", {"status": status, "message": redact(message)})
        if shipper.poll() not in (None, 0):
            log.warning("the MLflow shipper ended early (exit status %s); starting it again", shipper.returncode)
            shipper = _spawn(run_dir)
        if shipper.wait(timeout_s) == 0:
            return True
        problem = f"MLflow has not got everything (reason: {run_dir}/mlflow.log)"
    except subprocess.TimeoutExpired:
        problem = f"MLflow has not got everything after {timeout_s:.0f} s; its shipper (pid {shipper.pid}) goes on"
    except OSError as error:
        problem = f"MLflow may not have got everything ({error})"
    log.warning("%s. Nothing is lost: `mbtrain sync %s` sends the rest", problem, run_dir)
    return False


def spawn(
    arguments: Sequence[str], output: Path, uri: str | None = None, *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start `python -m ARGUMENTS` in a session of its own, which adds what it says to `output`. Raises OSError."""
    environment = {**ENVIRONMENT, **os.environ}
    if uri:
        environment["MLFLOW_TRACKING_URI"] = absolute(uri)  # with its password, which no file is to hold
    package_root = Path(__file__).resolve().parents[2]
    if package_root.name not in ("site-packages", "dist-packages"):  # from a checkout, whatever directory we are in
        paths = [str(package_root), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with open(output, "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=stdin,
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,
        )


def _spawn(run_dir: Path, uri: str | None = None) -> subprocess.Popen[bytes]:
    return spawn(["mbtrain.tracking", str(run_dir)], run_dir / "mlflow.log", uri)
