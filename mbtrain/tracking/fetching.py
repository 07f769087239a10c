"""An MLflow experiment -> run directories, as far as they are shown: configuration, environment, metrics, samples.

`fetch` is called by any process, and starts one of its own for what MLflow's client does: that one stands back, has
bounded memory and a bounded time, so that a server that hangs or answers without end costs the caller a line.
What comes back is not trusted: files get names made here, and the reader of run directories checks what is in them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mbtrain.errors import MbtrainError
from mbtrain.redact import one_line, without_password
from mbtrain.tracking import sending
from mbtrain.tracking.files import ENVIRONMENT, absolute, default_uri, sqlite_path, write_json

log = logging.getLogger("mbtrain.tracking")

LIMIT_S = 600.0  # for the whole of an experiment
MAX_RUNS = 200
MAX_SAMPLES = 2
MAX_FILE_BYTES = 4 << 20
_STATUSES = {"FINISHED", "FAILED", "KILLED"}
_SHOWN = re.compile(
    r"train/bpb|val/(partial_)?bpb|progress/(bytes|flops|minutes)|perf/(bytes_per_s|mfu)|mem/peak_bytes"
)
_SAMPLE = re.compile(r"samples/([\w.-]{1,80}\.(?:txt|png|wav))", re.ASCII)
_EVALUATION = re.compile(r"eval_[\w.-]{1,80}\.json", re.ASCII)


def fetch(experiment: str, uri: str | None, into: Path) -> list[Path]:
    """Make a run directory in `into` for each active run of the experiment that has metrics; in the order of names.

    uri: the store, by default `default_uri`; its password may be in the environment, as MLflow has it.
    Raises MbtrainError where the store does not answer, or knows no such experiment or no run in it.
    """
    store = absolute(uri or default_uri())
    database = sqlite_path(store)
    shown = without_password(store)
    if database and not database.is_file():
        raise MbtrainError(f"--uri={shown}: no such file; expected the store that runs were sent to")
    package_root = Path(__file__).resolve().parents[2]
    environment = {**ENVIRONMENT, **os.environ, "MLFLOW_TRACKING_URI": store}  # no argument is to hold its password
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(package_root), os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-m", "mbtrain.tracking", "--fetch", experiment, str(into)]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise MbtrainError(f"MLflow at {shown}: no whole answer in {LIMIT_S:.0f} s; is it reachable?") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = one_line(said[-1] if said else f"exit status {done.returncode}", 300)
        raise MbtrainError(f"MLflow at {shown}: {reason}")
    return sorted(path for path in into.iterdir() if path.is_dir())


def main(experiment: str, into: Path) -> None:
    """The process that `fetch` starts. Ends with status 1 and a last line that says why."""
    try:
        count = _fetch_all(os.environ["MLFLOW_TRACKING_URI"], experiment, into)
    except Exception as error:  # whatever mlflow, its HTTP client or its database raise
        lines = str(error).strip().splitlines()
        named = "" if isinstance(error, MbtrainError) else f"{type(error).__name__}: "
        sys.exit(f"{named}{one_line(lines[0] if lines else '', 300)}")
    if not count:
        sys.exit(f"experiment {experiment!r}: no run with metrics in it")


def _fetch_all(uri: str, experiment: str, into: Path) -> int:
    client = sending.client_of(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = sorted(one.name for one in client.search_experiments(max_results=50))
        raise MbtrainError(f"experiment {experiment!r}: not there; there are {', '.join(known) or 'none'}")
    count = 0
    for run in client.search_runs([found.experiment_id], max_results=MAX_RUNS, order_by=["attributes.start_time"]):
        if any(_SHOWN.fullmatch(key) for key in run.data.metrics):
            _write_run(client, run, _folder(into, run))
            count += 1
    return count


def _folder(into: Path, run: Any) -> Path:
    """A new folder by the run's name, of harmless characters; of several of a name by its id too."""
    name = re.sub(r"[^\w.-]", "_", str(run.info.run_name or ""), flags=re.ASCII).strip(".")[:80]
    identity = re.sub(r"\W", "_", str(run.info.run_id), flags=re.ASCII)[:40]
    folder = into / (name or identity)
    folder = into / f"{name}-{identity}" if folder.exists() else folder
    folder.mkdir()
    return folder


def _write_run(client: Any, run: Any, folder: Path) -> None:
    lines: dict[int, dict[str, float]] = {}
    for key in filter(_SHOWN.fullmatch, run.data.metrics):
        for point in client.get_metric_history(run.info.run_id, key):
            line = lines.setdefault(int(point.step), {"time_unix_s": point.timestamp / 1000})
            line[key] = float(point.value)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as out:
        for step in sorted(lines):
            finite = {k: v if math.isfinite(v) else str(v) for k, v in lines[step].items()}
            out.write(json.dumps({"step": step, **finite}) + "\n")
    if run.info.status in _STATUSES:
        write_json(folder / "status.json", {"status": run.info.status})
    root = urlsplit(str(run.info.artifact_uri)).scheme
    if client.tracking_uri.startswith("http") and root in ("", "file", "runs", "models"):
        log.warning("run %s: the server names a path on this machine for its files; none is read", run.info.run_id)
    else:
        _write_artifacts(client, run.info.run_id, folder)
    if (uid := run.data.tags.get("mbtrain.run_uid")) is not None:
        (folder / "run_uid").write_text(f"{uid}\n", encoding="utf-8")
    if not (folder / "config.yaml").exists() and run.data.params:
        (folder / "config.yaml").write_text(_nested(run.data.params), encoding="utf-8")
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", {"tags": dict(run.data.tags)})


def _write_artifacts(client: Any, run_id: str, folder: Path) -> None:
    """What artifacts of the run are shown; without them, where their store does not answer."""
    (folder / "samples").mkdir()
    try:
        for path, name in _wanted(client, run_id):
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
                got = Path(client.download_artifacts(run_id, path, temporary)).resolve()
                if got.is_relative_to(Path(temporary).resolve()) and got.stat().st_size <= MAX_FILE_BYTES:
                    (folder / name).write_bytes(got.read_bytes())
    except Exception as error:  # the metrics are worth more
        log.warning("run %s: artifacts: %s", run_id, one_line(str(error), 200))


def _wanted(client: Any, run_id: str) -> Iterator[tuple[str, str]]:
    """(path in the store, name in the run directory) of each file to fetch; of samples the newest."""
    for entry in client.list_artifacts(run_id):
        small = not entry.is_dir and (entry.file_size or 0) <= MAX_FILE_BYTES
        if small and (entry.path in ("config.yaml", "environment.json") or _EVALUATION.fullmatch(entry.path)):
            yield entry.path, entry.path
    samples = [entry.path for entry in client.list_artifacts(run_id, "samples") if _SAMPLE.fullmatch(entry.path)]
    for path in sorted(samples, reverse=True)[:MAX_SAMPLES]:
        yield path, path


def _nested(params: Mapping[str, str]) -> str:
    """Params with dotted keys as the YAML that they were made of; numbers in keys are positions in lists."""
    import yaml

    tree: dict[str, Any] = {}
    for dotted, text in params.items():
        node, parts = tree, dotted.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, {}) if isinstance(node.get(part, {}), dict) else {}
        try:
            node[parts[-1]] = json.loads(text)
        except ValueError:
            node[parts[-1]] = text
    return yaml.safe_dump(_listed(tree), sort_keys=False)


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _listed(item) for key, item in value.items()}
    if items and list(items) == [str(i) for i in range(len(items))]:
        return list(items.values())
    return items
