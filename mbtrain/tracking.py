"""MLflow, as a bystander: the only room that knows it.

    trainer, rank 0  --appends-->  RUN/metrics.jsonl, samples/, plots/ ...     the truth
                                       |  read
                     shipper: `python -m mbtrain.tracking RUN`  --sends-->  MLflow

The shipper is a process of its own: importing mlflow holds the GIL for seconds, and a server that is slow, gone or hung
must not be felt by a step. It follows the run directory and sends what is new. What it has sent, it asks MLflow, so it
may be killed and started again at any time: per metric key it sends only steps above the largest one that MLflow holds.
A step is therefore never there twice, also when a resumed run makes it again. What could not be sent stays in the run
directory for `sync`.

    RUN/tracking.json      written by the trainer: where to send to, and which process the trainer is
    RUN/status.json        written by the trainer at its end: {"status": "FINISHED" | "FAILED" | "KILLED", "message"}
    RUN/mlflow.json        written by the shipper: {"run_id", "experiment_id", "tracking_uri"}
    RUN/run_uid            written by the shipper: the run's own name, a tag in MLflow that finds it again
    RUN/.mlflow_sent.json  written by the shipper: size and time of each artifact that was sent
    RUN/.mlflow.lock       locked by the one shipper at work
    RUN/mlflow.log         what the shipper says
"""

import contextlib
import fcntl
import getpass
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO
from urllib.parse import urlsplit, urlunsplit

import psutil

from mbtrain import __version__, metrics, plots
from mbtrain.errors import DataError, MbtrainError

log = logging.getLogger("mbtrain.tracking")

STATUSES = ("FINISHED", "FAILED", "KILLED")

# Set for the shipper, and for `sync`, unless the user set them. Two tries of 5 s bound every call to a server that
# accepts and never answers; MLflow's own values (8 tries, 120 s each) block for minutes.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "OMP_NUM_THREADS": "1",
}

# MLflow 3.17 mlflow/utils/validation.py; a longer text is cut, a longer batch is split.
MAX_METRICS = 1000
MAX_PARAMS_OR_TAGS = 100
MAX_KEY_CHARS = 250
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000

PLOT_PAUSE_S = 30.0  # at least, between two drawings of the loss curve (0.3 s of CPU each)
LOOK_PAUSE_S = 0.25  # between two looks whether the trainer has ended
BACK_OFF_S = 60.0  # at most, between two tries while MLflow is out of reach

MIB = 1 << 20

# Sent as artifacts, with what is below them. Checkpoints are not: they are large, and stay in the run directory.
ARTIFACT_FILES = ("config.yaml", "environment.json")
ARTIFACT_DIRS = ("samples", "plots", "export")
FINAL_ARTIFACT_FILES = ("log.txt",)


# --- The trainer's side: no import of mlflow, no call that can wait for it ---------------------------------------


def default_uri(root: Path | str = ".") -> str:
    """MLFLOW_TRACKING_URI if it is set, else the sqlite store `root`/mlruns/mlflow.db (absolute, not yet created)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).resolve()}/mlruns/mlflow.db"


def start_shipper(
    run_dir: Path | str,
    uri: str,
    experiment: str,
    run_name: str,
    *,
    run_id: str | None = None,
    interval_s: float = 5.0,
    deadline_s: float = 60.0,
) -> "subprocess.Popen[bytes]":
    """Start the process that sends RUN to MLflow while the calling process lives; return at once.

    It has a session of its own (Ctrl-C at the trainer does not reach it), no stdin, and writes to RUN/mlflow.log.
    A status.json of an earlier part of the run is removed: the run is alive again. `run_id`, from a checkpoint, is the
    MLflow run to go on in if the run directory itself knows none. `interval_s` is the pause between two sendings,
    `deadline_s` the time that the shipper goes on trying after the trainer's end while MLflow is out of reach.
    """
    run_dir = Path(run_dir).resolve()
    (run_dir / "status.json").unlink(missing_ok=True)
    request = {
        "tracking_uri": _without_password(_absolute(uri)),
        "experiment": experiment,
        "run_name": run_name,
        "run_id": run_id,
        "interval_s": interval_s,
        "deadline_s": deadline_s,
        "trainer": {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()},
    }
    _write_json(run_dir / "tracking.json", request)
    return _spawn(run_dir, uri)


def finish(
    shipper: "subprocess.Popen[bytes]", run_dir: Path | str, status: str, timeout_s: float, message: str = ""
) -> bool:
    """Tell the shipper how the run ended, and wait for it at most `timeout_s`; True if MLflow has everything.

    Writes RUN/status.json. A shipper that died meanwhile is started once more. If the time is over, the shipper goes
    on by itself until its own deadline; the log line says how to send the rest later. Never raises for MLflow's sake.

    Raises ValueError unless `status` is FINISHED, FAILED or KILLED.
    """
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r}")
    run_dir = Path(run_dir).resolve()
    _write_json(run_dir / "status.json", {"status": status, "message": message})
    if shipper.poll() not in (None, 0):
        log.warning("the MLflow shipper ended early (exit status %s); starting it again", shipper.returncode)
        shipper = _spawn(run_dir)
    try:
        if shipper.wait(timeout_s) == 0:
            return True
        problem = f"MLflow has not got everything (reason: {run_dir}/mlflow.log)"
    except subprocess.TimeoutExpired:
        problem = f"MLflow has not got everything after {timeout_s:.0f} s; its shipper (pid {shipper.pid}) goes on"
    log.warning("%s. Nothing is lost: `mbtrain sync %s` sends the rest", problem, run_dir)
    return False


def run_id(run_dir: Path | str) -> str | None:
    """Id of the MLflow run that RUN is sent to; None as long as MLflow has not been reached."""
    known = _read_json(Path(run_dir) / "mlflow.json")
    return known.get("run_id") if known else None


# --- Verbs ---------------------------------------------------------------------------------------------------------


def store(run_dir: Path | str) -> str | None:
    """Tracking uri of the store that has the run, without a password; None if no store has it yet."""
    known = _read_json(Path(run_dir) / "mlflow.json")
    return known.get("tracking_uri") if known else None


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
        request = _read_json(run_dir / "tracking.json") or {}
        known_uri = request.get("tracking_uri") or (_read_json(run_dir / "mlflow.json") or {}).get("tracking_uri")
        target: dict[str, Any] = {
            "tracking_uri": _absolute(uri) if uri else _with_password(known_uri or default_uri()),
            "experiment": experiment or request.get("experiment") or "mbtrain",
            "run_name": run_name or request.get("run_name") or run_dir.name,
            "run_id": request.get("run_id"),
        }
        if _curve_is_old(run_dir):
            _draw(run_dir)
        try:
            link = _open_link(run_dir, target)
            with contextlib.closing(link.tail):
                _describe(link)
                sent = _send_metrics(link)
                files = _send_artifacts(link, final=True)
                status = _known_end(run_dir, request)
                if status:
                    _set_ended(link, status)
        except MbtrainError:
            raise
        except Exception as error:  # whatever mlflow, its HTTP client or its database raise
            where = _without_password(target["tracking_uri"])
            raise MbtrainError(f"{run_dir}: could not send to MLflow at {where}: {_one_line(error)}") from error
    return {
        "run_id": link.run_id,
        "tracking_uri": _without_password(target["tracking_uri"]),
        "status": status["status"] if status else "RUNNING",
        "metrics": sent,
        "artifacts": files,
    }


def ui(host: str = "127.0.0.1", port: int = 5000, uri: str | None = None) -> NoReturn:
    """Serve MLflow's pages for the store: this process becomes the server, until Ctrl-C.

    Everyone who reaches the port can read and change the store, therefore it is the loopback interface only unless told
    otherwise. Raises MbtrainError if the store is itself a server: then there is nothing to serve.
    """
    uri = _absolute(uri or default_uri())
    if not uri.startswith(("sqlite:", "postgresql", "mysql", "mssql", "file:", "/")):
        raise MbtrainError(f"tracking uri: {_without_password(uri)} is a server of its own; open it in a browser")
    database = _sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    environment = {**ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log.info("MLflow at %s on http://%s:%d (it takes some 10 s to start)", _without_password(uri), host, port)
    # Instead of a child: then Ctrl-C, or a signal to this process, ends the server and leaves nobody behind.
    command = _ui_command(host, port, uri)
    os.execve(command[0], command, environment)


def compare_url(run_dirs: Sequence[Path | str], server: str = "http://127.0.0.1:5000") -> str:
    """Address of MLflow's page that compares the runs (of one run: its own page).

    `server` is where `ui` serves; runs that were sent to a server have their pages there.

    Raises MbtrainError if there is no run, if MLflow does not have one of them, or if they are in different stores.
    """
    known = {}
    for run_dir in run_dirs:
        known[str(run_dir)] = _read_json(Path(run_dir) / "mlflow.json")
        if not known[str(run_dir)]:
            raise MbtrainError(f"{run_dir}: not in MLflow yet; `mbtrain sync {run_dir}` sends it there")
    runs = [run for run in known.values() if run]
    stores = sorted({run["tracking_uri"] for run in runs})
    if len(stores) != 1:
        raise MbtrainError(f"expected runs of one MLflow store, got {len(stores)}: {', '.join(stores) or 'no run'}")
    base = stores[0] if stores[0].startswith("http") else server
    experiments = list(dict.fromkeys(run["experiment_id"] for run in runs))
    if len(runs) == 1:
        return f"{base.rstrip('/')}/#/experiments/{experiments[0]}/runs/{runs[0]['run_id']}"
    ids = json.dumps([run["run_id"] for run in runs], separators=(",", ":"))
    return f"{base.rstrip('/')}/#/compare-runs?runs={ids}&experiments={json.dumps(experiments, separators=(',', ':'))}"


def _ui_command(host: str, port: int, uri: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    command += ["--workers", "1"]
    database = _sqlite_path(uri)
    if database:
        # Where clients of this server put artifacts: next to those of the runs that wrote to the database directly.
        command += ["--artifacts-destination", (database.parent / "artifacts").as_uri()]
    return command


# --- The shipper ---------------------------------------------------------------------------------------------------


@dataclass
class _Link:
    """An open way to one MLflow run. After any error it is thrown away, and a new one asks MLflow what it has."""

    client: Any
    run_id: str
    run_dir: Path
    uri: str
    tail: metrics.Tail
    last_step: dict[str, int]  # per metric key, the largest step that MLflow holds
    params: dict[str, str]
    tags: dict[str, str]
    status: str
    described: dict[str, list[int] | None] = field(default_factory=dict)  # signatures of what params and tags tell


def main() -> None:
    """`python -m mbtrain.tracking RUN`: send RUN while its trainer lives, then the rest, then end.

    Exit status 0: MLflow has everything. 1: it has not, and `mbtrain sync RUN` sends the rest.
    """
    # A launcher that is told to stop terminates all processes below it; this one ends soon after the trainer has.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mbtrain.tracking RUN")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # one line a try is enough, and it is ours
    with contextlib.suppress(OSError):
        os.nice(10)
    _set_environment()
    run_dir = Path(sys.argv[1]).resolve()
    request = _read_json(run_dir / "tracking.json")
    if request is None:
        sys.exit(f"{run_dir}/tracking.json: not there or not whole; the trainer writes it (`mbtrain sync` needs none)")
    trainer = _process(request["trainer"])
    lock = _lock(run_dir, request["trainer"], trainer)
    if lock is None:
        sys.exit(1)
    with lock:
        sys.exit(_ship(run_dir, request, trainer))


def _ship(run_dir: Path, request: dict[str, Any], trainer: psutil.Process | None) -> int:
    """Send what is new, every interval, until the trainer has ended and everything is sent; the exit status."""
    request = request | {"tracking_uri": _with_password(request["tracking_uri"])}
    curve = metrics.Tail(run_dir / "metrics.jsonl")
    drawn_s = -math.inf
    undrawn = False
    link: _Link | None = None
    failures = 0
    artifacts_after_s = -math.inf
    ended_s: float | None = None
    while True:
        # Before anything is read: what the trainer wrote before its end is then surely read below.
        end = _end(run_dir, trainer)
        now_s = time.monotonic()
        if end and ended_s is None:
            ended_s = now_s
            undrawn = _curve_is_old(run_dir)
        late = ended_s is not None and now_s - ended_s > request["deadline_s"]

        undrawn = _has_new_validation(curve) or undrawn
        if undrawn and (end or now_s - drawn_s > PLOT_PAUSE_S):
            _draw(run_dir)
            drawn_s, undrawn = now_s, False

        try:
            link = link or _open_link(run_dir, request)
            if not end and link.status != "RUNNING":
                link.client.update_run(link.run_id, status="RUNNING")
                link.status = "RUNNING"
            _describe(link)
            _send_metrics(link)
            # The store of artifacts may be another machine than the tracking server: its failures stop no metrics.
            whole = True
            if end or now_s > artifacts_after_s:
                try:
                    _send_artifacts(link, final=end is not None)
                except Exception as error:
                    whole = False
                    artifacts_after_s = now_s + BACK_OFF_S / 2
                    log.warning("artifacts: %s", _one_line(error))
            if end and (whole or late):
                _set_ended(link, end)
                log.info(
                    "run %s is %s; %s", link.run_id, end["status"], "all sent" if whole else "artifacts are missing"
                )
                return 0 if whole else 1
            failures = 0
            pause_s = 1.0 if end else request["interval_s"]
        except Exception as error:  # whatever mlflow, its HTTP client or its database raise: try again, never give up
            if link:
                link.tail.close()
                link = None
            pause_s = min(2.0 ** min(failures, 10), BACK_OFF_S)
            failures += 1
            if late:
                log.error("%s; gave up: `mbtrain sync %s` sends the rest", _one_line(error), run_dir)
                return 1
            log.warning("%s; next try in %.0f s", _one_line(error), pause_s)
        if ended_s is not None:
            pause_s = min(pause_s, max(0.1, ended_s + request["deadline_s"] - time.monotonic()))
        _wait(pause_s, run_dir, trainer, until_end=end is None)


def _wait(seconds: float, run_dir: Path, trainer: psutil.Process | None, until_end: bool) -> None:
    wake_s = time.monotonic() + seconds
    while (left_s := wake_s - time.monotonic()) > 0 and not (until_end and _end(run_dir, trainer)):
        time.sleep(min(left_s, LOOK_PAUSE_S))


def _end(run_dir: Path, trainer: psutil.Process | None) -> dict[str, Any] | None:
    """How the run ended, {"status", "message"}; None while it goes on."""
    alive = _alive(trainer)  # first: a trainer writes its status, then dies
    status = _read_json(run_dir / "status.json")
    if status and status.get("status") in STATUSES:
        return status
    if alive:
        return None
    return {"status": "KILLED", "message": "the trainer's process was gone and had written no status.json"}


def _known_end(run_dir: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """`_end` for a process that may be on another machine than the trainer: None also where nobody can tell."""
    trainer = request.get("trainer")
    here = trainer is not None and trainer["host"] == socket.gethostname()
    return _end(run_dir, _process(trainer) if trainer and here else psutil.Process())  # in doubt: as alive as we are


def _has_new_validation(tail: metrics.Tail) -> bool:
    found = False
    try:
        while records := tail.read():
            found = found or any(key.startswith("val/") for record in records for key in record)
    except DataError as error:
        log.warning("%s", error)
    return found


def _curve_is_old(run_dir: Path) -> bool:
    lines, curve = _signature(run_dir / "metrics.jsonl"), _signature(run_dir / "plots" / "loss.png")
    return lines is not None and (curve is None or curve[1] < lines[1])


def _draw(run_dir: Path) -> None:
    try:
        plots.loss_curve(run_dir)
    except Exception as error:  # a picture is worth no metric
        log.warning("loss curve: %s", _one_line(error))


# --- What is sent --------------------------------------------------------------------------------------------------


def _open_link(run_dir: Path, target: Mapping[str, Any]) -> _Link:
    """Reach MLflow, find or create the run, and ask what it holds."""
    from mlflow import MlflowClient

    uri = target["tracking_uri"]
    database = _sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    identity = _find_run(client, run_dir, target) or _create_run(client, run_dir, target)
    run = client.get_run(identity)
    if run.info.lifecycle_stage != "active":
        raise MbtrainError(
            f"MLflow run {identity} was deleted; restore it there, or remove {run_dir}/mlflow.json to send a new one"
        )
    known = {"run_id": identity, "experiment_id": run.info.experiment_id, "tracking_uri": _without_password(uri)}
    if _read_json(run_dir / "mlflow.json") != known:
        _write_json(run_dir / "mlflow.json", known)
    log.info("run %s of experiment %r at %s", identity, target["experiment"], known["tracking_uri"])
    # One request for the latest point of each key: MLflow keeps the point with the largest step there. The whole
    # history of each key would say the same, at a thousand times the price for a long run.
    last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    return _Link(
        client=client,
        run_id=identity,
        run_dir=run_dir,
        uri=known["tracking_uri"],
        tail=metrics.Tail(run_dir / "metrics.jsonl"),
        last_step=last_step,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        status=run.info.status,
    )


def _find_run(client: Any, run_dir: Path, target: Mapping[str, Any]) -> str | None:
    from mlflow.exceptions import MlflowException

    known = _read_json(run_dir / "mlflow.json")
    if known and known["tracking_uri"] != _without_password(target["tracking_uri"]):
        known = None  # another store's id
    identity = known["run_id"] if known else target.get("run_id")
    if identity:
        try:
            return str(client.get_run(identity).info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow does not know run %s any more; looking for it by its tag", identity)
    experiment = client.get_experiment_by_name(target["experiment"])
    if experiment is None:
        return None
    # A shipper that died between creating the run and writing mlflow.json left a run that only its tag finds.
    found = client.search_runs(
        [experiment.experiment_id], filter_string=f"tags.`mbtrain.run_uid` = '{_run_uid(run_dir)}'", max_results=1
    )
    return str(found[0].info.run_id) if found else None


def _create_run(client: Any, run_dir: Path, target: Mapping[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = target["experiment"]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # In the store's own directory and absolute, so that the pages find it whatever directory they are served from.
        # A server decides by itself.
        database = _sqlite_path(target["tracking_uri"])
        location = (database.parent / "artifacts").as_uri() if database else None
        try:
            experiment_id = client.create_experiment(name, artifact_location=location)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # made by another run at the same moment
            if experiment is None:
                raise
    if experiment is not None:
        experiment_id = experiment.experiment_id
    with metrics.Tail(run_dir / "metrics.jsonl") as tail:
        first = next(iter(tail.read(limit_bytes=MIB)), {})
    tags = {
        "mlflow.runName": target["run_name"],
        "mlflow.source.name": "mbtrain",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "mbtrain.run_dir": str(run_dir),
        "mbtrain.run_uid": _run_uid(run_dir),
        "mbtrain.version": __version__,
    }
    start_ms = round(1000 * first.get("time_unix_s", time.time()))
    run = client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=target["run_name"])
    return str(run.info.run_id)


def _describe(link: _Link) -> None:
    """Config as params, environment as tags; again when the files changed, as a resumed run may have other values.

    MLflow's params cannot be changed. A value that differs becomes the tag `resumed.<key>`.
    """
    files = {name: _signature(link.run_dir / name) for name in ("config.yaml", "environment.json")}
    if files == link.described:
        return
    params, tags = {}, {}
    for key, value in _config_params(link.run_dir / "config.yaml").items():
        if key not in link.params:
            params[key] = value
        elif link.params[key] != value or f"resumed.{key}" in link.tags:
            tags[_name(f"resumed.{key}")] = value
    environment = _read_json(link.run_dir / "environment.json") or {}
    for key, value in (environment.get("tags") or {}).items():
        tags[_name(key)] = _text(value)[:MAX_TAG_CHARS]
        if key == "commit":
            tags["mlflow.source.git.commit"] = tags[key]
    tags = {key: value for key, value in tags.items() if link.tags.get(key) != value}
    _send_batches(link, params, tags)
    link.params |= params
    link.tags |= tags
    link.described = files


def _send_batches(link: _Link, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    for chunk in _chunks([Param(key, value) for key, value in params.items()], MAX_PARAMS_OR_TAGS):
        link.client.log_batch(link.run_id, params=chunk, synchronous=True)
    for chunk in _chunks([RunTag(key, value) for key, value in tags.items()], MAX_PARAMS_OR_TAGS):
        link.client.log_batch(link.run_id, tags=chunk, synchronous=True)


def _send_metrics(link: _Link) -> int:
    """Send all whole lines of metrics.jsonl that MLflow does not have; the number of values sent."""
    from mlflow.entities import Metric

    count = 0
    while records := link.tail.read():
        points = [Metric(*point) for point in _new_points(records, link.last_step)]
        for chunk in _chunks(points, MAX_METRICS):
            # A try whose answer got lost may have succeeded. MLflow drops a point that is equal in everything,
            # and the timestamps are those of the file, so the same point sent again is equal.
            link.client.log_batch(link.run_id, metrics=chunk, synchronous=True)
        count += len(points)
    return count


def _new_points(
    records: Iterable[Mapping[str, Any]], last_step: dict[str, int]
) -> Iterator[tuple[str, float, int, int]]:
    """(key, value, timestamp in ms, step) of each value above the last step of its key, which is moved on."""
    for record in records:
        step, time_s = record["step"], record.get("time_unix_s")
        timestamp_ms = round(1000 * time_s) if isinstance(time_s, int | float) and time_s > 0 else 0
        for name, value in record.items():
            if name in ("step", "time_unix_s") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            key = _name(name)
            if step <= last_step.get(key, -1):
                continue
            last_step[key] = step
            if math.isinf(value):
                # MLflow would store 1.8e308, and its curves would show nothing else.
                log.warning(
                    "step %d: %s is %s, which MLflow cannot hold; it is in metrics.jsonl only", step, key, value
                )
                continue
            yield key, float(value), timestamp_ms, step


def _send_artifacts(link: _Link, final: bool) -> int:
    """Send the files that are new or changed since they were sent; the number of files sent."""
    record = link.run_dir / ".mlflow_sent.json"
    sent = _read_json(record) or {}
    if (sent.get("run_id"), sent.get("tracking_uri")) != (link.run_id, link.uri):
        sent = {"run_id": link.run_id, "tracking_uri": link.uri, "files": {}}
    count = 0
    try:
        for path in _artifacts(link.run_dir, final):
            name = path.relative_to(link.run_dir).as_posix()
            signature = _signature(path)
            if signature is None or sent["files"].get(name) == signature:
                continue
            folder = path.parent.relative_to(link.run_dir).as_posix()
            with _upload_timeout(signature[0]):
                link.client.log_artifact(link.run_id, str(path), None if folder == "." else folder)
            sent["files"][name] = signature
            count += 1
    finally:
        if count:
            _write_json(record, sent)
    return count


def _artifacts(run_dir: Path, final: bool) -> Iterator[Path]:
    for name in ARTIFACT_FILES + (FINAL_ARTIFACT_FILES if final else ()):
        if (run_dir / name).is_file():
            yield run_dir / name
    for folder in ARTIFACT_DIRS:
        for path in sorted((run_dir / folder).rglob("*")):
            # Files appear under their final names only when they are whole; the others are somebody's work.
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp":
                yield path


@contextlib.contextmanager
def _upload_timeout(size_bytes: int) -> Iterator[None]:
    """For a large file the server may answer only when it has put it away: a second more per MiB. (MLflow reads the
    variable at each request.)
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(int(before or ENVIRONMENT[name]) + size_bytes // MIB)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _set_ended(link: _Link, end: Mapping[str, Any]) -> None:
    if message := end.get("message"):
        link.client.set_tag(link.run_id, "mbtrain.status_message", str(message)[:MAX_TAG_CHARS])
    if link.status != end["status"]:
        link.client.set_terminated(link.run_id, status=end["status"], end_time=_end_ms(link.run_dir))
        link.status = end["status"]


def _end_ms(run_dir: Path) -> int:
    """When the run ended, which for `sync` may be long ago: the time of its status, else of its last metrics."""
    with contextlib.suppress(FileNotFoundError):
        return round(1000 * (run_dir / "status.json").stat().st_mtime)
    record = metrics.last(run_dir / "metrics.jsonl") or {}
    return round(1000 * record.get("time_unix_s", time.time()))


def _config_params(path: Path) -> dict[str, str]:
    """The resolved config as flat params with dotted keys: `model.stages.0.d_model`. {} if there is none."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {_name(key): _text(value)[:MAX_PARAM_CHARS] for key, value in _flatten(config)}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their dotted keys. A list of plain values is one leaf, a list of sections is not."""
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        if prefix:
            yield prefix, value
        return
    for key, item in items:
        yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _text(value: Any) -> str:
    """As YAML and the command line write it: true, null, [1, 2]; a text is itself."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _name(key: str) -> str:
    """A name that MLflow accepts: letters, digits and `_ - . / space`; other characters become `_`."""
    parts = re.sub(r"[^\w\-./ ]", "_", str(key), flags=re.ASCII)[:MAX_KEY_CHARS].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)  # it must be a clean path, too


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


# --- Files, processes, addresses -----------------------------------------------------------------------------------


def _spawn(run_dir: Path, uri: str | None = None) -> "subprocess.Popen[bytes]":
    environment = {**ENVIRONMENT, **os.environ}
    if uri:
        environment["MLFLOW_TRACKING_URI"] = _absolute(uri)  # with its password, which no file is to hold
    package_root = Path(__file__).resolve().parents[1]
    if package_root.name not in ("site-packages", "dist-packages"):  # from a checkout, whatever directory we are in
        paths = [str(package_root), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with open(run_dir / "mlflow.log", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mbtrain.tracking", str(run_dir)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def _set_environment() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def _process(trainer: Mapping[str, Any]) -> psutil.Process | None:
    """The trainer's process; None if it is gone. Its start time tells it from a later one with the same pid."""
    try:
        process = psutil.Process(trainer["pid"])
        return process if abs(process.create_time() - trainer["started"]) < 2.0 else None
    except psutil.Error:
        return None


def _alive(process: psutil.Process | None) -> bool:
    try:
        # A zombie has ended: only its parent has not asked yet.
        return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _try_lock(run_dir: Path) -> TextIO | None:
    """The open, locked lock file (closing it gives the lock back), or None if another process holds it."""
    file = open(run_dir / ".mlflow.lock", "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        file.close()
        return None


def _lock(run_dir: Path, trainer: Mapping[str, Any], process: psutil.Process | None) -> TextIO | None:
    """The lock for this trainer's shipper; None, with a line in the log, if there is one already.

    After a resume the shipper of the trainer before may still be sending its rest: then wait for it.
    """
    while True:
        file = _try_lock(run_dir)
        if file:
            file.truncate(0)
            json.dump(dict(trainer), file)
            file.flush()
            return file
        if _read_json(run_dir / ".mlflow.lock") == trainer:
            log.warning("another shipper is at work for this trainer (pid %d); this one ends", trainer["pid"])
            return None
        if not _alive(process):
            log.warning("another shipper is at work, and this one's trainer has ended: so does this one")
            return None
        time.sleep(LOOK_PAUSE_S)


def _run_uid(run_dir: Path) -> str:
    path = run_dir / "run_uid"
    with contextlib.suppress(FileNotFoundError):
        if uid := path.read_text(encoding="utf-8").strip():
            return uid
    uid = uuid.uuid4().hex
    _write_text(path, uid + "\n")
    return uid


def _signature(path: Path) -> list[int] | None:
    """[size in bytes, time of change in ns]; None if there is no such file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all. The process's own name for the work: trainer and shipper never share one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sqlite_path(uri: str) -> Path | None:
    """`/a/b.db` of `sqlite:////a/b.db`; None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]) if uri.startswith(prefix) else None


def _absolute(uri: str) -> str:
    """A relative sqlite path made absolute: the shipper, the pages and `sync` may run in other directories."""
    database = _sqlite_path(uri)
    if database is None or database.is_absolute():
        return uri
    _, mark, options = uri.partition("?")
    return f"sqlite:///{database.resolve()}{mark}{options}"


def _without_password(uri: str) -> str:
    """The address without `user:password@`, as it is written to files and logs."""
    parts = urlsplit(uri)
    return uri if "@" not in parts.netloc else urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_password(uri: str) -> str:
    """The same address as the environment has it, if that is the one: with its password."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if known and _without_password(known) == uri else uri


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= 300 else text[:297] + "..."


if __name__ == "__main__":
    main()
