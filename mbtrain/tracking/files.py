"""What trainer and shipper share: small files in the run directory, addresses of stores, MLflow's settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbtrain.redact import without_password
from mbtrain.shards import whole_file

STATUSES = ("FINISHED", "FAILED", "KILLED")

# Set for the shipper, and for `sync`, unless the user set them. MLflow's own values (8 tries of 120 s) block for
# minutes. No second try of MLflow's own: it would make a run twice where the first answer got lost.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "OMP_NUM_THREADS": "1",
}

# What MLflow takes for a run's id (mlflow/utils/validation.py); anything else in a file is damage.
_RUN_ID = re.compile(r"[a-zA-Z0-9][\w-]{0,255}", re.ASCII)


def default_uri(root: Path | str = ".") -> str:
    """MLFLOW_TRACKING_URI if it is set, else the sqlite store `root`/mlruns/mlflow.db (absolute, not yet created)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).resolve()}/mlruns/mlflow.db"


def run_id(run_dir: Path | str) -> str | None:
    """Id of the MLflow run that RUN is sent to; None as long as MLflow has not been reached."""
    known = known_run(run_dir)
    return known["run_id"] if known else None


def store(run_dir: Path | str) -> str | None:
    """Tracking uri of the store that has the run, without a password; None if no store has it yet."""
    known = known_run(run_dir)
    return known["tracking_uri"] if known else None


def known_run(run_dir: Path | str) -> dict[str, str] | None:
    """RUN/mlflow.json, {"run_id", "experiment_id", "tracking_uri"}; None if it is not there or says something else."""
    known = read_json(Path(run_dir) / "mlflow.json") or {}
    keys = ("run_id", "experiment_id", "tracking_uri")
    if not is_run_id(known.get("run_id")) or not all(isinstance(known.get(key), str) for key in keys):
        return None
    return {key: known[key] for key in keys}


def is_run_id(value: object) -> bool:
    """Whether it can be the id of an MLflow run."""
    return isinstance(value, str) and _RUN_ID.fullmatch(value) is not None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or something else in it. Raises OSError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all. Raises OSError."""
    with whole_file(path) as out:
        out.write((json.dumps(value, indent=1) + "\n").encode())


def signature(path: Path) -> list[int] | None:
    """[size in bytes, time of change in ns]; None if there is no such file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def sqlite_path(uri: str) -> Path | None:
    """`/a/b.db` of `sqlite:////a/b.db`; None for other stores."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix).partition("?")[0]) if uri.startswith(prefix) else None


def absolute(uri: str) -> str:
    """A relative sqlite path made absolute: the shipper, the pages and `sync` may run in other directories."""
    database = sqlite_path(uri)
    if database is None or database.is_absolute():
        return uri
    _, mark, options = uri.partition("?")
    return f"sqlite:///{database.resolve()}{mark}{options}"


def with_password(uri: str) -> str:
    """The same address as the environment has it, if that is the one: with its password, which no file holds."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if known and without_password(known) == uri else uri


def trainer_of(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"host", "pid", "started", "token"} of the trainer that a tracking.json names; None if it names none."""
    trainer = request.get("trainer")
    kinds: dict[str, Any] = {"host": str, "pid": int, "started": int | float, "token": str}
    if not isinstance(trainer, dict) or not all(isinstance(trainer.get(key), kind) for key, kind in kinds.items()):
        return None
    return {key: trainer[key] for key in kinds}
