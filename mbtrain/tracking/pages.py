"""MLflow's pages: serve those of a store, and say where a run's are."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mbtrain.errors import MbtrainError
from mbtrain.redact import without_password
from mbtrain.tracking.files import ENVIRONMENT, absolute, default_uri, known_run, sqlite_path

log = logging.getLogger("mbtrain.tracking")


def ui(host: str = "127.0.0.1", port: int = 5000, uri: str | None = None) -> NoReturn:
    """Serve MLflow's pages for the store: this process becomes the server, until Ctrl-C.

    Everyone who reaches the port can read and change the store, therefore it is the loopback interface only unless told
    otherwise. Raises MbtrainError if the store is itself a server: then there is nothing to serve.
    """
    uri = absolute(uri or default_uri())
    if not uri.startswith(("sqlite:", "postgresql", "mysql", "mssql", "file:", "/")):
        raise MbtrainError(f"tracking uri: {without_password(uri)} is a server of its own; open it in a browser")
    # By the environment: other users of the machine can read arguments, and it may hold a password.
    environment = {**ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    database = sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
        # Where clients of this server put artifacts: next to those of the runs that wrote to the database directly.
        environment["MLFLOW_ARTIFACTS_DESTINATION"] = (database.parent / "artifacts").as_uri()
    log.info("MLflow at %s on http://%s:%d (it takes some 10 s to start)", without_password(uri), host, port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    # Instead of a child: then Ctrl-C, or a signal to this process, ends the server and leaves nobody behind.
    os.execve(command[0], command, environment)


def compare_url(run_dirs: Sequence[Path | str], server: str = "http://127.0.0.1:5000") -> str:
    """Address of MLflow's page that compares the runs (of one run: its own page).

    `server` is where `ui` serves; runs that were sent to a server have their pages there.

    Raises MbtrainError if there is no run, if MLflow does not have one of them, or if they are in different stores.
    """
    runs = []
    for run_dir in run_dirs:
        known = known_run(run_dir)
        if not known:
            raise MbtrainError(f"{run_dir}: not in MLflow yet; `mbtrain sync {run_dir}` sends it there")
        runs.append(known)
    stores = sorted({run["tracking_uri"] for run in runs})
    if len(stores) != 1:
        raise MbtrainError(f"expected runs of one MLflow store, got {len(stores)}: {', '.join(stores) or 'no run'}")
    base = stores[0] if stores[0].startswith(("http://", "https://")) else server
    experiments = list(dict.fromkeys(run["experiment_id"] for run in runs))
    if len(runs) == 1:
        return f"{base.rstrip('/')}/#/experiments/{experiments[0]}/runs/{runs[0]['run_id']}"
    ids = json.dumps([run["run_id"] for run in runs], separators=(",", ":"))
    return f"{base.rstrip('/')}/#/compare-runs?runs={ids}&experiments={json.dumps(experiments, separators=(',', ':'))}"
