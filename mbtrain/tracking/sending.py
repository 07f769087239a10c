"""One run in MLflow: find or make it, ask what it holds, send what the run directory has beyond that.

The only file that imports mlflow, and only inside functions: the trainer imports this package too. Whatever mlflow, its
HTTP client or its database raise passes through here; the caller tries again.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from mbtrain import __version__, metrics
from mbtrain.errors import MbtrainError
from mbtrain.redact import redact, without_password
from mbtrain.shards import whole_file
from mbtrain.tracking.files import (
    ENVIRONMENT,
    is_run_id,
    known_run,
    read_json,
    signature,
    sqlite_path,
    write_json,
)

log = logging.getLogger("mbtrain.tracking")

# MLflow 3.17 mlflow/utils/validation.py; a longer text is cut, a longer batch is split.
MAX_METRICS = 1000
MAX_PARAMS_OR_TAGS = 100
MAX_KEY_CHARS = 250
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000

MIB = 1 << 20
TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # in seconds, between two bytes; MLflow reads it at each request
HANG_S = 300.0  # beyond that timeout, for a call as a whole: a server may send a byte now and then for ever

COSTS = ("parameters", "training_flops_per_byte")  # of `model` in environment.json: params to plot scores against
_PARENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", re.ASCII)

# Sent as artifacts, with what is below them. Checkpoints are not: they are large, and stay in the run directory.
ARTIFACT_FILES = ("config.yaml", "environment.json", "vocabulary.json")
ARTIFACT_DIRS = ("samples", "plots", "export")
FINAL_ARTIFACT_FILES = ("log.txt",)


@dataclass
class Link:
    """An open way to one MLflow run.

    held       per metric key, the largest step that MLflow holds
    unsent     points that were read from metrics.jsonl, and of which MLflow has not said that it has them
    described  signatures of the files that params and tags tell
    """

    client: Any
    run_id: str
    experiment_id: str
    run_dir: Path
    uri: str
    tail: metrics.Tail
    held: dict[str, int] = field(default_factory=dict)
    unsent: list[tuple[str, float, int, int]] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = ""
    artifact_uri: str = ""
    described: dict[str, list[int] | None] = field(default_factory=dict)


def client_of(uri: str) -> Any:
    """MLflow's client of a store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_link(run_dir: Path, target: Mapping[str, Any]) -> Link:
    """Reach the store `target` names, find or make the run there, and ask what it holds."""
    uri = target["tracking_uri"]
    database = sqlite_path(uri)
    if database and not database.exists():
        _make_database(database)
    client = client_of(uri)
    with _within():
        identity = _find_run(client, run_dir, target) or _create_run(client, run_dir, target)
    link = Link(client, identity, "", run_dir, without_password(uri), metrics.Tail(run_dir / "metrics.jsonl"))
    refresh(link)
    drop_twins(link)
    log.info("run %s of experiment %r at %s", identity, target["experiment"], link.uri)
    return link


def refresh(link: Link) -> None:
    """Ask MLflow what it holds of the run. If it is less than it was, all of metrics.jsonl is looked through again.

    One request: MLflow keeps the latest point of each key, by step. The whole history of each key would say the same,
    at a thousand times the price for a long run.

    Raises MbtrainError if the run was deleted there.
    """
    with _within():
        run = link.client.get_run(link.run_id)
    if run.info.lifecycle_stage != "active":
        raise MbtrainError(
            f"MLflow run {link.run_id} was deleted, so nothing is sent; restore it there, and it goes on, or remove "
            f"{link.run_dir}/mlflow.json to have a new one made"
        )
    held = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
    if any(held.get(key, -1) < step for key, step in link.held.items()):
        log.warning("run %s holds less than it did (an older backup?); sending what it lacks", link.run_id)
        link.tail.close()
        link.unsent, link.described = [], {}
    link.held = held
    link.unsent = [point for point in link.unsent if point[3] > held.get(point[0], -1)]
    link.params, link.tags = dict(run.data.params), dict(run.data.tags)
    link.status, link.artifact_uri = str(run.info.status), str(run.info.artifact_uri)
    link.experiment_id = str(run.info.experiment_id)
    known = {"run_id": link.run_id, "experiment_id": link.experiment_id, "tracking_uri": link.uri}
    if known_run(link.run_dir) != known:
        write_json(link.run_dir / "mlflow.json", known)
    uid = link.tags.get("mbtrain.run_uid")
    if uid and _is_uid(uid) and not (link.run_dir / "run_uid").exists():
        _write_uid(link.run_dir, uid)  # a run directory that only knew the run's id, from its checkpoint


def describe(link: Link) -> None:
    """Config as params, environment as tags; again when the files changed, as a resumed run may have other values.

    MLflow's params cannot be changed. A value that differs becomes the tag `resumed.<key>`.
    """
    files = {name: signature(link.run_dir / name) for name in ("config.yaml", "environment.json")}
    if files == link.described:
        return
    params, tags = {}, {}
    environment = read_json(link.run_dir / "environment.json") or {}
    model = environment.get("model")
    model = model if isinstance(model, dict) else {}
    costs = {f"mbtrain.{key}": _text(model[key])[:MAX_PARAM_CHARS] for key in COSTS if model.get(key) is not None}
    for key, value in (_config_params(link.run_dir / "config.yaml") | costs).items():
        if key not in link.params:
            params[key] = value
        elif link.params[key] != value or f"resumed.{key}" in link.tags:
            tags[_name(f"resumed.{key}")] = value
    told = environment.get("tags")
    for key, value in told.items() if isinstance(told, dict) else ():
        tags[_name(key)] = _text(value)[:MAX_TAG_CHARS]
        if key == "commit":
            tags["mlflow.source.git.commit"] = tags[key]
    tags = {key: value for key, value in tags.items() if link.tags.get(key) != value}
    _send_batches(link, params, tags)
    link.described = files


def send_metrics(link: Link, check: Callable[[], None] = lambda: None) -> int:
    """Send all whole lines of metrics.jsonl that MLflow does not have, in their order; the number of values sent.

    `check` is called before each batch: what it raises ends the sending.
    """
    from mlflow.entities import Metric

    count = 0
    while True:
        if not link.unsent:
            records = link.tail.read(limit_bytes=MIB)
            if not records:
                return count
            link.unsent = list(_new_points(records, link.held))
        while chunk := link.unsent[:MAX_METRICS]:
            check()
            # A try whose answer got lost may have succeeded. MLflow drops a point that is equal in everything,
            # and the timestamps are those of the file, so the same point sent again is equal.
            with _within():
                link.client.log_batch(link.run_id, metrics=[Metric(*point) for point in chunk], synchronous=True)
            link.held |= {key: step for key, _, _, step in chunk}
            del link.unsent[: len(chunk)]
            count += len(chunk)


def send_artifacts(link: Link, final: bool) -> int:
    """Send the files that are new or changed since they were sent; the number of files sent.

    Raises MbtrainError if a server would have them written to a path on this machine: that is not for it to say.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    record = link.run_dir / ".mlflow_sent.json"
    sent = read_json(record) or {}
    if (sent.get("run_id"), sent.get("tracking_uri")) != (link.run_id, link.uri) or not isinstance(
        sent.get("files"), dict
    ):
        sent = {"run_id": link.run_id, "tracking_uri": link.uri, "files": {}}
    now_sent: dict[str, list[int]] = {}
    repository = None
    try:
        for path in _artifacts(link.run_dir, final):
            name = path.relative_to(link.run_dir).as_posix()
            written = signature(path)
            if written is None or sent["files"].get(name) == written:
                continue
            if repository is None:
                if link.uri.startswith("http") and urlsplit(link.artifact_uri).scheme in ("", "file", "runs", "models"):
                    raise MbtrainError(
                        f"the server wants files in {link.artifact_uri!r}, a path on this machine; they stay in "
                        f"{link.run_dir}. Start it with --serve-artifacts, or with a store such as s3://"
                    )
                with _upload_timeout(0):
                    repository = get_artifact_repository(link.artifact_uri, tracking_uri=link.client.tracking_uri)
            folder = path.parent.relative_to(link.run_dir).as_posix()
            with _upload_timeout(written[0]):
                repository.log_artifact(str(path), None if folder == "." else folder)
            now_sent[name] = written
    finally:
        if now_sent:
            with _within():  # a proxy that says "log in first" to everything has seemed to take the files, too
                link.client.get_run(link.run_id)
            write_json(record, sent | {"files": sent["files"] | now_sent})
    return len(now_sent)


def set_running(link: Link) -> None:
    """Say that the run goes on, if MLflow thinks otherwise."""
    if link.status != "RUNNING":
        with _within():
            link.client.update_run(link.run_id, status="RUNNING")
        link.status = "RUNNING"


def set_ended(link: Link, end: Mapping[str, Any]) -> None:
    """Say how the run ended: {"status", "message"}."""
    message = redact(str(end.get("message") or ""))[:MAX_TAG_CHARS]
    with _within():
        if message and link.tags.get("mbtrain.status_message") != message:
            link.client.set_tag(link.run_id, "mbtrain.status_message", message)
        if link.status != end["status"]:
            link.client.set_terminated(link.run_id, status=end["status"], end_time=_end_ms(link.run_dir))
    link.status = end["status"]


def drop_twins(link: Link) -> None:
    """Delete empty runs of the same name: a request to make the run whose answer was lost may have made one, late."""
    with _within():
        for twin in _runs_of(link.client, [link.experiment_id], link.run_dir):
            if twin.info.run_id != link.run_id and not twin.data.metrics and not twin.data.params:
                log.warning(
                    "run %s is empty and was made by a request whose answer got lost: deleted", twin.info.run_id
                )
                link.client.delete_run(twin.info.run_id)


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Wait so long for an answer of MLflow's server, instead of the usual time."""
    before = os.environ.get(TIMEOUT)
    os.environ[TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ[TIMEOUT]
        else:
            os.environ[TIMEOUT] = before


def usual_patience_s() -> int:
    """Seconds that MLflow's client waits for an answer: what the user set, else ours."""
    value = os.environ.get(TIMEOUT, "")
    return int(value) if value.isdecimal() and int(value) > 0 else int(ENVIRONMENT[TIMEOUT])


def _make_database(path: Path) -> None:
    """Make an MLflow database that appears when it is whole: one whose making was cut off, MLflow never mends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with _within():
            client_of(f"sqlite:///{made}").search_experiments(max_results=1)
        try:
            os.link(made, path)
        except FileExistsError:  # made by another run at the same moment
            pass
        except OSError:  # a file system without hard links
            os.replace(made, path)
    finally:
        made.unlink(missing_ok=True)


# --- Finding the run -----------------------------------------------------------------------------------------------


def _find_run(client: Any, run_dir: Path, target: Mapping[str, Any]) -> str | None:
    from mlflow.exceptions import MlflowException

    known = known_run(run_dir)
    if known and known["tracking_uri"] != without_password(target["tracking_uri"]):
        known = None  # another store's id
    identity = known["run_id"] if known else target.get("run_id")
    if is_run_id(identity):
        try:
            run = client.get_run(identity)
            if known or run.info.lifecycle_stage == "active":
                return str(run.info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow does not know run %s any more; looking for it by its tag", identity)
    experiment = client.get_experiment_by_name(target["experiment"])
    if experiment is None:
        return None
    if experiment.lifecycle_stage != "active":
        raise MbtrainError(
            f"MLflow experiment {target['experiment']!r} was deleted, so nothing is sent; restore it there, and it "
            "goes on, or choose another log.experiment"
        )
    # A shipper that died between making the run and writing mlflow.json left a run that only its tag finds.
    found = _runs_of(client, [experiment.experiment_id], run_dir)
    return str(max(found, key=lambda run: (len(run.data.metrics), run.info.run_id)).info.run_id) if found else None


def _runs_of(client: Any, experiments: list[str], run_dir: Path) -> list[Any]:
    """Active runs that bear this run's own name."""
    filter_ = f"tags.`mbtrain.run_uid` = '{_run_uid(run_dir)}'"
    return list(client.search_runs(experiments, filter_string=filter_, max_results=100))


def _create_run(client: Any, run_dir: Path, target: Mapping[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = target["experiment"]
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # In the store's own directory and absolute, so that the pages find it whatever directory they are served from.
        # A server decides by itself.
        database = sqlite_path(target["tracking_uri"])
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
    parent = target.get("parent")
    if isinstance(parent, str) and _PARENT.fullmatch(parent):
        tags |= {"mbtrain.parent": parent, "mlflow.parentRunId": _parent(client, experiment_id, parent)}
    start_ms = round(1000 * _time_s(first))
    run = client.create_run(experiment_id, start_time=start_ms, tags=tags, run_name=target["run_name"])
    return str(run.info.run_id)


def _parent(client: Any, experiment_id: str, name: str) -> str:
    """Id of the run below which those of a sweep are shown; it has no metrics of its own."""

    def oldest() -> str | None:
        found = client.search_runs([experiment_id], filter_string=f"tags.`mbtrain.parent_of` = '{name}'")
        return min((run.info.start_time, str(run.info.run_id)) for run in found)[1] if found else None

    if known := oldest():
        return known
    tags = {"mlflow.source.name": "mbtrain", "mlflow.user": _user(), "mbtrain.parent_of": name}
    made = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    client.set_terminated(made)
    kept = oldest() or made
    if kept != made:  # another run of the sweep made one at the same moment
        client.delete_run(made)
    return kept


def _run_uid(run_dir: Path) -> str:
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if _is_uid(uid := (run_dir / "run_uid").read_text(encoding="utf-8").strip()):
            return uid
    return _write_uid(run_dir, uuid.uuid4().hex)


def _is_uid(value: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _write_uid(run_dir: Path, uid: str) -> str:
    with whole_file(run_dir / "run_uid") as out:
        out.write(f"{uid}\n".encode())
    return uid


# --- What is sent --------------------------------------------------------------------------------------------------


def _send_batches(link: Link, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    for chunk in _chunks([Param(key, value) for key, value in params.items()], MAX_PARAMS_OR_TAGS):
        with _within():
            link.client.log_batch(link.run_id, params=chunk, synchronous=True)
    for chunk in _chunks([RunTag(key, value) for key, value in tags.items()], MAX_PARAMS_OR_TAGS):
        with _within():
            link.client.log_batch(link.run_id, tags=chunk, synchronous=True)


def _new_points(records: Iterable[Mapping[str, Any]], held: Mapping[str, int]) -> Iterator[tuple[str, float, int, int]]:
    """(key, value, timestamp in ms, step) of each value above the largest step of its key, held or in these records."""
    reached = dict(held)
    for record in records:
        step, timestamp_ms = record["step"], round(1000 * _time_s(record, 0.0))
        # MLflow's comparison begins with the metric that came first: let it be bits per byte.
        for name, value in sorted(record.items(), key=lambda item: not item[0].endswith("bpb")):
            if name in ("step", "time_unix_s") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            key = _name(name)
            if step <= reached.get(key, -1):
                continue
            if abs(value) > sys.float_info.max:
                # MLflow would store 1.8e308, and its curves would show nothing else.
                log.warning(
                    "step %d: %s is %s, which MLflow cannot hold; it is in metrics.jsonl only", step, key, value
                )
                continue
            reached[key] = step
            yield key, float(value), timestamp_ms, step


def _time_s(record: Mapping[str, Any], default_s: float | None = None) -> float:
    """When a line was written, in unix seconds; `default_s`, else now, for a line that does not say so."""
    time_s = record.get("time_unix_s")
    if isinstance(time_s, int | float) and 0 < time_s < 1e11:
        return time_s
    return time.time() if default_s is None else default_s


def _artifacts(run_dir: Path, final: bool) -> Iterator[Path]:
    candidates = [run_dir / name for name in ARTIFACT_FILES + (FINAL_ARTIFACT_FILES if final else ())]
    candidates += sorted(run_dir.glob("eval_*.json"))
    for folder in ARTIFACT_DIRS:
        candidates += sorted((run_dir / folder).rglob("*"))
    for path in candidates:
        # Files appear under their final names only when they are whole; the others are somebody's work.
        if path.name.startswith(".") or path.suffix == ".tmp" or not path.is_file():
            continue
        # A link in a run directory that came from elsewhere may name any file of this user's.
        if path.resolve().is_relative_to(run_dir):
            yield path


@contextlib.contextmanager
def _upload_timeout(size_bytes: int) -> Iterator[None]:
    """For a large file the server may answer only when it has put it away: a second more per MiB."""
    longer_s = usual_patience_s() + size_bytes // MIB
    with patience(longer_s), _within():
        yield


@contextlib.contextmanager
def _within() -> Iterator[None]:
    """Raise TimeoutError in what is inside if it takes long beyond the timeout of a request, whatever it waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("MLflow did not end a call in time")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 3 * usual_patience_s() + HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end_ms(run_dir: Path) -> int:
    """When the run ended, which for `sync` may be long ago: the time of its status, else of its last metrics."""
    with contextlib.suppress(FileNotFoundError):
        return round(1000 * (run_dir / "status.json").stat().st_mtime)
    return round(1000 * _time_s(metrics.last(run_dir / "metrics.jsonl") or {}))


def _config_params(path: Path) -> dict[str, str]:
    """The resolved config as flat params with dotted keys: `model.stages.0.d_model`. {} if there is none."""
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the metrics are worth more
        log.warning("%s: not told as params: %s", path, str(error).partition("\n")[0])
        return {}
    return {_name(key): redact(_text(value)[:MAX_PARAM_CHARS]) for key, value in _flatten(config)}


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


@lru_cache(maxsize=10_000)
def _name(key: str) -> str:
    """A name that MLflow accepts: letters, digits and `_ - . / space`; other characters become `_`."""
    parts = re.sub(r"[^\w\-./ ]", "_", str(key), flags=re.ASCII)[:MAX_KEY_CHARS].split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)  # it must be a clean path, too


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
